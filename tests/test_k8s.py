"""k8s/: manifests that kustomize builds and KubeRay's own schema takes, rendered from configs/; image and weights."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app import __version__
from serve_app.config.serve_file import check_serve_config
from serve_app.config.settings import ModelSource
from serve_app.models import checkpoint
from tests.manifests import CONFIG_OF, K8S, ROOT, built, every_variant, groups, load_all, rayservice, serve_config

CRD = os.environ.get("RAYSERVICE_CRD")

needs_crd = pytest.mark.skipif(not CRD, reason="RAYSERVICE_CRD does not name KubeRay's schema of a RayService")


@pytest.mark.parametrize("folder", [*CONFIG_OF, "weights", "components/monitoring"])
def test_every_file_a_kustomization_lists_is_there(folder: str) -> None:
    home = K8S / folder
    (kustomization,) = load_all((home / "kustomization.yaml").read_text())
    listed = [*kustomization["resources"]]
    listed += [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
    listed += [file for part in kustomization.get("configMapGenerator", []) for file in part["files"]]
    assert listed
    assert [name for name in listed if not (home / name).exists()] == []
    there = {path.name for path in home.iterdir() if path.is_file()} - {"kustomization.yaml"}
    assert there <= set(listed)  # and nothing lies there unused


@pytest.mark.parametrize("folder", [*CONFIG_OF, "weights"])
def test_kustomize_builds_what_these_tests_read(folder: str) -> None:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if not shutil.which(command[0]):
        pytest.skip("neither kustomize nor kubectl is at hand")
    done = subprocess.run([*command, str(K8S / folder)], stdout=subprocess.PIPE, text=True, check=True)
    found = {document["kind"]: document for document in load_all(done.stdout)}
    expected = {document["kind"]: document for document in built(folder)}
    assert set(found) - {"ConfigMap"} == set(expected)
    if "RayService" in found:
        text = yaml.safe_dump(found["RayService"]).replace(f"image: sdxl-serve:{__version__}", "image: sdxl-serve")
        assert yaml.safe_load(text) == expected["RayService"]


# The schema that the API server holds a RayService against.


@cache
def _schema() -> dict[str, Any]:
    assert CRD is not None
    (crd,) = load_all(Path(CRD).read_text())
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema: dict[str, Any] = _closed(version["schema"]["openAPIV3Schema"])
    return schema


def _closed(schema: Any) -> Any:
    """The schema with its objects closed, as `kubectl apply --validate=strict` treats them."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    # Below `properties` the keys are names of fields, whatever they are called.
    closed = {
        key: {name: _closed(field) for name, field in value.items()} if key == "properties" else _closed(value)
        for key, value in schema.items()
    }
    if "properties" in closed and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def _faults(service: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(_schema()).iter_errors(service)
    return [f"{error.json_path}: {error.message}" for error in found]


@needs_crd
@every_variant
def test_kuberay_takes_the_rayservice(variant: str) -> None:
    assert _faults(rayservice(variant)) == []


@needs_crd
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/serveConfig", "applications: []"),
        ("spec/rayClusterConfig/headGroupSpecs", {}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/minReplica", 1),
        ("spec/rayClusterConfig/workerGroupSpecs/0/maxReplicas", "2"),
        ("spec/rayClusterConfig/workerGroupSpecs/0/template/spec/terminationGracePeriod", 630),
        ("spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/resources/limit", {"cpu": 1}),
        ("spec/rayClusterConfig/gcsFaultToleranceOptions/redisPassword/secretKeyRef", {}),
        ("spec/rayClusterConfig/autoscalerOptions/version", "v3"),
    ],
)
def test_the_schema_finds_a_typo(path: str, value: Any) -> None:
    service = rayservice("base")
    place: Any = service
    *parents, last = path.split("/")
    for step in parents:
        place = place[int(step) if step.isdecimal() else step]
    place[last] = value
    (fault,) = _faults(service)
    assert last in fault


# What is rendered.


@pytest.fixture
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", K8S / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_committed_is_what_render_writes(render: ModuleType) -> None:
    assert render.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("source", "stale"),
    [
        ("configs/single-gpu.yaml", ["k8s/base/rayservice.yaml"]),
        ("configs/multi-gpu.yaml", ["k8s/overlays/multi-gpu/serve-config.yaml"]),
        ("k8s/rayservice.template.yaml", ["k8s/base/rayservice.yaml"]),
    ],
)
def test_check_names_what_a_change_made_stale(
    source: str,
    stale: list[str],
    render: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("configs", "k8s"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(render, "K8S", tmp_path / "k8s")
    monkeypatch.setattr(render, "CONFIGS", tmp_path / "configs")
    assert render.main(["--check"]) == 0
    changed = tmp_path / source
    changed.write_text(
        changed.read_text().replace("maxReplicas: 2", "maxReplicas: 3").replace("port: 8000", "port: 8001")
    )
    assert render.main(["--check"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == stale
    assert render.main([]) == 0
    assert render.main(["--check"]) == 0


@every_variant
def test_the_serve_configuration_is_the_file_but_for_address_proxies_and_hosts(variant: str) -> None:
    rendered = serve_config(variant)
    ServeDeploySchema.model_validate(rendered)
    check_serve_config(rendered)
    assert rendered["http_options"]["host"] == "0.0.0.0"
    assert rendered["proxy_location"] == "EveryNode"
    config = yaml.safe_load((ROOT / "configs" / CONFIG_OF[variant]).read_text())
    for content in (config, rendered):
        del content["http_options"]["host"]
        content.pop("proxy_location", None)
    assert rendered["applications"][0]["args"].pop("http") == {"allowed_hosts": ["*"]}
    assert rendered == config


# The image and the weights.


def test_versions_are_those_of_the_project() -> None:
    pinned = dict(re.findall(r"^([A-Za-z0-9_-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert rayservice("base")["spec"]["rayClusterConfig"]["rayVersion"] == pinned["ray"]
    for folder in ("base", "weights"):
        (kustomization,) = load_all((K8S / folder / "kustomization.yaml").read_text())
        assert [image["newTag"] for image in kustomization["images"]] == [__version__]


def test_the_image_is_built_from_files_that_are_let_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pyproject.toml", "constraints.txt", "serve_app", "configs"} <= let_through
    assert [name for name in let_through if not (ROOT / name).exists()] == []
    dockerfile = (K8S / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(\S+)", dockerfile, re.MULTILINE)
    assert [name for name in copied if name != "." and name not in let_through] == []
    assert "-c /opt/sdxl-serve/constraints.txt" in dockerfile
    assert "wget" in dockerfile  # KubeRay's readiness probe of a worker
    head, workers = groups("base")
    (user,) = re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)
    for group in (head, workers):
        context = group["template"]["spec"]["securityContext"]
        assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user


# Some of the files of the published base, at the revision of the configurations.
PUBLISHED = [
    "model_index.json",
    "README.md",
    "sd_xl_base_1.0.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/vocab.json",
    *(
        f"{folder}/{name}"
        for folder, stem in (
            ("text_encoder", "model"),
            ("text_encoder_2", "model"),
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("vae_1_0", "diffusion_pytorch_model"),
        )
        for name in (
            "config.json",
            f"{stem}.fp16.safetensors",
            f"{stem}.safetensors",
            "model.onnx",
            "flax_model.msgpack",
            "openvino_model.bin",
        )
    ),
]


def _matching(patterns: list[str]) -> set[str]:
    return {name for name in PUBLISHED if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


def test_the_job_fetches_what_the_replicas_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def fetch(hub_id: str, revision: str, allow_patterns: list[str]) -> str:
        asked.setdefault(f"{hub_id} --revision {revision}", []).extend(allow_patterns)
        return "."

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (application,) = serve_config("base")["applications"]
    args = application["args"]
    checkpoint.locate(ModelSource(**args["base"]), checkpoint.BASE_COMPONENTS)
    checkpoint.locate(ModelSource(**args["refiner"]), checkpoint.REFINER_COMPONENTS)

    script = (K8S / "weights" / "download.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    commands = script.replace("\\\n", " ").split("hf download ")[1:]
    fetched = {
        re.sub(r"\s+", " ", command.partition("--include")[0]).strip(): re.findall(r"--include '?([^'\s]+)'?", command)
        for command in commands
    }
    assert set(fetched) == set(asked)
    for source, patterns in fetched.items():
        assert _matching(patterns) == _matching(asked[source])
    base = _matching(fetched[f"{args['base']['hub_id']} --revision {args['base']['revision']}"])
    assert {name for name in base if "safetensors" in name} == {
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert not {name for name in base if name.endswith((".bin", ".onnx", ".msgpack"))}
