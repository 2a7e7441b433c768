"""What a step engine counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PassTimes:
    """What the forward passes of one number of rows took, all told."""

    passes: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0  # that the engine's thread computed: without its waits for a core or a device


@dataclass
class EngineStats:
    """Counters since the start. For tests, metrics and operators."""

    max_rows: int
    passes: int = 0  # forward passes that succeeded
    rows: int = 0  # rows of these passes
    steps: int = 0  # task steps taken
    full_passes: int = 0  # passes that used every row of the budget
    split_passes: int = 0  # passes that raised and were run again in halves
    lowered_budgets: int = 0  # how often the rows of a size were bounded anew, after its pass ran out of memory
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    busy_s: float = 0.0  # time with work, all told
    forward_s: float = 0.0  # of which in forward passes
    max_steps_after_cancel: int = 0  # over all tasks: passes a task was in when its cancellation had arrived
    by_rows: dict[int, PassTimes] = field(default_factory=dict)  # of passes that were not split

    def count_pass(self, rows: int, seconds: float, cpu_s: float) -> None:
        if rows not in self.by_rows:
            self.by_rows = self.by_rows | {rows: PassTimes()}  # a new dict: another thread may be reading this one
        times = self.by_rows[rows]
        times.passes += 1
        times.seconds += seconds
        times.cpu_s += cpu_s
