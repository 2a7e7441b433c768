"""Reading what a service answers: `Server-Timing`, server-sent events, OpenAI's bodies. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_DURATION = re.compile(r"\s*([\w-]+)\s*;.*?\bdur=([0-9]+(?:\.[0-9]*)?)", re.ASCII)


def read_server_timing(header: str) -> dict[str, float]:
    """Seconds by name; metrics without a duration are left out."""
    found = (_DURATION.match(part) for part in header.split(","))
    return {match[1]: float(match[2]) / 1000 for match in found if match}


def read_timings(timings: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds by stage of an event's `timings`, and `queue`: from arrival to the first denoise step.

    A stage's seconds hold its wait, so that is the encode and then the wait for denoise; absent where the
    service does not report waits.
    """
    by_stage = {str(entry["stage"]): entry for entry in timings}
    stages = {name: float(entry["seconds"]) for name, entry in by_stage.items()}
    if "queue_seconds" in by_stage.get("denoise", {}):
        stages["queue"] = stages.get("encode", 0.0) + float(by_stage["denoise"]["queue_seconds"])
    return stages


def read_retry_after(header: str | None) -> float | None:
    """Seconds; None where absent or a date, which no service of ours sends."""
    return float(header) if header is not None and re.fullmatch(r"\d+(\.\d+)?", header.strip(), re.ASCII) else None


def error_line(body: bytes, status: int) -> str:
    """What an error's body says, in one line: OpenAI's envelope, or its first line."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace").strip()
    lines = message.splitlines()
    return f"HTTP {status}: {lines[0][:200]}" if lines else f"HTTP {status}"


def body_fault(body: bytes, images: int) -> str:
    """What is wrong with a 200's body, in one line; empty where it holds `images` pictures."""
    try:
        data = json.loads(body)["data"]
        pictures = sum(bool(item["b64_json"]) for item in data)
    except (ValueError, KeyError, TypeError):
        return "the answer is not OpenAI's"
    return "" if pictures == images else f"the answer holds {pictures} of {images} pictures"


@dataclass(frozen=True)
class Event:
    name: str
    data: str


@dataclass
class EventReader:
    """Lines to events (the WHATWG standard's event stream, without `id` and `retry`)."""

    _name: str = ""
    _data: list[str] = field(default_factory=list)

    def feed(self, line: str) -> Event | None:
        """Takes a line without its end; gives the event that an empty line completes."""
        if not line:
            event = Event(self._name or "message", "\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)
        return None


@dataclass
class StreamedAnswer:
    """What a stream has told so far."""

    images: int
    previews: int = 0
    completed: int = 0
    error: str = ""
    stages_s: dict[str, float] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Takes in one event; events of other names (progress) say nothing here."""
        if event.name not in ("error", "image_generation.partial_image", "image_generation.completed"):
            return
        try:
            data = json.loads(event.data)
            if event.name == "error" or "error" in data:
                error = data.get("error", data)
                self.error = f"error event: {error['message'] if isinstance(error, dict) else error}".split("\n")[0]
            elif not data["b64_json"]:
                self.error = f"{event.name} without a picture"
            elif event.name == "image_generation.partial_image":
                self.previews += 1
            else:
                self.completed += 1
                if data.get("timings"):
                    self.stages_s = read_timings(data["timings"])
        except (ValueError, KeyError, TypeError, AttributeError):
            self.error = f"{event.name} is not OpenAI's"

    def fault(self) -> str:
        """What is wrong with the stream now that it has ended; empty where every picture came."""
        if self.error or self.completed == self.images:
            return self.error
        return f"the stream ended after {self.completed} of {self.images} pictures"
