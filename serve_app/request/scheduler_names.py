"""What other programs call our schedulers.

webui has a sampler and, apart from it, a schedule of the noise levels; older versions and their clients write
both as one name, "DPM++ 2M Karras". Ours are the sampler over evenly spaced timesteps ("Uniform" there), and
DPM++ 2M over Karras's as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import SchedulerName

OUR_NAMES: tuple[SchedulerName, ...] = get_args(SchedulerName)

# diffusers class -> our scheduler that is this class, made without arguments of ours.
DIFFUSERS_CLASSES: dict[str, SchedulerName] = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "HeunDiscreteScheduler": "heun",
    "DDIMScheduler": "ddim",
    "UniPCMultistepScheduler": "unipc",
    "LMSDiscreteScheduler": "lms",
}

UNIFORM, KARRAS, AUTOMATIC = "Uniform", "Karras", "Automatic"


@dataclass(frozen=True)
class WebuiSampler:
    """A sampler as webui names it, and our schedulers for its schedules."""

    name: str
    aliases: tuple[str, ...]
    uniform: SchedulerName
    karras: SchedulerName | None = None
    automatic: str = UNIFORM  # what webui itself takes for the schedule "Automatic"


SAMPLERS: tuple[WebuiSampler, ...] = (
    WebuiSampler("Euler", ("k_euler",), "euler"),
    WebuiSampler("Euler a", ("k_euler_a", "k_euler_ancestral"), "euler_ancestral"),
    WebuiSampler("DPM++ 2M", ("k_dpmpp_2m",), "dpmpp_2m", karras="dpmpp_2m_karras", automatic=KARRAS),
    WebuiSampler("DPM++ 2M SDE", ("k_dpmpp_2m_sde",), "dpmpp_2m_sde", automatic="Exponential"),
    WebuiSampler("Heun", ("k_heun",), "heun"),
    WebuiSampler("DDIM", (), "ddim"),
    WebuiSampler("UniPC", (), "unipc"),
    WebuiSampler("LMS", ("k_lms",), "lms"),
)
SCHEDULES: tuple[str, ...] = (AUTOMATIC, UNIFORM, KARRAS)


@dataclass(frozen=True)
class Found:
    scheduler: SchedulerName
    warnings: tuple[str, ...] = ()


def from_webui(sampler: str, schedule: str | None, param: str = "sampler_name") -> Found:
    """Our scheduler for webui's names. Raises `InvalidRequest` that lists what there is.

    A sampler without a schedule is the plain one, as in webui before it told them apart; "Automatic" is what
    webui itself would take.
    """
    known, within = _sampler(sampler, param)
    wanted = _schedule(schedule)
    if within is not None and wanted not in (None, AUTOMATIC, within):
        raise InvalidRequest(f"scheduler: {wanted} contradicts {param} {sampler[:40]!r}", param="scheduler")
    wanted = within or wanted or UNIFORM
    if wanted == AUTOMATIC:
        wanted = known.automatic
    if wanted == UNIFORM:
        return Found(known.uniform)
    if wanted == KARRAS and known.karras is not None:
        return Found(known.karras)
    if wanted == KARRAS:
        with_karras = ", ".join(sampler.name for sampler in SAMPLERS if sampler.karras is not None)
        raise InvalidRequest(
            f"scheduler: Karras goes with {with_karras} alone in this service, not with {known.name}",
            param="scheduler",
        )
    line = f"scheduler Automatic is Uniform for {known.name} in this service, {wanted} in webui"
    return Found(known.uniform, (line,))


def to_webui(scheduler: SchedulerName) -> tuple[str, str]:
    """webui's sampler and schedule for a scheduler of ours."""
    for sampler in SAMPLERS:
        if scheduler == sampler.uniform:
            return sampler.name, UNIFORM
        if scheduler == sampler.karras:
            return sampler.name, KARRAS
    raise KeyError(scheduler)


def _sampler(name: str, param: str) -> tuple[WebuiSampler, str | None]:
    """The sampler of a name, and the schedule where the name holds one."""
    wanted = name.strip().lower()
    for sampler in SAMPLERS:
        if wanted in (sampler.name.lower(), *sampler.aliases):
            return sampler, None
        if sampler.karras is not None and wanted in (f"{sampler.name.lower()} karras", sampler.karras):
            return sampler, KARRAS
        if wanted == sampler.uniform:
            return sampler, UNIFORM
    names = [name for sampler in SAMPLERS for name in _spellings(sampler)]
    raise InvalidRequest(f"{param}: {name[:40]!r} is unknown; this service has {', '.join(names)}", param=param)


def _spellings(sampler: WebuiSampler) -> list[str]:
    return [sampler.name] if sampler.karras is None else [sampler.name, f"{sampler.name} Karras"]


def _schedule(name: str | None) -> str | None:
    if name is None or not name.strip():
        return None
    for schedule in SCHEDULES:
        if name.strip().lower() == schedule.lower():
            return schedule
    raise InvalidRequest(
        f"scheduler: {name[:40]!r} is not to be had; this service has {', '.join(SCHEDULES)}", param="scheduler"
    )
