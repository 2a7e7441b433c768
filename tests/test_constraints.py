"""constraints.txt pins all that `make` installs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def required(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """The installed distributions that one needs, itself among them."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:  # for another platform
        return
    yield name
    for requirement in map(Requirement, requirements):
        if any(part.operator == "==" and "*" not in part.version for part in requirement.specifier):
            continue  # pinned by who needs it, as the CUDA build of torch pins NVIDIA's libraries
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield from required(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def test_every_version_that_is_installed_is_pinned() -> None:
    lines = CONSTRAINTS.read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    needed = set(required("sdxl-serve", frozenset({"test"}), set())) - {"sdxl-serve"}
    assert len(needed) > 100, "the search finds little"
    unlike = {
        name: (distribution(name).version, pinned.get(name))
        for name in needed
        if re.sub(r"\+.*", "", distribution(name).version) != pinned.get(name)  # torch's local version, +cpu
    }
    assert unlike == {}
