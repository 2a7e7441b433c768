"""k8s/: the pods and their cluster in the shape that production needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.graph.build import build_app
from tests.manifests import (
    CONFIG_OF,
    K8S,
    built,
    container,
    env,
    every_variant,
    groups,
    load_all,
    rayservice,
    serve_config,
)

every_gpu_variant = pytest.mark.parametrize("variant", ["base", "overlays/multi-gpu"])


def _bytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


@every_variant
def test_the_head_runs_no_replica(variant: str) -> None:
    head, _ = groups(variant)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    assert rayservice(variant)["spec"]["excludeHeadPodFromServeSvc"] is True


@every_gpu_variant
def test_workers_go_to_their_gpus(variant: str) -> None:
    _, workers = groups(variant)
    pod = workers["template"]["spec"]
    assert pod["nodeSelector"]["nvidia.com/gpu.product"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert container(workers)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_cpu_demo_asks_for_nothing_that_a_bare_cluster_lacks() -> None:
    head, workers = groups("overlays/demo-cpu")
    assert {document["kind"] for document in built("overlays/demo-cpu")} == {"RayService"}
    assert "gcsFaultToleranceOptions" not in rayservice("overlays/demo-cpu")["spec"]["rayClusterConfig"]
    for group in (head, workers):
        pod = group["template"]["spec"]
        assert not {"nodeSelector", "tolerations"} & set(pod)
        assert all("emptyDir" in volume for volume in pod["volumes"])
        assert "nvidia.com/gpu" not in container(group)["resources"]["limits"]


@every_gpu_variant
def test_weights_come_from_a_read_only_volume_alone(variant: str) -> None:
    head, workers = groups(variant)
    assert env(head)["HF_HUB_OFFLINE"] == env(workers)["HF_HUB_OFFLINE"] == "1"
    (mount,) = (m for m in container(workers)["volumeMounts"] if m["mountPath"] == env(workers)["HF_HOME"])
    assert mount["readOnly"] is True
    (volume,) = (v for v in workers["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    assert volume["persistentVolumeClaim"]["readOnly"] is True
    # The volume that the job fills, at the same place in the cache.
    kinds = {document["kind"]: document for document in built("weights")}
    job = kinds["Job"]["spec"]
    assert volume["persistentVolumeClaim"]["claimName"] == kinds["PersistentVolumeClaim"]["metadata"]["name"]
    assert env(job)["HF_HOME"] in {mount["mountPath"] for mount in container(job)["volumeMounts"]}
    assert "HF_HUB_OFFLINE" not in env(job)


@every_variant
def test_the_object_store_fits_shared_memory_and_that_the_pod(variant: str) -> None:
    for group in groups(variant):
        (mount,) = (m for m in container(group)["volumeMounts"] if m["mountPath"] == "/dev/shm")
        (volume,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == mount["name"])
        assert volume["emptyDir"]["medium"] == "Memory"
        shm = _bytes(volume["emptyDir"]["sizeLimit"])
        assert float(group["rayStartParams"]["object-store-memory"]) < shm
        assert shm < _bytes(container(group)["resources"]["limits"]["memory"]) / 2


@every_variant
def test_requests_end_before_replicas_before_pods_before_their_cluster(variant: str) -> None:
    config = serve_config(variant)
    (application,) = config["applications"]
    built_in = build_app(application["args"])._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    drains = [options.get("graceful_shutdown_timeout_s", built_in) for options in application["deployments"]]
    service = rayservice(variant)["spec"]
    for group in groups(variant):
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert max(drains) < grace < service["rayClusterDeletionDelaySeconds"]
    assert config["http_options"]["request_timeout_s"] < service["rayClusterDeletionDelaySeconds"]


@every_variant
def test_upgrades_and_scales_within_bounds(variant: str) -> None:
    service = rayservice(variant)["spec"]
    cluster = service["rayClusterConfig"]
    assert service["upgradeStrategy"] == {"type": "NewCluster"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    _, workers = groups(variant)
    assert 1 <= workers["minReplicas"] <= workers["replicas"] < workers["maxReplicas"]


@every_variant
def test_all_replicas_fit_the_workers_there_are_at_the_least(variant: str) -> None:
    _, workers = groups(variant)
    limits = container(workers)["resources"]["limits"]
    size = (float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)))
    pods = [size] * workers["minReplicas"]
    (application,) = serve_config(variant)["applications"]
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
    head, _ = groups("overlays/multi-gpu")
    assert env(head)["RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY"] == "1"


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in [*CONFIG_OF, "weights"]:
        for document in built(folder):
            if document["kind"] == "RayService":
                for group in groups(folder):
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
        for one in pod["containers"]:
            assert one["securityContext"]["allowPrivilegeEscalation"] is False
            assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert one["resources"]["requests"] == one["resources"]["limits"]


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
        for document in load_all(path.read_text())
        if isinstance(document, dict)
    ]
    assert [found for document in documents for found in _secrets_inline(document)] == []
    password = rayservice("base")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert _secrets_inline({"redisPassword": {"value": "hunter2"}}) == [".redisPassword"]
    # Ray and its Redis ask for the same secret.
    (redis,) = (document for document in built("base") if document["kind"] == "Deployment")
    (variable,) = container(redis["spec"])["env"]
    assert variable["valueFrom"] == password["valueFrom"]


@every_variant
def test_the_head_names_the_port_that_the_service_is_made_of(variant: str) -> None:
    """KubeRay takes the ports of `sdxl-serve-svc` from the head's container alone, and makes none without `serve`."""
    service = rayservice(variant)["spec"]
    assert "serveService" not in service
    for group in groups(variant):
        assert {"name": "serve", "containerPort": 8000} in container(group)["ports"]


def test_metrics_ports_are_the_pods_own() -> None:
    (monitor,) = load_all((K8S / "components" / "monitoring" / "podmonitor.yaml").read_text())
    asked = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    head, workers = groups("base")
    assert asked == ["metrics", "as-metrics", "dash-metrics"]
    assert set(asked) <= {port["name"] for port in container(head)["ports"]}
    assert "metrics" in {port["name"] for port in container(workers)["ports"]}
    for group in (head, workers):
        labels = {"ray.io/is-ray-node": "yes"} | group["template"]["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
