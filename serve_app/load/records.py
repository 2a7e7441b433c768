"""What is written down about each request of a benchmark. Every time is in seconds from the start of the run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Record:
    """One request and what came of it.

    `scheduled_s` is when it was due: latency counts from there, so that a generator that falls behind makes
    the figures worse, not better ("coordinated omission"). In a closed loop it is when its client was free.
    """

    place: int
    kind: str
    images: int
    steps: int
    scheduled_s: float
    measured: bool = True  # False: warm-up, or load that only keeps a closed loop full
    deadline_s: float | None = None
    sent_s: float | None = None
    first_byte_s: float | None = None  # the answer's head is there
    first_preview_s: float | None = None  # the first partial image, where streamed
    finished_s: float | None = None  # the whole answer, or what ended it
    status: int | None = None  # HTTP; None where no answer came
    error: str = ""  # one line; empty where every picture came
    retry_after_s: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict)  # as the service reports them

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error and self.finished_s is not None

    @property
    def latency_s(self) -> float | None:
        """From due to finished; None where it failed."""
        return self.finished_s - self.scheduled_s if self.ok and self.finished_s is not None else None
