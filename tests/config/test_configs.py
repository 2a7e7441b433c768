"""configs/*.yaml: nothing in them that Ray or we would ignore, and replicas that fit the GPUs they name."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from pydantic import BaseModel
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from docs import configuration as config_document
from serve_app.config.serve_file import check_serve_config, unknown_keys
from serve_app.config.settings import APP_NAME, DEPLOYMENTS, AppConfig, check_max_ongoing_requests, parse_config
from serve_app.graph.build import build_app
from serve_app.request.errors import ConfigurationError

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GPU_CONFIGS = ["single-gpu.yaml", "multi-gpu.yaml"]

every_config = pytest.mark.parametrize("name", [path.name for path in CONFIGS])
every_gpu_config = pytest.mark.parametrize("name", GPU_CONFIGS)


@cache
def _text(name: str) -> str:
    (path,) = (path for path in CONFIGS if path.name == name)
    return path.read_text()


def _content(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(_text(name))
    return content


def _application(name: str) -> dict[str, Any]:
    (application,) = _content(name)["applications"]
    return dict(application)


def _replicas(name: str) -> Iterator[tuple[str, float, float]]:
    """Every replica of a configuration: its deployment, its CPUs, its share of a GPU."""
    for options in _application(name)["deployments"]:
        actor = options["ray_actor_options"]
        for _ in range(options["num_replicas"]):
            yield options["name"], actor["num_cpus"], actor.get("num_gpus", 0)


def test_there_are_the_three_configurations() -> None:
    assert {path.name for path in CONFIGS} >= {"demo.yaml", *GPU_CONFIGS}


# What Ray reads.


@every_config
def test_ray_reads_every_key(name: str) -> None:
    ServeDeploySchema.model_validate(_content(name))
    assert list(unknown_keys(_content(name), ServeDeploySchema)) == []


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ([], "proxy_locatoin"),
        (["http_options"], "prot"),
        (["applications", 0], "argz"),
        (["applications", 0, "deployments", 1], "num_replica"),
        (["applications", 0, "deployments", 1, "ray_actor_options"], "num_gpu"),
        (["applications", 0, "deployments", 1, "autoscaling_config"], "min_replica"),
    ],
)
def test_a_misspelt_key_of_rays_is_found(path: list[Any], key: str) -> None:
    content = _content("single-gpu.yaml")
    content["applications"][0]["deployments"][1]["autoscaling_config"] = {"min_replicas": 1}
    place = content
    for step in path:
        place = place[step]
    place[key] = 1
    assert [found.rpartition(".")[2] for found in unknown_keys(content, ServeDeploySchema)] == [key]


# What we read.


@every_config
def test_our_own_reading_takes_it(name: str) -> None:
    config = check_serve_config(_content(name))
    assert set(config.deployments) == set(DEPLOYMENTS)
    assert _application(name)["name"] == APP_NAME


@every_config
@pytest.mark.parametrize("section", ["limits", "base", "base_denoiser", None])
def test_an_unknown_key_of_ours_is_named(name: str, section: str | None) -> None:
    args = copy.deepcopy(_application(name)["args"])
    (args if section is None else args[section])["max_rowz"] = 1
    where = "args.max_rowz" if section is None else f"args.{section}.max_rowz"
    with pytest.raises(ConfigurationError, match=f"^{where}: unknown key$"):
        parse_config(args)


@every_config
def test_binds_the_five_deployments_and_fetches_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise AssertionError("the builder asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    application = build_app(_application(name)["args"])
    assert _bound_names(application) == {options["name"] for options in _application(name)["deployments"]}


def _bound_names(application: Application) -> set[str]:
    deployment = application._bound_deployment
    inner = (argument for argument in deployment.init_args if isinstance(argument, Application))
    return {deployment.name}.union(*(_bound_names(argument) for argument in inner))


@every_config
def test_no_replica_caps_its_batches(name: str) -> None:
    config = parse_config(_application(name)["args"])
    deployments = {options["name"]: options for options in _application(name)["deployments"]}
    # Every ingress replica takes in max_images_in_flight, and all of them may end at one replica of a stage.
    elsewhere = (deployments["Ingress"]["num_replicas"] - 1) * config.limits.max_images_in_flight
    for options in deployments.values():
        allowed = options.get("max_ongoing_requests", config.max_ongoing_requests)
        check_max_ongoing_requests(config, allowed - elsewhere, options["name"])


def test_an_override_that_caps_batches_is_refused() -> None:
    content = _content("single-gpu.yaml")
    content["applications"][0]["deployments"][1]["max_ongoing_requests"] = 47
    with pytest.raises(ConfigurationError, match=r"deployments\.1\.max_ongoing_requests is 47, below 48"):
        check_serve_config(content)
    content["applications"][0]["deployments"][1]["max_ongoing_requests"] = 48
    check_serve_config(content)


@every_config
def test_what_clients_may_ask_for_is_what_rays_proxy_gives(name: str) -> None:
    content = _content(name)
    content["http_options"]["request_timeout_s"] = 30
    with pytest.raises(
        ConfigurationError, match=r"request_timeout_s is 30, args\.http\.request_timeout_s 600: they must"
    ):
        check_serve_config(content)
    content["applications"][0]["args"]["http"] = {"request_timeout_s": 30}
    assert check_serve_config(content).app.http.request_timeout_s == 30
    del content["http_options"]["request_timeout_s"]
    check_serve_config(content)


def test_a_file_alone_does_not_tell_who_reaches_http() -> None:
    """It may be deployed where Serve's proxies run already: the ingress asks them."""
    content = _content("demo.yaml")
    content["http_options"]["host"] = "127.0.0.1"
    assert check_serve_config(content).app.http.loopback is None


@every_gpu_config
def test_an_ingress_replica_outlives_its_requests(name: str) -> None:
    timeout_s = _content(name)["http_options"]["request_timeout_s"]
    drains = {options["name"]: options["graceful_shutdown_timeout_s"] for options in _application(name)["deployments"]}
    assert drains.pop("Ingress") >= timeout_s
    assert min(drains.values()) >= 120


def test_the_gpu_configurations_serve_the_same_published_checkpoints() -> None:
    single, multi = (parse_config(_application(name)["args"]) for name in GPU_CONFIGS)
    assert (single.base, single.refiner, single.vae) == (multi.base, multi.refiner, multi.vae)
    assert single.base.hub_id == "stabilityai/stable-diffusion-xl-base-1.0"
    assert single.base.variant == "fp16"


def test_a_pixel_budget_must_hold_the_largest_picture() -> None:
    limits = {"max_pixels": 10_000, "min_side_px": 64}
    for stage, rows in (("base_denoiser", 2), ("refiner_denoiser", 2), ("vae_decoder", 1)):
        app = {"limits": limits, "refiner": {"path": "embedded:refiner"}}
        parse_config(app | {stage: {"max_batch_pixels": rows * 10_000}})
        with pytest.raises(ConfigurationError, match=f"{stage}.max_batch_pixels is {rows * 10_000 - 1}"):
            parse_config(app | {stage: {"max_batch_pixels": rows * 10_000 - 1}})


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"limits": {"max_steps": 49}}, "limits: max_steps 49 is below the 50 of a request that names none"),
        ({"refiner_denoiser": {}}, "args: refiner_denoiser is given, but refiner is absent"),
        ({"base_denoiser": {"patience": 0}}, "base_denoiser.patience: Input should be greater than or equal to 1"),
    ],
)
def test_settings_that_nothing_would_follow_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)):
        parse_config(args)


def test_the_policy_is_one_of_those_there_are() -> None:
    assert parse_config({"base_denoiser": {"policy": "shortest_remaining"}}).base_denoiser.patience == 100
    with pytest.raises(ConfigurationError, match=r"base_denoiser\.policy"):
        parse_config({"base_denoiser": {"policy": "fastest"}})


# What fits a GPU.

GPU_GIB = 22.0  # what a card sold with 24 GB shows at the least
CONTEXT_GIB = 0.5  # a process's CUDA context, which is in no fraction
MEGAPIXEL = 2**20

# In millions of parameters: the encoders of the base and, in case it can't be shared, of the refiner.
PARAMETERS_M = {
    "TextEncoder": 123.1 + 694.7 + 694.7,
    "BaseDenoiser": 2567.5,
    "Refiner": 2259.5,
    "VaeDecoder": 83.7,
}
# In bfloat16, of one row or picture of 2**20 pixels; of one prompt.
ACTIVATIONS_GIB = {"TextEncoder": 0.0125, "BaseDenoiser": 0.31 / 2, "Refiner": 0.37 / 2, "VaeDecoder": 1.5}


def _needs_gib(stage: str, config: AppConfig) -> float:
    """Weights and the activations of the largest pass that a configuration allows."""
    sections = {
        "TextEncoder": (config.text_encoder, config.text_encoder.max_batch_size),
        "BaseDenoiser": (config.base_denoiser, config.base_denoiser.max_batch_rows),
        "Refiner": (config.refiner_denoiser, config.refiner_denoiser.max_batch_rows),
        "VaeDecoder": (config.vae_decoder, config.vae_decoder.max_batch_size),
    }
    compute, rows = sections[stage]
    width = {"bfloat16": 1, "float32": 2}[compute.dtype]
    pixels = MEGAPIXEL if stage == "TextEncoder" else config.limits.max_pixels
    most = min(rows * pixels, getattr(compute, "max_batch_pixels", None) or rows * pixels)
    weights = PARAMETERS_M[stage] * 1e6 * 2 / 2**30
    return (weights + most / MEGAPIXEL * ACTIVATIONS_GIB[stage]) * width


@every_gpu_config
def test_a_replicas_fraction_covers_its_weights_and_its_largest_pass(name: str) -> None:
    config = parse_config(_application(name)["args"])
    for stage, _, fraction in _replicas(name):
        if stage == "Ingress":
            assert fraction == 0
        else:
            room = GPU_GIB - CONTEXT_GIB if fraction == 1 else fraction * GPU_GIB
            assert _needs_gib(stage, config) <= room, stage


def test_the_single_gpus_fractions_leave_room_for_four_contexts() -> None:
    fractions = [fraction for _, _, fraction in _replicas("single-gpu.yaml") if fraction]
    assert len(fractions) == 4
    assert sum(fractions) <= 1
    assert sum(fractions) * GPU_GIB + 4 * CONTEXT_GIB <= GPU_GIB


@every_gpu_config
def test_a_replica_without_a_gpu_fails_rather_than_computes_on_the_cpu(name: str) -> None:
    config = parse_config(_application(name)["args"])
    stages = (config.text_encoder, config.base_denoiser, config.refiner_denoiser, config.vae_decoder)
    assert {stage.device for stage in stages} == {"cuda"}


def test_the_multi_gpu_replicas_are_the_best_split_of_eight_gpus() -> None:
    seconds = {"BaseDenoiser": 0.685, "Refiner": 0.184, "VaeDecoder": 0.127}  # an image, on an H200
    counts = {options["name"]: options["num_replicas"] for options in _application("multi-gpu.yaml")["deployments"]}

    def images_per_s(base: int, refiner: int, decoder: int) -> float:
        return min(base / seconds["BaseDenoiser"], refiner / seconds["Refiner"], decoder / seconds["VaeDecoder"])

    splits = [(base, refiner, 8 - base - refiner) for base in range(1, 7) for refiner in range(1, 8 - base)]
    assert max(splits, key=lambda split: images_per_s(*split)) == tuple(counts[stage] for stage in seconds)


# Where Ray puts them: actors of the same size on GPUs that it is told are there.

_PLACE = """
import json, sys
import ray

demands, gpus, too_much = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=sum(cpus for _, cpus, _ in demands) + 1, num_gpus=gpus, include_dashboard=False,
         object_store_memory=80 * 2**20, logging_level="ERROR", log_to_driver=False)

@ray.remote
class Replica:
    def gpus(self):
        return ray.get_gpu_ids()

def start(cpus, share):
    actor = Replica.options(num_cpus=cpus, num_gpus=share).remote()
    return actor, actor.gpus.remote()

replicas = [(name, *start(cpus, share)) for name, cpus, share in demands]
placed, _ = ray.wait([where for _, _, where in replicas], num_returns=len(replicas), timeout=500)
_, beyond = start(0.1, too_much)
refused = not ray.wait([beyond], timeout=0.5)[0]
print(json.dumps([refused, [(name, ray.get(where)) for name, _, where in replicas if where in placed]]))
ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.parametrize(("name", "gpus"), [("single-gpu.yaml", 1), ("multi-gpu.yaml", 8)])
def test_ray_finds_a_place_for_every_replica(name: str, gpus: int) -> None:
    demands = list(_replicas(name))
    too_much = round(gpus - sum(share for _, _, share in demands) + 0.01, 4)
    done = subprocess.run(
        [sys.executable, "-c", _PLACE, json.dumps([demands, gpus, too_much])],
        stdout=subprocess.PIPE,
        text=True,
        timeout=700,
        check=True,
    )
    refused, places = json.loads(done.stdout.splitlines()[-1])
    assert refused  # these GPUs are bounded: what does not fit waits
    assert sorted(stage for stage, _ in places) == sorted(stage for stage, _, _ in demands)
    used = [gpu for _, where in places for gpu in where]
    whole = [gpu for (stage, where), (_, _, share) in zip(places, demands, strict=True) if share == 1 for gpu in where]
    assert len(set(used)) == gpus
    assert all(used.count(gpu) == 1 for gpu in whole)  # a UNet with a whole GPU shares it with nobody


def test_the_reference_of_keys_is_what_the_code_takes() -> None:
    document = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert document == config_document.markdown(), "python -m docs.configuration > docs/configuration.md"
    for model in (AppConfig, *(type(value) for value in vars(AppConfig()).values() if isinstance(value, BaseModel))):
        for name, info in model.model_fields.items():
            assert f"| `{name}` |" in document
            assert info.description or isinstance(info.default, BaseModel), f"{model.__name__}.{name} says nothing"


def test_http_that_is_switched_off_stays_off() -> None:
    content = copy.deepcopy(_content("demo.yaml"))
    assert check_serve_config(content).route_prefix == "/"
    content["applications"][0]["route_prefix"] = None
    assert check_serve_config(content).route_prefix is None
