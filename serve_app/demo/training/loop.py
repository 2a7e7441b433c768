"""The loop that all stages share, and what one may take."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from serve_app.demo.training import ranks

SEED = 20
TRIAL_EVERY = 240


@dataclass
class Stage:
    """How long a stage may take and how it learns; the rate falls to a thirtieth along a cosine."""

    name: str
    steps: int
    minutes: float
    batch: int
    learning_rate: float
    ema_decay: float = 0.998
    feeds: tuple[str, ...] = ()
    """Work files that are stale once this stage trains on."""


class ThreadTuner:
    """Chooses one thread or all, whichever makes steps quicker at present.

    On a machine that is shared, a step on all cores waits for the slowest of them and can take longer than on one.
    """

    def __init__(self, most: int) -> None:
        self.candidates = sorted({1, most})
        self.trial: list[tuple[float, int]] = []
        self.best = most

    def before(self, step: int) -> None:
        """Every so often, 4 steps of each candidate are timed; more threads must be clearly quicker."""
        phase = step % TRIAL_EVERY
        if phase < 4 * len(self.candidates):
            torch.set_num_threads(self.candidates[phase // 4])
        else:
            torch.set_num_threads(self.best)

    def after(self, step: int, seconds: float) -> None:
        phase = step % TRIAL_EVERY
        if phase < 4 * len(self.candidates):
            self.trial.append((seconds, self.candidates[phase // 4]))
        if phase == 4 * len(self.candidates) - 1:
            one, most = (sum(s for s, n in self.trial if n == m) for m in (1, self.candidates[-1]))
            self.best = self.candidates[-1] if most <= 0.85 * one else 1
            self.trial.clear()


class Trainer:
    """The loop that all stages share: schedule, clip, moving average, progress bar, checkpoints, clock."""

    def __init__(self, stage: Stage, modules: nn.ModuleDict, work: Path) -> None:
        self.stage = stage
        self.modules = modules
        self.average = copy.deepcopy(modules).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [p for p in modules.parameters() if p.requires_grad],
            lr=0.0,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
            fused=True,
        )
        self.checkpoint = work / f"{stage.name}.pt"
        self.log = work / f"{stage.name}.jsonl"
        self.step = 0
        self.seconds = 0.0
        self.threads = ThreadTuner(torch.get_num_threads())
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        return max(self.step / self.stage.steps, self.seconds / (60 * self.stage.minutes))

    def run(self, loss_of: Callable[[int], Tensor], save_every: int = 200) -> None:
        """Train until done; `loss_of(step)` draws its own batch, seeded by step and rank."""
        if self.progress < 1:
            for name in self.stage.feeds:
                (self.checkpoint.parent / name).unlink(missing_ok=True)
        quiet = ranks.rank() > 0
        bar = tqdm(total=self.stage.steps, initial=self.step, desc=self.stage.name, mininterval=10, disable=quiet)
        mean_loss = math.nan
        spent = 0.0  # seconds of the last step
        while self.progress < 1:
            started = time.monotonic()
            self.threads.before(self.step)
            rate = self.stage.learning_rate * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(self.progress, 1))))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * min(1.0, (self.step + 1) / 150)
            loss = loss_of(self.step)
            torch.autograd.backward(loss)
            # The clock goes in with the gradients, so that all ranks see the same and end at the same step.
            mean, self.seconds = ranks.average_gradients(self.modules.parameters(), loss.detach(), self.seconds + spent)
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._update_average()
            spent = time.monotonic() - started
            self.threads.after(self.step, spent)
            self.step += 1
            mean_loss = mean if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * mean
            bar.update()
            if self.step % 50 == 0 and not quiet:
                bar.set_postfix(loss=f"{mean_loss:.4f}", minutes=f"{self.seconds / 60:.1f}", refresh=False)
                entry = {"step": self.step, "seconds": round(self.seconds, 1), "loss": round(mean_loss, 5)}
                with self.log.open("a") as log:
                    log.write(json.dumps({**entry, "threads": self.threads.best}) + "\n")
            if self.step % save_every == 0:
                self.save()
        self.save()
        bar.close()

    def _update_average(self) -> None:
        decay = min(self.stage.ema_decay, (1 + self.step) / (10 + self.step))
        average: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(average, [p.detach() for p in self.modules.parameters()], 1 - decay)

    def save(self) -> None:
        if ranks.rank() > 0:
            return
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        record_seconds(self.checkpoint.parent, self.stage.name, self.seconds)
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)


def record_seconds(work: Path, name: str, seconds: float) -> None:
    """Note in `times.json` how long a stage has taken so far, over all runs of the command."""
    path = work / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**times, name: round(seconds, 1)}, indent=2) + "\n")


def half_on(device: torch.device) -> AbstractContextManager[None]:
    """Forward passes in bfloat16, which modern processors and GPUs multiply about twice as fast."""
    return torch.autocast(device.type, torch.bfloat16)
