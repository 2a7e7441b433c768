"""What is installed is whole: the wheel holds the configurations, the checkpoints, the page and the profiles."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_all_that_is_shipped(tmp_path: Path) -> None:
    # From a copy: what an earlier build left in the tree would be packed again.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "docs", "tests", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("sdxl_serve-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"serve_app/configs/{config.name}" in names
    demo = ROOT / "serve_app" / "demo"
    http = ROOT / "serve_app" / "http"
    page = [path for name in ("page", "documents") for path in (http / name).iterdir() if path.is_file()]
    profiles = ROOT.glob("serve_app/planning/profiles/*.json")
    code = [path for path in ROOT.glob("serve_app/**/*.py") if demo / "training" not in path.parents]
    for path in [*demo.glob("base/**/*"), *demo.glob("refiner/**/*"), *page, *profiles, *code]:
        if path.is_file():
            assert str(path.relative_to(ROOT)) in names
    assert not any("training" in name for name in names), "what made the demo checkpoint is not what serves it"
