"""The README's commands and snippets, run as they stand, against the running graph."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app.graph.local import Running

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PORT = "127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(start: str) -> list[str]:
    """The shell commands that begin with a word, continuation lines and quoted newlines included."""
    found: list[str] = []
    for block in blocks("sh"):
        for line in block.splitlines():
            if re.match(r"\S", line):
                found.append(line)
            elif line.strip():
                found[-1] += "\n" + line
    return [command for command in found if command.startswith(start)]


@pytest.mark.parametrize("command", [*commands("curl"), *commands("sdxl-serve generate")])
def test_shell_commands(command: str, graph: Running, tmp_path: Path) -> None:
    assert PORT in command
    command = command.replace(f"http://{PORT}", graph.url or "").replace("curl ", "curl --fail -sS ")
    command = command.replace("sdxl-serve ", f"{sys.executable} -m serve_app.cli ")
    run = subprocess.run(command, shell=True, capture_output=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr.decode()
    if "-o out.png" in command:
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert b"iVBORw0KGgo" in run.stdout  # a PNG in base64


def test_python_snippets(graph: Running) -> None:
    openai, client, handle = blocks("python")
    assert PORT in openai and PORT in client
    found: dict[str, Any] = {}
    exec(openai.replace(f"http://{PORT}", graph.url or ""), found)
    assert found["picture"].data[0].b64_json
    exec(client.replace(f"http://{PORT}", graph.url or ""), found)
    assert found["event"].images[0].seed == 7
    # In a process of its own, with what `sdxl-serve serve` prints for it.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", f"{handle}\nprint([image.seed for image in result.images])"],
        env=outside | graph.environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[7, 8]"


def test_check_command(capfd: pytest.CaptureFixture[str]) -> None:
    (command,) = commands("sdxl-serve check")
    run = subprocess.run([sys.executable, "-m", "serve_app.cli", *command.split("#")[0].split()[1:]], cwd=ROOT)
    assert run.returncode == 0


def test_every_room_stands_in_the_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for path in (ROOT / "serve_app").iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            assert f"  {path.name}/" in tree, path.name
