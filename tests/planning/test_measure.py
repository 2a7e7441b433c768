"""A profile measured from the real stages, over the random-weight checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.cli import main
from serve_app.config.settings import parse_config
from serve_app.planning.measure import Settings, measure
from serve_app.planning.simulate import Replicas, simulate
from serve_app.planning.workload import Ask
from serve_app.request.errors import ConfigurationError

ONE_THREAD = {"device": "cpu", "torch_threads": 1}


def args(tiny: Path, **changes: object) -> dict[str, object]:
    return {
        "base": {"path": str(tiny / "base")},
        "refiner": {"path": str(tiny / "refiner")},
        "text_encoder": ONE_THREAD | {"max_batch_size": 3},
        "base_denoiser": ONE_THREAD | {"max_batch_rows": 6, "policy": "shortest_remaining"},
        "refiner_denoiser": ONE_THREAD | {"max_batch_rows": 2, "max_batch_pixels": 10_000_000},
        "vae_decoder": ONE_THREAD | {"max_batch_size": 1},
    } | changes


def test_every_entry_of_a_profile(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # no neighbours to start
    settings = Settings(sizes=((64, 64), (128, 64)), repeats=1, hop_s=0.5, notes=("for a test",))
    profile = measure(parse_config(args(tiny)), settings, quiet=True)
    assert profile.made.how == "measured" and profile.made.dtype == "float32"
    assert profile.made.notes[-1] == "for a test"
    assert profile.hop_s == 0.5
    assert profile.cores is not None and profile.cores.count == 1
    # The refiner's positive text is read by the base's second encoder, whose files are the same.
    assert {name: list(rows) for name, rows in profile.encode.passes.items()} == {
        "text_encoder": ["1", "2", "3"],
        "text_encoder_2": ["1", "2", "3"],
    }
    assert {size: list(rows) for size, rows in profile.denoise.passes.items()} == {
        "64x64": ["1", "2", "4", "6"],
        "128x64": ["1", "2", "4", "6"],
    }
    assert profile.refine is not None
    assert {size: list(rows) for size, rows in profile.refine.passes.items()} == {
        "64x64": ["1", "2"],
        "128x64": ["1", "2"],
    }
    assert list(profile.decode.passes["128x64"]) == ["1"]
    assert (profile.denoise.max_batch_rows, profile.denoise.policy) == (6, "shortest_remaining")
    assert profile.refine.max_batch_pixels == 10_000_000
    assert all(0 < seconds < 10 for rows in profile.denoise.passes.values() for seconds in rows.values())
    ask = Ask(0.0, steps=10, width=128, height=64, high_noise_frac=0.8)
    assert simulate(profile, Replicas(refine=1), [ask]).records[0].latency_s > 2.5, "five hops"


def test_the_quantile_is_the_one_asked_for() -> None:
    seconds = [0.5, 0.1, 0.3, 0.2, 0.4]
    assert [Settings(quantile=q).of(seconds) for q in (0, 0.25, 0.5, 1)] == [0.1, 0.2, 0.3, 0.5]


@pytest.mark.parametrize(
    ("attempt", "line"),
    [
        (lambda: Settings(repeats=0), "repeats must be at least 1"),
        (lambda: Settings(quantile=1.5), "the quantile within 0 to 1"),
    ],
)
def test_impossible_settings(attempt: Callable[[], object], line: str) -> None:
    with pytest.raises(ConfigurationError, match=line):
        attempt()


def test_processor_time_is_for_one_thread(tiny: Path) -> None:
    config = parse_config(args(tiny, vae_decoder={"device": "cpu"}))
    with pytest.raises(ConfigurationError, match="--cpu-time: every stage must compute on the CPU with torch_threads"):
        measure(config, Settings(cpu_time=True), quiet=True)


def test_faults_of_the_command_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options, line in (
        (["-o", "nowhere/p.json"], "nowhere: no such folder"),
        (["--size", "0x8"], "size 0x8: not WIDTHxHEIGHT in multiples of 8"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ):
        assert main(["profile", *options]) == 1
        assert capsys.readouterr().err.strip() == f"sdxl-serve: {line}"
