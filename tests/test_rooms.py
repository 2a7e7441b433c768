"""The rooms of the package: imports point only downwards, and each room keeps out what is not its own."""

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

# From the top down: a module imports its own room and those below, and of rooms on one floor only its own.
FLOORS = (
    ("cli",),
    ("planning", "load"),
    ("graph",),
    ("client",),
    ("http",),
    ("formats",),
    ("models",),
    ("runtime",),
    ("pictures",),
    ("config",),
    ("request",),
    ("demo",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

TENSORS = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "scipy"}
WEB = {"fastapi", "starlette", "uvicorn"}
# What a room may use besides the standard library and the rooms below.
USES: dict[str, set[str]] = {
    "cli": {"ray", "tqdm"},
    "planning": {"ray", "torch", "pydantic", "numpy", "psutil", "tqdm"},
    "load": {"pydantic", "httpx", "yaml", "tqdm", "matplotlib"},
    "graph": {"ray", "fastapi", "starlette", "torch", "numpy"},
    "client": {"httpx", "pydantic"},
    "http": WEB | {"pydantic"},
    "formats": WEB | {"pydantic"},
    "models": TENSORS | {"numpy"},
    "runtime": {"numpy"},
    "pictures": {"numpy", "PIL"},
    "config": {"pydantic", "yaml", "ray"},
    "request": {"pydantic", "PIL"},
    "demo": TENSORS | {"numpy", "PIL", "tqdm", "tokenizers"},
}
# Pure although their rooms are not: policies, arithmetic, words.
PURE = (
    "runtime.tasks",
    "runtime.scheduling",
    "runtime.admission",
    "runtime.cost",
    "runtime.stats",
    "runtime.events",
    "graph.capacity",
    "graph.environment",
    "runtime.watch",
    "runtime.quarantine",
    "demo",
    "demo.grammar",
    "load.mixes",
    "load.arrivals",
    "load.records",
    "load.statistics",
    "load.wire",
    *(f"planning.{name}" for name in ("profile", "workload", "clock", "stages", "simulate", "plan", "command")),
    *(f"formats.{name}" for name in ("words", "json_body", "accept")),
    *(
        f"formats.{name}.wire"
        for name in ("openai", "azure_ml", "hugging_face", "automatic1111", "stability", "imagine")
    ),
)


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


def room_of(module: str) -> str | None:
    """The room of a module of ours; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


NAMES = sorted(name for name in MODULES if room_of(name) is not None)


def test_every_room_has_its_floor() -> None:
    assert {room_of(name) for name in NAMES} == set(FLOOR)


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_downwards(name: str) -> None:
    room = room_of(name)
    assert room is not None
    for used in _imports(MODULES[name]):
        if used.module.split(".")[0] != "serve_app":
            continue
        other = room_of(used.module)
        if other not in (None, room):
            assert other in FLOOR, f"{name}:{used.line} imports {used.module}, which is no module of ours"
            assert FLOOR[other] > FLOOR[room], f"{name}:{used.line} imports {used.module}, which is not below"


@pytest.mark.parametrize("name", NAMES)
def test_a_room_uses_only_what_is_its_own(name: str) -> None:
    room = room_of(name)
    assert room is not None
    for used in _imports(MODULES[name]):
        root = used.module.split(".")[0]
        if root in sys.stdlib_module_names or root in ("serve_app",):
            continue
        assert root in USES[room] or used.typing_only, f"{name}:{used.line} imports {used.module}"


@pytest.mark.parametrize("name", [f"serve_app.{name}" for name in PURE])
def test_what_is_pure_imports_nothing_but_pydantic(name: str) -> None:
    for used in _imports(MODULES[name]):
        root = used.module.split(".")[0]
        allowed = root in sys.stdlib_module_names or root in ("pydantic", "serve_app")
        assert allowed or used.typing_only, f"{name}:{used.line} imports {used.module}"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("serve_app.runtime.scheduling", ("torch", "ray", "diffusers", "numpy")),
        ("serve_app.planning.command", ("torch", "ray", "diffusers", "numpy")),
        ("serve_app.runtime.service", ("torch", "diffusers", "ray")),
        ("serve_app.http.app", ("torch", "diffusers", "ray")),
        ("serve_app.graph", ("torch", "diffusers", "ray")),
        ("serve_app.graph.local", ("torch", "diffusers", "ray")),
        ("serve_app.planning.in_graph", ("torch", "diffusers", "ray")),
        ("serve_app.config.serve_file", ("torch", "diffusers", "ray")),
        ("serve_app.cli", ("torch", "diffusers", "ray")),
        ("serve_app.client", ("torch", "diffusers", "ray", "numpy", "fastapi")),
        ("serve_app.graph.ingress", ("torch", "diffusers")),
    ],
)
def test_importing_it_loads_nothing_heavy(module: str, unwanted: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
