"""The search finds what trying everything finds; the command line says what is wrong in one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from serve_app.cli import main
from serve_app.planning.plan import find_plan, keeps, least_replicas
from serve_app.planning.simulate import Replicas, Run, simulate
from serve_app.planning.workload import Ask, Mix, closed_loop, poisson
from serve_app.request.errors import ConfigurationError
from tests.planning.small import content, machine

SMALL = ((64, 64),)


@pytest.mark.parametrize(("rate", "p99_s"), [(9, 1.0), (25, 0.6), (25, 1.0)])
def test_the_plan_is_the_smallest_of_all(rate: float, p99_s: float) -> None:
    profile = machine()
    asks = poisson(Mix(steps=(4, 12), sizes=SMALL), rate, 500, seed=2)
    tried: list[Replicas] = []

    def tell(replicas: Replicas, run: Run) -> None:
        tried.append(replicas)

    found = find_plan(profile, asks, p99_s, rate=rate, tell=tell)
    assert keeps(found.run, p99_s)
    assert found.tried == len(tried) == len(set(tried))
    smaller = [
        Replicas(denoise=denoise, decode=decode)
        for denoise, decode in itertools.product(range(1, found.replicas.total), repeat=2)
        if denoise + decode + 2 < found.replicas.total
    ]
    assert smaller, "a case where there is something to save"
    assert not any(keeps(simulate(profile, replicas, asks), p99_s) for replicas in smaller)


def test_a_plan_for_a_closed_loop_with_the_refiner() -> None:
    profile = machine()
    asks = closed_loop(Mix(steps=(10, 10), sizes=SMALL, high_noise_frac=0.5), 400, seed=2)
    found = find_plan(profile, asks, 1.0, concurrency=16)
    assert keeps(found.run, 1.0)
    for stage in ("denoise", "refine", "decode"):
        count = getattr(found.replicas, stage)
        if count > 1:
            fewer = Replicas(**{**vars(found.replicas), stage: count - 1})
            assert not keeps(simulate(profile, fewer, asks, concurrency=16), 1.0), f"{stage} can spare none"
    assert found.replicas.denoise > 1


def test_utilisation_alone_asks_for_that_many() -> None:
    asks = poisson(Mix(steps=(10, 10), sizes=SMALL), 10, 100, seed=0)
    # 0.222 s of denoising, 0.02 s of decoding an image: 2.22 and 0.2 replicas at 10 a second.
    assert least_replicas(machine(), asks, 10, None) == Replicas(denoise=3)
    assert least_replicas(machine(), asks, 100, None) == Replicas(denoise=23, decode=3)
    crowd = closed_loop(Mix(n=(4, 4), sizes=SMALL), 10, seed=0)
    assert least_replicas(machine(), crowd, None, 40) == Replicas(ingress=2)


def test_what_no_number_of_replicas_can_do() -> None:
    asks = poisson(Mix(steps=(10, 10), sizes=SMALL), 10, 400, seed=0)
    with pytest.raises(ConfigurationError, match=r"p99: 0\.1 s is out of reach: alone in the service a request takes"):
        find_plan(machine(), asks, 0.1, rate=10)
    shared = machine(cores={"count": 2})
    with pytest.raises(ConfigurationError, match=r"takes 2\.\d+ cores even in full passes, the machine has 2"):
        find_plan(shared, asks, 10, rate=10)


def written(tmp_path: Path) -> str:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(content()))
    return str(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    command = ["plan", "--profile", written(tmp_path), "--rate", "9", "--p99", "1", "--json", str(figures)]
    assert main([*command, "--steps", "4-12", "--size", "64x64", "--requests", "500"]) == 0
    printed = capsys.readouterr()
    found = json.loads(figures.read_text())
    assert f"denoise  {found['replicas']['denoise']:8d}" in printed.out
    assert f"{found['latency_s']['p99']:.3f}" in printed.out
    assert printed.err.count("p99") == found["settings_tried"]
    assert found["latency_s"]["p99"] <= 1
    assert found["refused"] == 0
    assert "extrapolated" not in printed.out


def test_only_simulating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    command = ["plan", "--profile", written(tmp_path), "--concurrency", "4", "--simulate", "denoise=2, refine=3"]
    options = ["--size", "128x64", "--n", "1-3", "--no-guidance", "--high-noise-frac", "0.8", "--refiner-share", "0.5"]
    assert main([*command, *options, "--requests", "50", "--policy", "shortest_remaining", "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "note: 128x64 is outside the profile's sizes: its times are extrapolated" in printed
    found = json.loads(figures.read_text())
    assert found["replicas"] == {"encode": 1, "denoise": 2, "refine": 3, "decode": 1, "ingress": 1}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--p99 1", "give one of --rate (an open loop) and --concurrency (a closed one)"),
        ("--p99 1 --rate 1 --concurrency 1", "give one of --rate (an open loop) and --concurrency (a closed one)"),
        ("--rate 1", "give one of --p99 (how many replicas?) and --simulate (how fast are these?)"),
        ("--rate 1 --p99 1 --simulate denoise=1", "give one of --p99"),
        ("--concurrency 4 --p99 1 --burst 2", "--burst is of an open loop: it goes with --rate"),
        ("--rate 1 --p99 1 --steps 50-10", "--steps 50-10: must lie within 1 to 500, the smaller number first"),
        ("--rate 1 --p99 1 --steps many", "--steps many: neither a number nor a range as 10-50"),
        ("--rate 1 --p99 1 --n 11", "--n 11: must lie within 1 to 10"),
        ("--rate 1 --p99 1 --size 100x100", "size 100x100: not WIDTHxHEIGHT in multiples of 8"),
        ("--rate 1 --p99 1 --refiner-share 0.5", "--refiner-share: --high-noise-frac is 1 and leaves the refiner"),
        ("--rate 1 --simulate denoise=1,refine=1", "--simulate: refine has nothing to do, --high-noise-frac is 1"),
        ("--rate 1 --simulate denoise=1,denoise=2", "--simulate: denoise is given twice"),
        ("--rate 1 --simulate gpu=1", "--simulate 'gpu=1': not one of encode=N, denoise=N, refine=N, decode=N, ing"),
        ("--rate 1 --simulate denoise=0", "denoise: 0 replicas, and there is work for it"),
        ("--rate 1 --p99 1 --cores 2", "--cores 2: in "),
        ("--rate 1 --p99 1 --cores many", "--cores many: neither a number of cores nor `own`"),
        ("--rate 1 --p99 0.01 --size 64x64", "p99: 0.01 s is out of reach"),
        ("--rate 1 --p99 1 --json nowhere/x.json", "nowhere: no such folder"),
    ],
)
def test_contradictions_are_one_line(
    options: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--profile", written(tmp_path), *options.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sdxl-serve: {line}")
    assert error.count("\n") == 1


def test_the_calls_between_deployments_count_on_shared_cores() -> None:
    """Five calls a request, 0.2 s beside each: more than one core a request a second."""
    asks = [Ask(0.0, steps=2, width=64, height=64, high_noise_frac=0.8)] * 20
    free, busy = (machine(cores={"count": 1, "beside_s": beside_s}) for beside_s in (0.0, 0.2))
    assert least_replicas(free, asks, 1.0, None).denoise == 1
    with pytest.raises(ConfigurationError, match=r"takes 1\.\d+ cores even in full passes, the machine has 1"):
        least_replicas(busy, asks, 1.0, None)
