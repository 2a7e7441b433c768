"""The schedulers that a request can name: one table of what each is to diffusers and to every format.

A scheduler is diffusers' class made from the checkpoint's own configuration, with the arguments beside it. webui has a
sampler and, apart from it, a schedule of the noise levels; older versions of it and their clients write both as one
name, "DPM++ 2M Karras".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from serve_app.request.errors import InvalidRequest

SchedulerName = Literal[
    "euler",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "heun",
    "ddim",
    "unipc",
    "lms",
]
NAMES: tuple[SchedulerName, ...] = get_args(SchedulerName)

UNIFORM, KARRAS, AUTOMATIC = "Uniform", "Karras", "Automatic"
SCHEDULES: tuple[str, ...] = (AUTOMATIC, UNIFORM, KARRAS)
"""webui's schedules of the noise levels."""


@dataclass(frozen=True)
class Scheduler:
    """A row of the table.

    Attributes:
        name: ours.
        diffusers_class: its name in `diffusers.schedulers`.
        sampler: webui's name, and with `schedule` all of it.
        aliases: k-diffusion's names for the sampler, which webui takes as well.
        stability: Stability's name, None where that API has none.
        arguments: what goes beside the checkpoint's own scheduler configuration.
        automatic: the schedule that webui itself takes for "Automatic".
        takes_eta: SDXL's `eta` acts in its step.
        ancestral: it adds noise in every step; webui's eta of 1 is what it does anyway.
        over_sigmas: it holds latents as x / alpha and scales the model's input back.
        one_more: it leaves out the last of n + 1 timesteps (of "leading" and "linspace" spacing).
        whole: its timesteps are whole numbers where the spacing is "linspace".
        own_timesteps: its timesteps ignore the noise levels that the checkpoint's configuration asks for.
        in_refiner: what to know of it where it goes on in the refiner.
    """

    name: SchedulerName
    diffusers_class: str
    sampler: str
    aliases: tuple[str, ...] = ()
    stability: str | None = None
    schedule: str = UNIFORM
    arguments: Mapping[str, Any] = field(default_factory=dict)
    automatic: str = UNIFORM
    takes_eta: bool = False
    ancestral: bool = False
    over_sigmas: bool = False
    one_more: bool = False
    whole: bool = True
    own_timesteps: bool = False
    in_refiner: str | None = None

    @property
    def label(self) -> str:
        """What a person reads: webui's name of sampler and schedule in one."""
        return self.sampler if self.schedule == UNIFORM else f"{self.sampler} {self.schedule}"


_LMS_IN_REFINER = (
    "starts the refiner with coefficients of order 4 over one derivative, as diffusers does: "
    "its first step is too long; high_noise_frac 1 avoids it"
)
SCHEDULERS: tuple[Scheduler, ...] = (
    Scheduler("euler", "EulerDiscreteScheduler", "Euler", ("k_euler",), "K_EULER", over_sigmas=True, whole=False),
    Scheduler(
        "euler_ancestral",
        "EulerAncestralDiscreteScheduler",
        "Euler a",
        ("k_euler_a", "k_euler_ancestral"),
        "K_EULER_ANCESTRAL",
        ancestral=True,
        over_sigmas=True,
        whole=False,
        own_timesteps=True,
    ),
    Scheduler(
        "dpmpp_2m",
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        ("k_dpmpp_2m",),
        "K_DPMPP_2M",
        automatic=KARRAS,
        one_more=True,
    ),
    Scheduler(
        "dpmpp_2m_karras",
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        ("k_dpmpp_2m",),
        schedule=KARRAS,
        arguments={"use_karras_sigmas": True},
        automatic=KARRAS,
        one_more=True,
        own_timesteps=True,
    ),
    Scheduler(
        "dpmpp_2m_sde",
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        ("k_dpmpp_2m_sde",),
        arguments={"algorithm_type": "sde-dpmsolver++"},
        automatic="Exponential",
        one_more=True,
    ),
    Scheduler("heun", "HeunDiscreteScheduler", "Heun", ("k_heun",), "K_HEUN", over_sigmas=True, whole=False),
    Scheduler("ddim", "DDIMScheduler", "DDIM", (), "DDIM", takes_eta=True, own_timesteps=True),
    Scheduler("unipc", "UniPCMultistepScheduler", "UniPC", one_more=True),
    Scheduler(
        "lms",
        "LMSDiscreteScheduler",
        "LMS",
        ("k_lms",),
        "K_LMS",
        over_sigmas=True,
        whole=False,
        in_refiner=_LMS_IN_REFINER,
    ),
)
BY_NAME: dict[str, Scheduler] = {scheduler.name: scheduler for scheduler in SCHEDULERS}
BY_CLASS: dict[str, Scheduler] = {
    scheduler.diffusers_class: scheduler for scheduler in SCHEDULERS if not scheduler.arguments
}
"""By diffusers' class, of those that take no arguments of ours."""
BY_STABILITY: dict[str, Scheduler] = {
    row.stability: row for row in sorted(SCHEDULERS, key=lambda row: row.stability or "") if row.stability is not None
}
CLASSES_WITH_ETA = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "TCDScheduler",
}
"""diffusers' classes whose step takes SDXL's `eta`: a checkpoint's own scheduler may be any of them."""


def find(name: str) -> Scheduler | None:
    """The scheduler of a name of ours, or of diffusers' class of a checkpoint's own; None for one not in the table."""
    return BY_NAME.get(name) or BY_CLASS.get(name)


def takes_eta(name: str) -> bool:
    """Whether `eta` acts in the step of a scheduler: a name of ours, or diffusers' class of a checkpoint's own."""
    scheduler = BY_NAME.get(name)
    return name in CLASSES_WITH_ETA if scheduler is None else scheduler.takes_eta


@dataclass(frozen=True)
class Found:
    """A scheduler that another program's names mean; None is the checkpoint's own."""

    scheduler: SchedulerName | None
    warnings: tuple[str, ...] = ()


def from_webui(sampler: str, schedule: str | None, param: str = "sampler_name") -> Found:
    """Our scheduler for webui's names. Raises `InvalidRequest` that lists what there is.

    A sampler without a schedule is the plain one, as in webui before it told them apart; "Automatic" is what
    webui itself would take. The sampler "Automatic", a name of ours, is the checkpoint's own scheduler.
    """
    wanted = _schedule(schedule)
    if sampler.strip().lower() == AUTOMATIC.lower():
        if wanted in (None, AUTOMATIC):
            return Found(None)
        raise InvalidRequest(
            f"scheduler: {wanted} goes with a sampler by name, {param} Automatic is the checkpoint's own",
            param="scheduler",
        )
    named, within = _sampler(sampler, param)
    if within is not None and wanted not in (None, AUTOMATIC, within):
        raise InvalidRequest(f"scheduler: {wanted} contradicts {param} {sampler[:40]!r}", param="scheduler")
    wanted = within or wanted or UNIFORM
    if wanted == AUTOMATIC:
        wanted = named[0].automatic
    for scheduler in named:
        if scheduler.schedule == wanted:
            return Found(scheduler.name)
    label = named[0].sampler
    if wanted == KARRAS:
        with_karras = ", ".join(scheduler.sampler for scheduler in SCHEDULERS if scheduler.schedule == KARRAS)
        raise InvalidRequest(
            f"scheduler: Karras goes with {with_karras} alone in this service, not with {label}", param="scheduler"
        )
    line = f"scheduler Automatic is Uniform for {label} in this service, {wanted} in webui"
    return Found(named[0].name, (line,))


def to_webui(name: SchedulerName | None) -> tuple[str, str]:
    """webui's sampler and schedule for a scheduler of ours; "Automatic" for the checkpoint's own."""
    if name is None:
        return AUTOMATIC, AUTOMATIC
    return BY_NAME[name].sampler, BY_NAME[name].schedule


def samplers() -> dict[str, tuple[Scheduler, ...]]:
    """The schedulers by webui's sampler, the plain schedule first."""
    return {
        scheduler.sampler: tuple(other for other in SCHEDULERS if other.sampler == scheduler.sampler)
        for scheduler in SCHEDULERS
    }


def _sampler(name: str, param: str) -> tuple[tuple[Scheduler, ...], str | None]:
    """The schedulers of a sampler's name, the plain one first, and the schedule where the name holds one."""
    wanted = name.strip().lower()
    for label, schedulers in samplers().items():
        if wanted in (label.lower(), *schedulers[0].aliases):
            return schedulers, None
        for scheduler in schedulers:
            if wanted in (scheduler.label.lower(), scheduler.name):
                return schedulers, scheduler.schedule
    names = [AUTOMATIC, *(scheduler.label for scheduler in SCHEDULERS)]
    raise InvalidRequest(f"{param}: {name[:40]!r} is unknown; this service has {', '.join(names)}", param=param)


def _schedule(name: str | None) -> str | None:
    if name is None or not name.strip():
        return None
    for schedule in SCHEDULES:
        if name.strip().lower() == schedule.lower():
            return schedule
    raise InvalidRequest(
        f"scheduler: {name[:40]!r} is unknown; this service has {', '.join(SCHEDULES)}", param="scheduler"
    )
