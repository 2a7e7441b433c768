"""Imports point only to the same or a lower layer, and the light processes stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import serve_app

PACKAGE = Path(serve_app.__file__).parent

LAYERS = {
    # pure: the standard library and pydantic
    "serve_app": 0,
    "serve_app.schema": 0,
    "serve_app.config": 0,
    "serve_app.config_document": 0,
    "serve_app.errors": 0,
    "serve_app.scheduling": 0,
    "serve_app.resolve": 0,
    "serve_app.effects": 0,
    "serve_app.demo": 0,
    "serve_app.demo.grammar": 0,
    "serve_app.tasks": 0,
    "serve_app.images": 0,
    "serve_app.admission": 0,
    "serve_app.bench": 0,
    "serve_app.bench.profiles": 0,
    "serve_app.bench.arrivals": 0,
    "serve_app.bench.records": 0,
    "serve_app.bench.statistics": 0,
    "serve_app.bench.wire": 0,
    "serve_app.protocols": 0,
    "serve_app.protocols.json_body": 0,
    "serve_app.protocols.openai": 0,
    "serve_app.protocols.azure_ml": 0,
    "serve_app.protocols.azure_swagger": 0,
    "serve_app.protocols.imagine": 0,
    "serve_app.protocols.accept": 0,
    "serve_app.protocols.automatic1111": 0,
    "serve_app.protocols.automatic1111_fields": 0,
    "serve_app.protocols.automatic1111_status": 0,
    "serve_app.protocols.stability": 0,
    "serve_app.protocols.fields": 0,
    "serve_app.protocols.hugging_face": 0,
    "serve_app.protocols.infotext": 0,
    "serve_app.protocols.refiner_split": 0,
    "serve_app.protocols.scheduler_names": 0,
    "serve_app.protocols.info": 0,
    "serve_app.planning": 0,
    "serve_app.planning.profile": 0,
    "serve_app.planning.workload": 0,
    "serve_app.planning.clock": 0,
    "serve_app.planning.stages": 0,
    "serve_app.planning.simulate": 0,
    "serve_app.planning.plan": 0,
    "serve_app.planning.command": 0,
    # tensors
    "serve_app.checkpoint": 1,
    "serve_app.sampling": 1,
    "serve_app.stages": 1,
    "serve_app.stages.device": 1,
    "serve_app.stages.encode": 1,
    "serve_app.stages.traced": 1,
    "serve_app.stages.denoise": 1,
    "serve_app.stages.decode": 1,
    "serve_app.planning.passes": 1,
    "serve_app.demo.tiny": 1,
    "serve_app.demo.data": 1,
    "serve_app.demo.render": 1,
    "serve_app.demo.models": 1,
    "serve_app.demo.ranks": 1,
    "serve_app.demo.train": 1,
    "serve_app.demo.training": 1,
    "serve_app.demo.training.loop": 1,
    "serve_app.demo.training.autoencoder": 1,
    "serve_app.demo.training.pictures": 1,
    "serve_app.demo.training.noise": 1,
    "serve_app.demo.training.base": 1,
    "serve_app.demo.training.refiner": 1,
    "serve_app.demo.evaluate": 1,
    "serve_app.demo.contact_sheet": 1,
    # asyncio
    "serve_app.engine": 2,
    "serve_app.micro_batch": 2,
    "serve_app.pipeline": 2,
    "serve_app.service": 2,
    "serve_app.sse": 2,
    "serve_app.http_app": 2,
    "serve_app.routes": 2,
    "serve_app.routes.answers": 2,
    "serve_app.routes.documents": 2,
    "serve_app.routes.openai": 2,
    "serve_app.routes.azure_ml": 2,
    "serve_app.routes.imagine": 2,
    "serve_app.routes.hugging_face": 2,
    "serve_app.routes.automatic1111": 2,
    "serve_app.routes.stability": 2,
    "serve_app.page": 2,
    "serve_app.client": 2,
    "serve_app.client_wire": 2,
    # Ray
    "serve_app.deployments": 3,
    "serve_app.deployments.calls": 3,
    "serve_app.deployments.replica": 3,
    "serve_app.deployments.metrics": 3,
    "serve_app.deployments.text_encoder": 3,
    "serve_app.deployments.denoiser": 3,
    "serve_app.deployments.vae_decoder": 3,
    "serve_app.deployments.ingress": 3,
    "serve_app.graph": 3,
    "serve_app.serve_config": 3,
    # edges
    "serve_app.bench.drive": 4,
    "serve_app.bench.report": 4,
    "serve_app.bench.command": 4,
    "serve_app.local": 4,
    "serve_app.cli": 4,
    "serve_app.planning.measure": 4,
    "serve_app.planning.live": 4,
    "serve_app.planning.in_graph": 4,
}

TENSORS = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "scipy"}
WEB = {"fastapi", "starlette", "uvicorn"}
FORBIDDEN = {1: WEB | {"ray"}, 2: TENSORS | {"ray"}, 3: set[str](), 4: TENSORS}
MAY_SERVE_HTTP = {"serve_app.http_app", "serve_app.page", "serve_app.deployments.ingress"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    lazy: bool  # within a function
    typing_only: bool


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> list[Import]:
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), lazy=False, typing_only=False))


def _walk(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, lazy, typing_only)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module is not None, f"line {node.lineno}: a relative import"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield Import(name if name in MODULES else node.module, node.lineno, lazy, typing_only)
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for child in node.body:
            yield from _walk(child, lazy, True)
        for child in node.orelse:
            yield from _walk(child, lazy, typing_only)
    else:
        for part in ast.iter_child_nodes(node):
            yield from _walk(part, lazy, typing_only)


def test_every_module_has_a_layer() -> None:
    assert set(MODULES) - set(LAYERS) == set(), "add the new module to LAYERS"
    assert set(LAYERS) - set(MODULES) == set(), "LAYERS lists a module that is gone"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_to_the_same_or_a_lower_layer(name: str) -> None:
    for used in _imports(MODULES[name]):
        if used.module.split(".")[0] == "serve_app":
            assert used.module in LAYERS, f"{name}:{used.line} imports {used.module}, which is no module of ours"
            assert LAYERS[used.module] <= LAYERS[name], f"{name}:{used.line} imports {used.module}, a layer above"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if LAYERS.get(name) == 0))
def test_a_pure_module_imports_the_standard_library_and_pydantic(name: str) -> None:
    for used in _imports(MODULES[name]):
        root = used.module.split(".")[0]
        allowed = root in sys.stdlib_module_names or root in ("pydantic", "serve_app")
        allowed = allowed or (used.typing_only and root in ("numpy", "PIL"))
        allowed = allowed or (used.lazy and root in ("PIL", "numpy"))
        assert allowed, f"{name}:{used.line} imports {used.module}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if LAYERS.get(name)))
def test_a_layer_keeps_out_what_is_not_its_own(name: str) -> None:
    serves_http = name in MAY_SERVE_HTTP or name.startswith("serve_app.routes.")
    forbidden = FORBIDDEN[LAYERS[name]] | (set() if serves_http else WEB)
    for used in _imports(MODULES[name]):
        if not used.typing_only:
            assert used.module.split(".")[0] not in forbidden, f"{name}:{used.line} imports {used.module}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("serve_app.scheduling", ("torch", "ray", "diffusers", "numpy")),
        ("serve_app.planning.command", ("torch", "ray", "diffusers", "numpy")),
        ("serve_app.service", ("torch", "diffusers", "ray")),
        ("serve_app.http_app", ("torch", "diffusers", "ray")),
        ("serve_app.cli", ("torch", "diffusers", "ray")),
        ("serve_app.client", ("torch", "diffusers", "ray", "numpy", "fastapi")),
        ("serve_app.deployments.ingress", ("torch", "diffusers")),
    ],
)
def test_importing_it_loads_nothing_heavy(module: str, unwanted: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
