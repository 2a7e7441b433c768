"""k8s/: manifests that KubeRay's own schema takes, rendered from configs/, in the shape that production needs."""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app import __version__, checkpoint
from serve_app.config import ModelSource
from serve_app.graph import build_app
from serve_app.serve_config import check_serve_config

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
CONFIG_OF = {"base": "single-gpu.yaml", "overlays/multi-gpu": "multi-gpu.yaml", "overlays/demo-cpu": "demo.yaml"}
GPU_VARIANTS = ["base", "overlays/multi-gpu"]
CRD = os.environ.get("RAYSERVICE_CRD")

every_variant = pytest.mark.parametrize("variant", CONFIG_OF)
every_gpu_variant = pytest.mark.parametrize("variant", GPU_VARIANTS)
needs_crd = pytest.mark.skipif(not CRD, reason="RAYSERVICE_CRD does not name KubeRay's schema of a RayService")

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _load_all(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(text, _Loader) if document]


# As much of kustomize as k8s/ uses: what it builds is compared with kustomize itself where there is one.


@cache
def _built(folder: str) -> tuple[dict[str, Any], ...]:
    home = K8S / folder
    (kustomization,) = _load_all((home / "kustomization.yaml").read_text())
    documents: list[dict[str, Any]] = []
    for resource in kustomization["resources"]:
        path = home / resource
        documents += copy.deepcopy(
            list(_built(str(path.resolve().relative_to(K8S.resolve()))))
            if path.is_dir()
            else _load_all(path.read_text())
        )
    for patch in kustomization.get("patches", []):
        content = yaml.load(patch.get("patch") or (home / patch["path"]).read_text(), _Loader)
        if isinstance(content, list):
            (target,) = (document for document in documents if document["kind"] == patch["target"]["kind"])
            for operation in content:
                _operate(target, **operation)
            continue
        (target,) = (
            document
            for document in documents
            if (document["kind"], document["metadata"]["name"]) == (content["kind"], content["metadata"]["name"])
        )
        if content.get("$patch") == "delete":
            documents.remove(target)
        else:
            _merge(target, content)
    return tuple(documents)


def _operate(document: Any, op: str, path: str, value: Any = None) -> None:
    *parents, last = path.removeprefix("/").split("/")
    for step in parents:
        document = document[int(step) if isinstance(document, list) else step]
    if isinstance(document, list):
        assert (op, last) == ("add", "-")
        document.append(value)
    elif op == "remove":
        del document[last]
    else:
        assert op == "replace" and last in document, f"{op} {path}"
        document[last] = value


def _merge(document: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def _rayservice(variant: str) -> dict[str, Any]:
    (service,) = (document for document in _built(variant) if document["kind"] == "RayService")
    return copy.deepcopy(service)


def _groups(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head group and the one worker group."""
    cluster = _rayservice(variant)["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return dict(container)


def _env(group: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in _container(group)["env"]}


def _serve_config(variant: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(_rayservice(variant)["spec"]["serveConfigV2"])
    return content


def _bytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("folder", [*CONFIG_OF, "weights", "components/monitoring"])
def test_every_file_a_kustomization_lists_is_there(folder: str) -> None:
    home = K8S / folder
    (kustomization,) = _load_all((home / "kustomization.yaml").read_text())
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
    built = {document["kind"]: document for document in _load_all(done.stdout)}
    expected = {document["kind"]: document for document in _built(folder)}
    assert set(built) - {"ConfigMap"} == set(expected)
    if "RayService" in built:
        text = yaml.safe_dump(built["RayService"]).replace(f"image: sdxl-serve:{__version__}", "image: sdxl-serve")
        assert yaml.safe_load(text) == expected["RayService"]


# The schema that the API server holds a RayService against.


@cache
def _schema() -> dict[str, Any]:
    assert CRD is not None
    (crd,) = _load_all(Path(CRD).read_text())
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
    assert _faults(_rayservice(variant)) == []


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
    service = _rayservice("base")
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
def test_the_serve_configuration_is_the_file_but_for_address_and_proxies(variant: str) -> None:
    rendered = _serve_config(variant)
    ServeDeploySchema.model_validate(rendered)
    check_serve_config(rendered)
    assert rendered["http_options"]["host"] == "0.0.0.0"
    assert rendered["proxy_location"] == "EveryNode"
    config = yaml.safe_load((ROOT / "configs" / CONFIG_OF[variant]).read_text())
    for content in (config, rendered):
        del content["http_options"]["host"]
        content.pop("proxy_location", None)
    assert rendered == config


# The shape.


@every_variant
def test_the_head_runs_no_replica(variant: str) -> None:
    head, _ = _groups(variant)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in _container(head)["resources"]["limits"]
    assert _rayservice(variant)["spec"]["excludeHeadPodFromServeSvc"] is True


@every_gpu_variant
def test_workers_go_to_their_gpus(variant: str) -> None:
    _, workers = _groups(variant)
    pod = workers["template"]["spec"]
    assert pod["nodeSelector"]["nvidia.com/gpu.product"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert _container(workers)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_cpu_demo_asks_for_nothing_that_a_bare_cluster_lacks() -> None:
    head, workers = _groups("overlays/demo-cpu")
    assert {document["kind"] for document in _built("overlays/demo-cpu")} == {"RayService"}
    assert "gcsFaultToleranceOptions" not in _rayservice("overlays/demo-cpu")["spec"]["rayClusterConfig"]
    for group in (head, workers):
        pod = group["template"]["spec"]
        assert not {"nodeSelector", "tolerations"} & set(pod)
        assert all("emptyDir" in volume for volume in pod["volumes"])
        assert "nvidia.com/gpu" not in _container(group)["resources"]["limits"]


@every_gpu_variant
def test_weights_come_from_a_read_only_volume_alone(variant: str) -> None:
    head, workers = _groups(variant)
    assert _env(head)["HF_HUB_OFFLINE"] == _env(workers)["HF_HUB_OFFLINE"] == "1"
    (mount,) = (m for m in _container(workers)["volumeMounts"] if m["mountPath"] == _env(workers)["HF_HOME"])
    assert mount["readOnly"] is True
    (volume,) = (v for v in workers["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    assert volume["persistentVolumeClaim"]["readOnly"] is True
    # The volume that the job fills, at the same place in the cache.
    kinds = {document["kind"]: document for document in _built("weights")}
    job = kinds["Job"]["spec"]
    assert volume["persistentVolumeClaim"]["claimName"] == kinds["PersistentVolumeClaim"]["metadata"]["name"]
    assert _env(job)["HF_HOME"] in {mount["mountPath"] for mount in _container(job)["volumeMounts"]}
    assert "HF_HUB_OFFLINE" not in _env(job)


@every_variant
def test_the_object_store_fits_shared_memory_and_that_the_pod(variant: str) -> None:
    for group in _groups(variant):
        (mount,) = (m for m in _container(group)["volumeMounts"] if m["mountPath"] == "/dev/shm")
        (volume,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == mount["name"])
        assert volume["emptyDir"]["medium"] == "Memory"
        shm = _bytes(volume["emptyDir"]["sizeLimit"])
        assert float(group["rayStartParams"]["object-store-memory"]) < shm
        assert shm < _bytes(_container(group)["resources"]["limits"]["memory"]) / 2


@every_variant
def test_requests_end_before_replicas_before_pods_before_their_cluster(variant: str) -> None:
    config = _serve_config(variant)
    (application,) = config["applications"]
    built_in = build_app(application["args"])._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    drains = [options.get("graceful_shutdown_timeout_s", built_in) for options in application["deployments"]]
    service = _rayservice(variant)["spec"]
    for group in _groups(variant):
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert max(drains) < grace < service["rayClusterDeletionDelaySeconds"]
    assert config["http_options"]["request_timeout_s"] < service["rayClusterDeletionDelaySeconds"]


@every_variant
def test_upgrades_and_scales_within_bounds(variant: str) -> None:
    service = _rayservice(variant)["spec"]
    cluster = service["rayClusterConfig"]
    assert service["upgradeStrategy"] == {"type": "NewCluster"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    _, workers = _groups(variant)
    assert 1 <= workers["minReplicas"] <= workers["replicas"] < workers["maxReplicas"]


@every_variant
def test_all_replicas_fit_the_workers_there_are_at_the_least(variant: str) -> None:
    _, workers = _groups(variant)
    limits = _container(workers)["resources"]["limits"]
    size = (float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)))
    pods = [size] * workers["minReplicas"]
    (application,) = _serve_config(variant)["applications"]
    demands = [
        (options["ray_actor_options"].get("num_gpus", 0), options["ray_actor_options"]["num_cpus"])
        for options in application["deployments"]
        for _ in range(options["num_replicas"])
    ]
    for gpus, cpus in sorted(demands, reverse=True):  # the largest first, each into the first pod with room
        fitting = [index for index, (cpu, gpu) in enumerate(pods) if cpus <= cpu + 1e-9 and gpus <= gpu + 1e-9]
        assert fitting, f"no worker has room for {cpus} CPUs and {gpus} GPUs"
        cpu, gpu = pods[fitting[0]]
        pods[fitting[0]] = (cpu - cpus, gpu - gpus)


def test_fractions_of_a_gpu_are_packed_where_whole_ones_are_needed() -> None:
    head, _ = _groups("overlays/multi-gpu")
    assert _env(head)["RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY"] == "1"


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in [*CONFIG_OF, "weights"]:
        for document in _built(folder):
            if document["kind"] == "RayService":
                for group in _groups(folder):
                    yield folder, group["template"]["spec"]
            elif "template" in document["spec"]:
                yield folder, document["spec"]["template"]["spec"]


def test_no_pod_runs_as_root_or_bursts() -> None:
    pods = list(_pods())
    assert len(pods) == 2 * 3 + 2 + 1  # head and worker three times, Redis twice, the job
    for folder, pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True, folder
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]


def _secrets_inline(content: Any, where: str = "") -> list[str]:
    if isinstance(content, list):
        return [found for item in content for found in _secrets_inline(item, where)]
    if not isinstance(content, dict):
        return []
    named = re.search(r"password|token|credential", f"{where}.{content.get('name', '')}", re.IGNORECASE)
    found = [where] if named and "value" in content else []
    found += [f"{where}.{key}" for key in content if key in ("stringData", "data") and content.get("kind") == "Secret"]
    return found + [place for key, value in content.items() for place in _secrets_inline(value, f"{where}.{key}")]


def test_no_secret_stands_in_a_manifest() -> None:
    documents = [
        document
        for path in K8S.rglob("*.yaml")
        for document in _load_all(path.read_text())
        if isinstance(document, dict)
    ]
    assert [found for document in documents for found in _secrets_inline(document)] == []
    password = _rayservice("base")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert _secrets_inline({"redisPassword": {"value": "hunter2"}}) == [".redisPassword"]
    # Ray and its Redis ask for the same secret.
    (redis,) = (document for document in _built("base") if document["kind"] == "Deployment")
    (variable,) = _container(redis["spec"])["env"]
    assert variable["valueFrom"] == password["valueFrom"]


def test_metrics_ports_are_the_pods_own() -> None:
    (monitor,) = _load_all((K8S / "components" / "monitoring" / "podmonitor.yaml").read_text())
    asked = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    head, workers = _groups("base")
    assert asked == ["metrics", "as-metrics", "dash-metrics"]
    assert set(asked) <= {port["name"] for port in _container(head)["ports"]}
    assert "metrics" in {port["name"] for port in _container(workers)["ports"]}
    for group in (head, workers):
        labels = {"ray.io/is-ray-node": "yes"} | group["template"]["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


# The image and the weights.


def test_versions_are_those_of_the_project() -> None:
    pinned = dict(re.findall(r"^([A-Za-z0-9_-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert _rayservice("base")["spec"]["rayClusterConfig"]["rayVersion"] == pinned["ray"]
    for folder in ("base", "weights"):
        (kustomization,) = _load_all((K8S / folder / "kustomization.yaml").read_text())
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
    head, workers = _groups("base")
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
    (application,) = _serve_config("base")["applications"]
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
