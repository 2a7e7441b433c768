"""k8s/ as kustomize builds it: what the tests of the manifests read."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
CONFIG_OF = {"base": "single-gpu.yaml", "overlays/multi-gpu": "multi-gpu.yaml", "overlays/demo-cpu": "demo.yaml"}

every_variant = pytest.mark.parametrize("variant", CONFIG_OF)

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_all(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(text, _Loader) if document]


# As much of kustomize as k8s/ uses: what it builds is compared with kustomize itself where there is one.


@cache
def built(folder: str) -> tuple[dict[str, Any], ...]:
    home = K8S / folder
    (kustomization,) = load_all((home / "kustomization.yaml").read_text())
    documents: list[dict[str, Any]] = []
    for resource in kustomization["resources"]:
        path = home / resource
        documents += copy.deepcopy(
            list(built(str(path.resolve().relative_to(K8S.resolve())))) if path.is_dir() else load_all(path.read_text())
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


def rayservice(variant: str) -> dict[str, Any]:
    (service,) = (document for document in built(variant) if document["kind"] == "RayService")
    return copy.deepcopy(service)


def groups(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head group and the one worker group."""
    cluster = rayservice(variant)["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return dict(only)


def env(group: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in container(group)["env"]}


def serve_config(variant: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(rayservice(variant)["spec"]["serveConfigV2"])
    return content
