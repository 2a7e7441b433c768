"""Which images take part in the next UNet forward pass: pure, deterministic policy over plain data.

It knows nothing of tensors, threads or Ray. A job is one image's stay in a denoiser; it takes rows of
every pass it is in until its owner removes it. Guidance, step number, step count, scheduler and seed may all
differ within a pass; what must be equal is the job's `key`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One image in a denoiser. `key`: what a forward pass can't mix (latent shape, conditioning length)."""

    id: str
    key: Hashable
    rows: int


@dataclass(frozen=True)
class Batch:
    """The jobs of one forward pass, in order, and the rows they take together."""

    jobs: tuple[Job, ...]
    rows: int


class StepScheduler:
    """Fills passes of up to `max_rows` rows.

    Within a key jobs go in order of arrival, and the oldest keep their place until they are done; a
    one-row job may fill a row that a two-row job can't. Keys take turns, a pass each, so that no
    shape starves another.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}, below 1")
        self.max_rows = max_rows
        self._turns: OrderedDict[Hashable, OrderedDict[str, Job]] = OrderedDict()
        self._keys: dict[str, Hashable] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, job: Job) -> None:
        """Takes a job in; it may be part of the very next pass."""
        if job.id in self._keys:
            raise ValueError(f"job {job.id} is here already")
        if not 1 <= job.rows <= self.max_rows:
            raise ValueError(f"job {job.id} takes {job.rows} rows, a pass has {self.max_rows}")
        self._keys[job.id] = job.key
        self._turns.setdefault(job.key, OrderedDict())[job.id] = job

    def remove(self, job_id: str) -> None:
        """Drops a job: finished, failed or cancelled. Its rows are free from the next pass on."""
        key = self._keys.pop(job_id)
        jobs = self._turns[key]
        del jobs[job_id]
        if not jobs:
            del self._turns[key]

    def next_batch(self) -> Batch | None:
        """The next pass, None when there is nothing to do. Ends the turn of its key."""
        if not self._turns:
            return None
        key, jobs = next(iter(self._turns.items()))
        self._turns.move_to_end(key)
        chosen: list[Job] = []
        rows = 0
        for job in jobs.values():
            if rows + job.rows <= self.max_rows:
                chosen.append(job)
                rows += job.rows
            if rows == self.max_rows:
                break
        return Batch(tuple(chosen), rows)
