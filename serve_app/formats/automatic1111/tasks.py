"""The txt2img bodies that are under way, and who may ask about which.

webui works on one request after another, and its `progress` and `interrupt` mean the current one. Here those of many
clients are under way at once: a client names its own by the `force_task_id` that it sent with it. Without a name they
mean the oldest, and only where nobody but this machine's own users reaches the service.

Each replica of the ingress knows its own bodies alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve_app.formats.automatic1111.status import Tracker
from serve_app.request.errors import InvalidRequest, TaskNotFound
from serve_app.request.schema import GeneratedImage, ImageReady, ImageRequest, ImageResult
from serve_app.runtime.events import Event
from serve_app.runtime.pipeline import LatentPreview

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Floats

_FINISHED_KEPT = 64


@dataclass
class Body:
    """One txt2img body on its way: how far it is, and what of it is finished."""

    requests: list[ImageRequest]
    tracker: Tracker
    task_id: str | None = None
    task: asyncio.Future[list[ImageResult]] | None = None
    preview: Floats | None = None  # the latest: (4, H/8, W/8)
    previews: int = 0  # how many there were
    _ready: dict[tuple[int, int], GeneratedImage] = field(default_factory=dict)

    @staticmethod
    def of(requests: list[ImageRequest], task_id: str | None = None) -> Body:
        images = sum(request.n for request in requests)
        return Body(requests, Tracker(images, requests[0].num_inference_steps, time.time()), task_id)

    def see(self, row: int, event: Event) -> None:
        if isinstance(event, LatentPreview):
            self.preview = event.latents
            self.previews += 1
            return
        if isinstance(event, ImageReady):
            self._ready[row, event.image] = event.picture
        self.tracker.see(event, sum(request.n for request in self.requests[:row]))

    def interrupt(self) -> None:
        if self.task is not None:
            self.tracker.interrupted = True
            self.task.cancel()

    def finished(self) -> list[ImageResult]:
        """The pictures that were done when it was interrupted."""
        now, total = int(time.time()), sum(request.n for request in self.requests)
        warnings = [f"interrupted: {len(self._ready)} of {total} pictures were finished"]
        return [
            ImageResult([self._ready[key] for key in sorted(self._ready) if key[0] == row], warnings, created=now)
            for row in range(len(self.requests))
        ]


class Bodies:
    """Those that are under way, the oldest first. `loopback`: only this machine's own users reach the service."""

    def __init__(self, loopback: bool) -> None:
        self._loopback = loopback
        self._under_way: list[Body] = []
        self._finished: deque[str] = deque(maxlen=_FINISHED_KEPT)

    @contextmanager
    def under_way(self, body: Body) -> Iterator[None]:
        """Has a body among them until the block ends; where that raises, it is not finished.

        Raises `InvalidRequest` where another has its task id.
        """
        if body.task_id is not None and self._named(body.task_id) is not None:
            raise InvalidRequest("force_task_id: another txt2img of this id is under way", param="force_task_id")
        self._under_way.append(body)
        ended = False
        try:
            yield
            ended = True
        finally:
            self._under_way.remove(body)
            if body.task_id is not None and (ended or body.tracker.interrupted):
                self._finished.append(body.task_id)

    def find(self, task_id: str | None) -> Body | None:
        """The caller's own; without an id the oldest, on loopback alone."""
        if task_id is not None:
            return self._named(task_id)
        return self._under_way[0] if self._loopback and self._under_way else None

    def is_finished(self, task_id: str | None) -> bool:
        return task_id in self._finished and self.find(task_id) is None

    def interrupt(self, task_id: str | None) -> None:
        """Ends the caller's own. Raises `InvalidRequest` where it is not named, `TaskNotFound` where there is none.

        One that is finished, and on loopback nothing to end, is no error.
        """
        body = self.find(task_id)
        if body is not None:
            body.interrupt()
        elif task_id is None and not self._loopback:
            raise InvalidRequest(
                "id_task: needed where others reach the service: send force_task_id with txt2img and name it here",
                param="id_task",
            )
        elif task_id is not None and not self.is_finished(task_id):
            raise TaskNotFound("id_task: no txt2img of this force_task_id is known here", param="id_task")

    def _named(self, task_id: str) -> Body | None:
        return next((body for body in self._under_way if body.task_id == task_id), None)
