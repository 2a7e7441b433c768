"""What is set before Ray is imported, and what Ray could not start in. No Ray is started here."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from serve_app.graph.environment import (
    AUTH_MODE,
    LOOPBACK,
    TOKEN,
    TOKEN_PATH,
    check_surroundings,
    for_other_processes,
    set_for_own_ray,
)
from serve_app.request.errors import ConfigurationError


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", script], env=outside | environment, capture_output=True, text=True, timeout=120
    )


SET = (
    "import os; from serve_app.graph.environment import *; print(set_for_own_ray()); print(os.environ.get(TOKEN_PATH))"
)


def test_the_token_is_this_process_s_own_and_its_user_s_alone() -> None:
    look = "; path = os.environ[TOKEN_PATH]; print(oct(os.stat(path).st_mode), len(open(path).read()))"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        ended = run(f"import os; os.umask(0); {SET}{look}", RAY_TMPDIR=folder, HOME="/nowhere")
        warning, path, mode = ended.stdout.splitlines()
        assert warning == "None" and Path(path).is_relative_to(folder)
        assert mode.split() == [oct(stat.S_IFREG | 0o600), "64"]
        assert list(Path(folder).iterdir()) == [], "it goes with the process"


def test_a_token_of_the_environment_is_used() -> None:
    assert run(SET, RAY_AUTH_TOKEN="a" * 64).stdout.split() == ["None", "None"]
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("b" * 64)
        file.flush()
        assert run(SET, RAY_AUTH_TOKEN_PATH=file.name).stdout.split() == ["None", file.name]


def test_empty_variables_name_no_token() -> None:
    look = "; print(TOKEN in os.environ, os.path.getsize(os.environ[TOKEN_PATH]))"
    *_, seen = run(SET + look, RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH="").stdout.splitlines()
    assert seen == "False 64"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b" \n", "no token is in it"), (b"\xff\xfe", "not text")],
)
def test_a_token_file_that_an_ended_service_left_behind(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setenv(TOKEN_PATH, str(path))
    monkeypatch.setenv(AUTH_MODE, "token")
    with pytest.raises(ConfigurationError, match=f"^RAY_AUTH_TOKEN_PATH: {path}: {reason}; unset it for a new token$"):
        set_for_own_ray()
    monkeypatch.setenv(TOKEN, "t" * 64)  # Ray reads that first
    assert set_for_own_ray() is None


def test_to_do_without_a_token_is_said() -> None:
    said, path = run(SET, RAY_AUTH_MODE="disabled").stdout.splitlines()
    assert said.startswith("RAY_AUTH_MODE is disabled: whoever reaches") and path == "None"


def test_ray_imported_before_is_an_error() -> None:
    ended = run(f"import ray; {SET}")
    assert ended.returncode == 1
    assert "ConfigurationError: Ray was imported before RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 was set" in ended.stderr
    assert run(f"import ray; {SET}", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0").returncode == 0


def test_a_token_itself_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setenv(TOKEN_PATH, "/a/token")
    shown = for_other_processes("127.0.0.1:1")
    assert shown["RAY_ADDRESS"] == "127.0.0.1:1" and shown[TOKEN_PATH] == "/a/token" and shown[LOOPBACK] == "0"
    assert "secret" not in str(shown)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_sockets(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/tmp/" + "a" * 35)
    with pytest.raises(ConfigurationError, match=rf"^{variable}: /tmp/a{{35}} has 40 bytes, .* at most 39; RAY_TMPDIR"):
        check_surroundings()
    monkeypatch.setenv(variable, "/tmp")
    check_surroundings()


def test_a_folder_that_can_t_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nothing")
    with pytest.raises(ConfigurationError, match=r"^RAY_TMPDIR: /proc/nothing: No such file or directory$"):
        check_surroundings()
