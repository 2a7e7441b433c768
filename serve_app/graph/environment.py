"""What Ray reads from the environment, once, when it is first imported. Imports no Ray.

A Ray of our own listens on loopback and keeps its token. Ray has a setting for loopback under the name of another:
with `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0` the node's address is 127.0.0.1, and all but two kinds of server bind it:
Serve's proxy binds the host of its HTTP options, and each replica's server for calls between deployments binds every
address; it answers nobody without the token (docs/security.md).
"""

from __future__ import annotations

import atexit
import errno
import os
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from serve_app.request.errors import ConfigurationError

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

_SOCKET_PATH_BYTES = 107 if sys.platform.startswith("linux") else 103  # of sockaddr_un, without its last zero
_LONGEST_SOCKET = "/ray/session_2026-01-31_23-59-59_999999_9999999/sockets/plasma_store"
_FREE_MB = 16  # Ray's folder takes its logs, and a few files before the first


def set_for_own_ray() -> str | None:
    """Loopback and a token for every Ray that this process starts, and for the processes that it starts in turn.

    To be called before Ray is first imported: it reads the environment once. Raises `ConfigurationError` where that is
    too late. Returns a line to be shown where the environment says that Ray shall do without its token.

    The token is this process's own, in a file that its user alone may read, and goes with the process; one that the
    environment names is used instead, and a file of it that can't be read or is empty is a `ConfigurationError`.
    It does not lie in ~/.ray, where Ray would write it: that file outlives all instances, every Ray of the user shares
    it, and a home may be absent or read-only.
    """
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None and constants.ENABLE_RAY_CLUSTER:
        raise ConfigurationError(
            f"Ray was imported before {LOOPBACK}=0 was set, and would listen on every address of this machine: set it "
            "in the environment, or call serve_app.graph.environment.set_for_own_ray() before the first `import ray`"
        )
    os.environ[LOOPBACK] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    # Who starts the Ray decides when its work has ended: these two waits of Ray's own would only come on top.
    os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S", "0.001")
    os.environ.setdefault(AUTH_MODE, "token")
    if os.environ[AUTH_MODE].lower() != "token":
        return (
            f"{AUTH_MODE} is {os.environ[AUTH_MODE]}: whoever reaches this machine's ports can run code in the "
            "replicas; unset it"
        )
    for name in (TOKEN, TOKEN_PATH):
        if not os.environ.get(name):
            os.environ.pop(name, None)  # empty, it names none
    if TOKEN in os.environ:
        return None
    if TOKEN_PATH in os.environ:
        _check_token_file(Path(os.environ[TOKEN_PATH]))
    else:
        os.environ[TOKEN_PATH] = str(_new_token_file())
    return None


def for_other_processes(address: str) -> dict[str, str]:
    """What another process of this user needs in its environment to join this process's Ray by its `address`.

    A token that was given in the environment itself is left out: whoever gave it has it.
    """
    names = (AUTH_MODE, TOKEN_PATH, LOOPBACK)
    return {"RAY_ADDRESS": address} | {name: os.environ[name] for name in names if name in os.environ}


def check_surroundings() -> None:
    """Refuses what Ray could not start in, or would wait for without a word. Raises `ConfigurationError`."""
    _check_folder()
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        raise ConfigurationError(f"127.0.0.1: {error.strerror or error}; Ray needs the loopback interface") from None


def ray_folder() -> tuple[str, Path]:
    """The variable that names the folder in which Ray keeps its sessions, and the folder."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if variable in os.environ and (variable == "RAY_TMPDIR" or sys.platform.startswith("linux")):
            return variable, Path(os.environ[variable])
    return "RAY_TMPDIR", Path("/tmp")


def _check_folder() -> None:
    variable, folder = ray_folder()
    longest = _SOCKET_PATH_BYTES - len(_LONGEST_SOCKET)
    if len(os.fsencode(folder)) > longest:
        raise ConfigurationError(
            f"{variable}: {folder} has {len(os.fsencode(folder))} bytes, and the sockets that Ray keeps in it allow at "
            f"most {longest}; RAY_TMPDIR names a shorter folder for Ray alone"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 2**16)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigurationError(f"{variable}: {folder}: {error.strerror or error}") from None
    if free < _FREE_MB * 2**20:
        raise ConfigurationError(
            f"{variable}: {folder}: {os.strerror(errno.ENOSPC)} for Ray's logs and sockets: {free / 2**20:.1f} MB are "
            f"free, {_FREE_MB} MB are needed"
        )


def _check_token_file(path: Path) -> None:
    """A file that went with the process that made it is left in the environment of a shell, say."""
    fault = "no token is in it"
    try:
        if path.read_text(encoding="utf-8").strip():
            return
    except OSError as error:
        fault = error.strerror or str(error)
    except UnicodeDecodeError:
        fault = "not text"
    raise ConfigurationError(f"{TOKEN_PATH}: {path}: {fault}; unset it for a new token")


def _new_token_file() -> Path:
    _check_folder()
    variable, parent = ray_folder()
    try:
        folder = Path(tempfile.mkdtemp(prefix="sdxl-serve-", dir=parent))  # for this user alone
        path = folder / "ray_token"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except OSError as error:
        raise ConfigurationError(f"{variable}: {parent}: {error.strerror or error}") from None
    atexit.register(_remove, folder, os.getpid())
    return path


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a fork ends before its parent does
        shutil.rmtree(folder, ignore_errors=True)
