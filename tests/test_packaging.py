"""What is installed is whole: the wheel holds the configurations, the checkpoints, the page and the profiles."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_all_that_is_shipped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("sdxl_serve-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"serve_app/configs/{config.name}" in names
    demo = ROOT / "serve_app" / "demo"
    page = [path for path in (ROOT / "serve_app" / "page").iterdir() if path.is_file()]
    profiles = ROOT.glob("serve_app/planning/profiles/*.json")
    shipped = [*demo.glob("base/**/*"), *demo.glob("refiner/**/*"), *page, *profiles, *ROOT.glob("serve_app/**/*.py")]
    for path in shipped:
        if path.is_file():
            assert str(path.relative_to(ROOT)) in names
