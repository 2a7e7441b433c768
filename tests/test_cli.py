"""The command line: one line for every expected fault, flags from the request's definition."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from serve_app.cli import DEMO_CONFIG, main
from serve_app.request.schema import ImageRequest, parse_request
from tests.graph.test_parity import far_apart
from tests.reference import Reference

CLI = [sys.executable, "-m", "serve_app.cli"]


def run(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=timeout)


def test_every_field_is_a_flag() -> None:
    text = run("generate", "--help").stdout
    for name in ImageRequest.model_fields:
        assert name == "prompt" or f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate", "x", "--width", "100"], "sdxl-serve: width: input should be a multiple of 8"),
        (["generate", ""], "sdxl-serve: prompt: is empty"),
        (["check", "nowhere.yaml"], "sdxl-serve: nowhere.yaml: No such file or directory"),
        (["generate", "x", "-o", "nowhere/x.png"], "sdxl-serve: nowhere: no such folder"),
        (["generate", "x", "-o", "x.gif"], "sdxl-serve: x.gif: ends in none of .png, .jpg, .jpeg and .webp"),
        (["generate", "x", "-o", "x.jpg", "--output-format", "png"], "sdxl-serve: x.jpg: is no name for a png"),
        (["serve", "--port", "70000"], "sdxl-serve: port 70000 on 127.0.0.1: "),
        (["serve", "--port", "1", "--address", "x:1"], "sdxl-serve: a host and a port are for a Ray of our own"),
        (["generate", "x", "--url", "http://127.0.0.1:9"], "sdxl-serve: http://127.0.0.1:9: "),
    ],
)  # fmt: skip
def test_faults_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(line)


def without_refiner(content: dict[str, Any]) -> None:
    del content["applications"][0]["args"]["refiner"], content["applications"][0]["args"]["refiner_denoiser"]


def written(tmp_path: Path, change: Any) -> Path:
    content = yaml.safe_load(DEMO_CONFIG.read_text())
    change(content)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(DEMO_CONFIG)]) == 0
    assert "fine" in capsys.readouterr().out
    for change, complaint in (
        (lambda c: c["applications"][0]["args"].update(bass={}), "args.bass: unknown key"),
        (lambda c: c["applications"][0]["deployments"][0].update(num_replica=2), "num_replica: unknown key"),
        (lambda c: c["applications"][0]["deployments"][1].update(max_ongoing_requests=5), "cap batches silently"),
        (lambda c: c["applications"][0].update(import_path="other:app"), "import_path: 'other:app'"),
        (without_refiner, "Refiner, but args.refiner is absent"),
        (
            lambda c: c["applications"][0]["args"]["limits"].update(max_side_px=8),
            "min_side_px 64 is above max_side_px 8",
        ),
        (
            lambda c: c["applications"][0]["args"].update(base={"path": "embedded:bass"}),
            "names nothing",
        ),
        (lambda c: c["applications"][0]["args"].update(base={"path": "/nowhere"}), "/nowhere: no such folder"),
        (lambda c: c["applications"][0]["args"].update(base={"hub_id": "a/b", "revision": "main"}), "40 hex digits"),
    ):
        assert main(["check", str(written(tmp_path, change))]) == 1
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: c["applications"][0].update(runtime_env={"env_vars": {"A": "1"}}), "runtime_env"),
        (
            lambda c: c["applications"][0]["deployments"][1].update(rolling_update_percentage=0.5),
            "deployments.1.rolling_update_percentage",
        ),
    ],
)
def test_serve_refuses_what_only_rays_own_way_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, key: str
) -> None:
    path = written(tmp_path, change)
    assert main(["check", str(path)]) == 0
    assert main(["serve", str(path)]) == 1
    assert f"applications.0.{key}: not supported here" in capsys.readouterr().err


def test_serve_ends_with_one_line_when_it_cannot(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run("serve", "--port", port)
        assert ended.returncode == 1
        assert f"port {port} on 127.0.0.1: Address already in use" in ended.stderr


BY_HANDLE = """
import sys, ray
from ray import serve
from serve_app.request.schema import ImageRequest

ray.init(address=sys.argv[1], log_to_driver=False)
handle = serve.get_app_handle("sdxl")
result = handle.generate.remote(ImageRequest(prompt="a kite", seed=3, num_inference_steps=5)).result()
print(result.images[0].seed, result.warnings, result.images[0].to_pil().width)
"""


def test_serve_and_generate_in_processes_of_their_own(tiny: Path, reference: Reference, tmp_path: Path) -> None:
    """`sdxl-serve serve` until SIGINT, with a picture drawn while it is up; then a clean end."""

    def to_tiny(content: dict[str, Any]) -> None:
        args = content["applications"][0]["args"]
        args["base"], args["refiner"] = {"path": str(tiny / "base")}, {"path": str(tiny / "refiner")}

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [*CLI, "serve", str(written(tmp_path, to_tiny)), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        # As from a terminal: a shell's background jobs, and so what they start, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"ready at http://127.0.0.1:{port}")
        ray_address = process.stdout.readline().split('"')[1]
        fields = {"prompt": "a kite", "seed": 3, "num_inference_steps": 5}
        answer = httpx.get(f"http://127.0.0.1:{port}/imagine", params=fields, timeout=60)
        assert answer.status_code == 200
        picture = tmp_path / "kite.png"
        picture.write_bytes(answer.content)
        by_handle = subprocess.run(
            [sys.executable, "-c", BY_HANDLE, ray_address],
            capture_output=True, text=True, timeout=300, env=environment | {"RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip
        assert by_handle.stdout.strip() == "3 [] 128", by_handle.stderr
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=300)
    assert code == 0
    from PIL import Image

    assert far_apart(np.array(Image.open(picture)), reference.draw(parse_request(fields)).pixels) <= 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def test_a_deployment_that_fails_is_one_line(tiny: Path, tmp_path: Path) -> None:
    """A fault that only a replica can see: the folder's files pass every check, the weights don't load."""
    import json
    import shutil

    base = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    config = base / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [8, 8, 8, 32]}))

    def to_broken(content: dict[str, Any]) -> None:
        content["applications"][0]["args"]["base"] = {"path": str(base)}

    ended = run("generate", "x", "--config", str(written(tmp_path, to_broken)), "-o", str(tmp_path / "x.png"))
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("sdxl-serve: ")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "x.png").exists()


def test_a_request_that_only_the_graph_can_refuse_is_one_line(tmp_path: Path) -> None:
    ended = run("generate", "x", "--width", "512", "-o", str(tmp_path / "x.png"))
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "sdxl-serve: width: 512 px is outside this service's 64 to 256"
    assert "Traceback" not in ended.stderr
