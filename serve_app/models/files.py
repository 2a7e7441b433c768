"""Files of a checkpoint: read as far as a check needs, with one line about what is wrong with one."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.request.errors import ConfigurationError

_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Entry:
    """What a safetensors header says of one tensor."""

    dtype: str  # as the format spells it: F32, BF16, I8, ...
    shape: tuple[int, ...]


@contextmanager
def refusing(what: Path | str) -> Iterator[None]:
    """What is raised within leaves as a `ConfigurationError` of one line that begins with `what`."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says that says something."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    said = next((line for line in lines if line), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def is_dangling(path: Path) -> bool:
    """Whether it is a link whose file is not there."""
    return path.is_symlink() and not path.exists()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ConfigurationError`."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: {_absence(path)}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be read: {error.strerror}") from None
    _refuse_pointer(path, raw)
    if raw.startswith(_BOM):
        # diffusers and transformers, which read most of these files themselves, fail on it.
        raise ConfigurationError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
    try:
        content = json.loads(raw.decode())
    except ValueError as error:
        raise ConfigurationError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: not a JSON object")
    return content


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. Raises `ConfigurationError` where it is none, or not whole."""
    # Format: 8 bytes little-endian header length, a JSON header with every tensor's byte range, the data.
    if not path.is_file():
        raise ConfigurationError(f"{path}: {_absence(path)}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _refuse_pointer(path, start + file.read(len(_LFS_POINTER)))
        file.seek(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            if 8 + length > size:
                raise ValueError
            header = {name: entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            entries = {name: Entry(str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigurationError(f"{path}: not a safetensors file, or cut short") from None
    expected = 8 + length + end
    if size != expected:
        raise ConfigurationError(f"{path}: {size} bytes where its header says {expected}: an incomplete copy")
    return entries


def _absence(path: Path) -> str:
    if is_dangling(path):
        return "a link to a file that is not there (a hub cache whose blobs were not copied with it?)"
    return "missing"


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_LFS_POINTER):
        raise ConfigurationError(f"{path}: a Git LFS pointer in place of the file; `git lfs pull` fetches it")
