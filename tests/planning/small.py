"""A made-up machine for the tests of the simulation."""

from __future__ import annotations

from typing import Any

from serve_app.planning.profile import Profile, parse_profile

ROW_S, PASS_S, STEP_S, BEGIN_S, FINISH_S = 0.01, 0.002, 0.001, 0.003, 0.004
DECODE_S, FILE_S, TEXT_S, HOP_S = 0.02, 0.005, 0.001, 0.0015


def content(**changes: Any) -> dict[str, Any]:
    """A profile whose passes take exactly ROW_S a row (decoding: DECODE_S a picture) of 64 x 64 pixels."""
    denoiser: dict[str, Any] = {
        "passes": {"64x64": {"1": ROW_S, "16": 16 * ROW_S}},
        "begin_s": BEGIN_S,
        "pass_s": PASS_S,
        "step_s": STEP_S,
        "finish_s": FINISH_S,
        "max_batch_rows": 4,
    }
    return {
        "made": {"how": "derived", "machine": "none", "dtype": "none", "date": "2025-01-01"},
        "hop_s": HOP_S,
        "encode": {"passes": {"one": {"1": TEXT_S, "8": 8 * TEXT_S}, "two": {"1": TEXT_S, "8": 8 * TEXT_S}}},
        "denoise": denoiser,
        "refine": dict(denoiser),
        "decode": {"passes": {"64x64": {"1": DECODE_S, "8": 8 * DECODE_S}}, "max_batch_size": 2},
        "ingress": {"files": {"64x64": FILE_S}, "threads": 2},
    } | changes


def machine(**changes: Any) -> Profile:
    return parse_profile(content(**changes))


def queue_alone(service_s: float, **changes: Any) -> Profile:
    """One step of one row takes `service_s`, and nothing else takes any time."""
    nothing: dict[str, Any] = {"begin_s": 0, "pass_s": 0, "step_s": 0, "finish_s": 0}
    free = {"64x64": {"1": 0.0}}
    return machine(
        hop_s=0.0,
        encode={"passes": {"one": {"1": 0.0}}},
        denoise={"passes": {"64x64": {"1": service_s, "2": service_s}}, **nothing, "max_batch_rows": 2} | changes,
        decode={"passes": free},
        ingress={"files": {"64x64": 0.0}, "max_images_in_flight": 100_000},
    )
