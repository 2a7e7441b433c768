"""`sdxl-serve bench`: its output, and one line for every contradiction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from serve_app.cli import main
from serve_app.load import report
from tests.load.server import FakeService, serving


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "exactly one of --concurrency, --rate and --burst is needed, got none"),
        ("--concurrency 2 --rate 1", "exactly one of --concurrency, --rate and --burst is needed, got --concurrency"),
        ("--burst 8", "--burst and --every-s: go together"),
        ("--rate 1 --every-s 3", "--burst and --every-s: go together"),
        ("--concurrency 0", "--concurrency 0: is not above zero"),
        ("--rate -1", "--rate -1: is not above zero"),
        ("--rate nan", "--rate nan: is not above zero"),
        ("--burst 2 --every-s 0", "--every-s 0: is not above zero"),
        ("--concurrency 1 --requests 0", "--requests 0: is not above zero"),
        ("--concurrency 1 --duration-s 0", "--duration-s 0: is not above zero"),
        ("--concurrency 1 --slo-s 0", "--slo-s 0: is not above zero"),
        ("--concurrency 1 --warmup -1", "--warmup -1: is negative"),
        ("--concurrency 1 --warmup 64", "--warmup 64: leaves nothing to measure of 64 requests"),
        ("--rate 1 --steady", "--steady: goes with --concurrency"),
        ("--rate 1 --partial-images 2", "--partial-images: goes with --stream"),
        ("--rate 1 --stream --partial-images 4", "--partial-images 4: is not 0 to 3"),
        ("--rate 1 --records", "--records: goes with --json"),
        ("--rate 1 --json nowhere/x.json", "nowhere: no such folder"),
        ("--rate 1 --plot x.jpg", "x.jpg: does not end in .png"),
        ("--rate 1 --mix mixt", "--mix mixt: is none of mixed, presets, "),
        ("--rate 1 --mix nowhere.yaml", "nowhere.yaml: No such file or directory"),
        ("--rate 1 --url http://127.0.0.1:9", "http://127.0.0.1:9: ConnectError: "),
        ("--rate 1 --url localhost:8000", "localhost:8000: not an http:// or https:// address"),
    ],
)
def test_contradictions_are_one_line(flags: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags.split()]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"sdxl-serve: {line}")
    assert len(error.replace("\r", "\n").strip().splitlines()) == 1


def test_a_plot_without_matplotlib_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--rate", "1", "--plot", "x.png"]) == 1
    assert capsys.readouterr().err == "sdxl-serve: a plot needs matplotlib: pip install 'sdxl-serve[bench]'\n"


@pytest.mark.parametrize("content", ["kinds: [", "kinds:\n- {num_inference_steps: [5], size: 3}\n", "3"])
def test_a_wrong_profile_file_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(content)
    assert main(["bench", "--rate", "1", "--mix", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sdxl-serve: {path}: ") and error.count("\n") == 1


def test_a_run_writes_its_table_its_json_and_its_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = tmp_path / "mix.json"
    kinds = [{"name": "fine", "num_inference_steps": [5]}, {"name": "other", "num_inference_steps": [6]}]
    mix.write_text(json.dumps({"kinds": kinds}))
    document, picture = tmp_path / "run.json", tmp_path / "run.png"
    flags = ["--concurrency", "3", "--requests", "12", "--warmup", "2", "--slo-s", "5", "--seed", "3"]
    flags += ["--mix", str(mix), "--json", str(document), "--records", "--plot", str(picture)]
    with serving(FakeService(denoise_s=0.02)) as service:
        code = main(["bench", "--url", service.url, *flags])
    assert code == 0
    out = capsys.readouterr().out
    assert "10 of 10 succeeded" in out and "100.0% within 5 s" in out
    for row in ("latency", "latency of fine", "latency of other", "queue", "encode", "denoise", "refine", "decode"):
        assert any(line.startswith(row) for line in out.splitlines()), row
    assert "first preview" not in out  # nothing was streamed
    content = json.loads(document.read_text())
    assert content["summary"]["succeeded"] == 10 and content["summary"]["slo_attainment"] == 1.0
    assert content["settings"]["concurrency"] == 3 and content["settings"]["seed"] == 3
    assert content["settings"]["mix_content"]["kinds"][1]["num_inference_steps"] == [6]
    assert len(content["records"]) == 12 and content["records"][0]["measured"] is False
    with Image.open(picture) as image:
        assert image.width > 800 and len(image.convert("L").getcolors() or []) > 20


def test_nothing_succeeded_is_a_failure_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text("prompts: [full]\nkinds:\n- num_inference_steps: {first: 5, last: 9}\n")
    with serving(FakeService()) as service:
        code = main(["bench", "--url", service.url, "--rate", "50", "--requests", "3", "--mix", str(mix)])
    assert code == 1
    captured = capsys.readouterr()
    assert "failed 3 times: HTTP 503: the service is full" in captured.out
    assert captured.err.splitlines()[-1] == "sdxl-serve: no request succeeded"


def test_the_command_line_loads_none_of_it_until_it_is_used() -> None:
    unwanted = ("httpx", "tqdm", "matplotlib", "yaml")
    script = f"import sys, serve_app.cli; print(*[name for name in {unwanted!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"
