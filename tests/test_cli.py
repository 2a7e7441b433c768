"""The command line: one line for every expected fault, flags from the request's definition."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

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
        (["serve", "--replace"], "sdxl-serve: there is nothing to replace on a Ray of our own"),
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
        (
            lambda c: c["applications"][0]["args"]["vae_decoder"].update(device="cuda"),
            "args.vae_decoder.device: cuda, but the deployment VaeDecoder has no ray_actor_options.num_gpus",
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


@pytest.mark.ray
def test_serve_ends_with_one_line_when_it_cannot(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run("serve", "--port", port)
        assert ended.returncode == 1
        assert f"port {port} on 127.0.0.1: Address already in use" in ended.stderr


BY_HANDLE = """
import ray
from ray import serve
from serve_app.request.schema import ImageRequest

ray.init(address="auto", log_to_driver=False)
handle = serve.get_app_handle("sdxl")
result = handle.generate.remote(ImageRequest(prompt="a kite", seed=3, num_inference_steps=5)).result()
print(result.images[0].seed, result.warnings, result.images[0].to_pil().width)
"""


def outside_of_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.mark.ray
def test_serve_until_sigterm_with_work_under_way(tiny: Path, reference: Reference, tmp_path: Path) -> None:
    """`sdxl-serve serve` in a process of its own: a picture, a handle, another `serve` at its Ray; SIGTERM amid work.

    What is under way ends, a stream too; new work is refused; the process ends with 0.
    """

    def to_tiny(content: dict[str, Any]) -> None:
        args = content["applications"][0]["args"]
        args["base"], args["refiner"] = {"path": str(tiny / "base")}, {"path": str(tiny / "refiner")}

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config, url = written(tmp_path, to_tiny), f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*CLI, "serve", str(config), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=outside_of_ray(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"ready at {url}")
        line = process.stdout.readline()
        assert line.startswith("Python handles: export RAY_ADDRESS=127.0.0.1:") and "RAY_AUTH_MODE=token" in line
        exported = line.removeprefix("Python handles: export ").partition(";")[0].split()
        joining = outside_of_ray() | dict(pair.split("=", 1) for pair in exported)
        fields = {"prompt": "a kite", "seed": 3, "num_inference_steps": 5}
        answer = httpx.get(f"{url}/imagine", params=fields, timeout=60)
        assert answer.status_code == 200
        drawn = np.array(Image.open(io.BytesIO(answer.content)))
        assert far_apart(drawn, reference.draw(parse_request(fields)).pixels) <= 1
        by_handle = subprocess.run(
            [sys.executable, "-c", BY_HANDLE], capture_output=True, text=True, timeout=300, env=joining
        )
        assert by_handle.stdout.strip() == "3 [] 128", by_handle.stderr
        second = subprocess.run(
            [*CLI, "serve", str(config), "--address", joining["RAY_ADDRESS"]],
            capture_output=True, text=True, timeout=300, env=joining,
        )  # fmt: skip
        assert second.returncode == 1
        assert "an application 'sdxl' is there already; --replace" in second.stderr.splitlines()[-1]

        body = {"prompt": "a kite", "num_inference_steps": 100, "size": "128x128", "n": 2}
        with ThreadPoolExecutor(5) as pool:
            plain = [pool.submit(httpx.post, f"{url}/v1/images/generations", json=body, timeout=300) for _ in range(3)]
            streamed = pool.submit(
                httpx.post, f"{url}/v1/images/generations", json=body | {"stream": True}, timeout=300
            )
            while httpx.get(f"{url}/health", timeout=60).json()["images_in_flight"] < 8:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            while (ready := httpx.get(f"{url}/ready", timeout=60)).status_code == 200:
                time.sleep(0.05)
            assert ready.json()["error"]["code"] == "draining"
            refused = httpx.get(f"{url}/imagine", params=fields, timeout=60)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) >= 1
            assert "shutting down" in refused.text
            assert not any(future.done() for future in (*plain, streamed)), "all refused while work was under way"
            for future in plain:
                assert future.result().status_code == 200
                assert len(future.result().json()["data"]) == 2
            assert streamed.result().text.count("event: image_generation.completed") == 2
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            process.kill()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


SIGNALS = """
import sys, time
from serve_app.cli import _Signals

signals = _Signals()
try:
    signals.serving = sys.argv[1] == "serving"
    print("ready", flush=True)
    if sys.argv[1] == "serving":
        signals.wait_for_first()
        print("draining", flush=True)
    time.sleep(60)
finally:
    print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["starting", "serving"])
def test_a_signal_too_many_ends_it_at_once(phase: str, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", SIGNALS, phase], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if phase == "serving":
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "draining\n"
        process.send_signal(number)
        assert process.stdout.readline() == "ended\n", "what was started is ended in an orderly way"
        assert process.wait(timeout=50) == 128 + number
    finally:
        process.kill()


@pytest.mark.ray
def test_a_machine_that_is_too_small_is_told_at_once(tmp_path: Path) -> None:
    """Ray is started, Serve is not."""

    def too_much(content: dict[str, Any]) -> None:
        for options in content["applications"][0]["deployments"]:
            options["ray_actor_options"]["num_gpus"] = 5000

    path = written(tmp_path, too_much)
    ended = run("generate", "x", "--config", str(path), "-o", str(tmp_path / "x.png"), timeout=120)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("sdxl-serve: the deployments book 25000 GPUs (TextEncoder 1 x 5000, BaseDenoiser 1 x 5000")
    assert "Traceback" not in ended.stderr


@pytest.mark.ray
def test_a_deployment_that_fails_is_one_line(tiny: Path, tmp_path: Path) -> None:
    """A fault that only a replica sees: the files pass what is looked at before anything starts."""
    import json
    import shutil

    base = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    config = base / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [8, 8, 8, 32]}))

    def to_broken(content: dict[str, Any]) -> None:
        content["applications"][0]["args"]["base"] = {"path": str(base)}

    ended = run("generate", "x", "--config", str(written(tmp_path, to_broken)), "-o", str(tmp_path / "x.png"))
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("sdxl-serve: VaeDecoder: ")
    assert "decoder.conv_in" in last, "the replica's own words"
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.ray
def test_a_request_that_only_the_graph_can_refuse_is_one_line(tmp_path: Path) -> None:
    ended = run("generate", "x", "--width", "512", "-o", str(tmp_path / "x.png"))
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "sdxl-serve: width: 512 px is outside this service's 64 to 256"
    assert "Traceback" not in ended.stderr
