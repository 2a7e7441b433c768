"""Renders what the manifests take from configs/: the Serve configurations and the weights to fetch.

    python k8s/render.py           writes the files
    python k8s/render.py --check   writes nothing; ends non-zero where a file is not what it should be

A configuration reaches a RayService's serveConfigV2 as it stands in configs/, but for three things that
Kubernetes needs: proxies listen on all addresses of their pod, and on every node that has replicas; and requests may
come under any name.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).resolve().parent
CONFIGS = K8S.parent / "configs"

BASE_CONFIG = "single-gpu.yaml"
OVERLAY_CONFIGS = {"multi-gpu": "multi-gpu.yaml", "demo-cpu": "demo.yaml"}

# What the replicas of a stage load, of the base and of the refiner.
COMPONENTS = {
    "base": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler"),
    "refiner": ("text_encoder_2", "tokenizer_2", "unet", "scheduler"),
    "vae": ("vae",),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    check: bool = parser.parse_args(arguments).check
    stale = [path for path, text in rendered().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(K8S.parent)} is stale: run python k8s/render.py", file=sys.stderr)
        else:
            path.write_text(rendered()[path])
            print(f"wrote {path.relative_to(K8S.parent)}")
    return 1 if check and stale else 0


def rendered() -> dict[Path, str]:
    """Every rendered file and its content."""
    files = {
        K8S / "base" / "rayservice.yaml": _rayservice(BASE_CONFIG),
        K8S / "weights" / "download.sh": _download([BASE_CONFIG, *OVERLAY_CONFIGS.values()]),
    }
    for overlay, config in OVERLAY_CONFIGS.items():
        files[K8S / "overlays" / overlay / "serve-config.yaml"] = _serve_config_patch(config)
    return files


def serve_config(name: str) -> dict[str, Any]:
    """A configuration of configs/ as it runs on Kubernetes."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    config["proxy_location"] = "EveryNode"  # with HeadOnly no worker ever becomes ready
    config["http_options"] = {**config.get("http_options", {}), "host": "0.0.0.0"}
    for application in config["applications"]:
        # Service and gateway have names of the cluster's own; names that the file gives stand.
        application["args"]["http"] = {"allowed_hosts": ["*"], **application["args"].get("http", {})}
    return config


def _rayservice(name: str) -> str:
    template = (K8S / "rayservice.template.yaml").read_text()
    before, marker, after = template.partition("  serveConfigV2: RENDERED\n")
    if not marker:
        raise ValueError("rayservice.template.yaml has no line 'serveConfigV2: RENDERED'")
    return _header(f"k8s/rayservice.template.yaml and configs/{name}") + before + _field(name) + after


def _serve_config_patch(name: str) -> str:
    kind = "apiVersion: ray.io/v1\nkind: RayService\nmetadata:\n  name: sdxl\nspec:\n"
    return _header(f"configs/{name}") + kind + _field(name)


def _field(name: str) -> str:
    # A block of its own lines, so that a difference between two versions can be read.
    text = yaml.safe_dump(serve_config(name), sort_keys=False, width=100)
    return "  serveConfigV2: |\n" + textwrap.indent(text, "    ")


def _download(names: list[str]) -> str:
    lines = ["set -euo pipefail"]
    for name in names:
        for application in serve_config(name)["applications"]:
            for part, components in COMPONENTS.items():
                line = _hf_download(application["args"].get(part) or {}, components)
                if line and line not in lines:
                    lines.append(line)
    return _header("the hub ids in configs/") + "\n".join(lines) + "\n"


def _hf_download(source: dict[str, str], components: tuple[str, ...]) -> str | None:
    if "hub_id" not in source:
        return None
    weights = f"*.{source['variant']}.safetensors" if source.get("variant") else "*.safetensors"
    patterns = ["model_index.json"]
    for component in components:
        patterns.append(f"{component}/*.json")
        if component.startswith("tokenizer"):
            patterns.append(f"{component}/*.txt")
        elif component != "scheduler":
            patterns.append(f"{component}/{weights}")
    command = f"hf download {source['hub_id']} --revision {source['revision']}"
    return " \\\n  ".join([command, *(f"--include {shlex.quote(pattern)}" for pattern in patterns)])


def _header(sources: str) -> str:
    return f"# Rendered by k8s/render.py from {sources}: edit those.\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
