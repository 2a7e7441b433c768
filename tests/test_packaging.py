"""What is installed is whole: the wheel holds the configurations and the embedded checkpoints."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_configurations_and_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("sdxl_serve-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"serve_app/configs/{config.name}" in names
    demo = ROOT / "serve_app" / "demo"
    profiles = ROOT.glob("serve_app/planning/profiles/*.json")
    for path in [*demo.glob("base/**/*"), *demo.glob("refiner/**/*"), *ROOT.glob("serve_app/**/*.py"), *profiles]:
        if path.is_file():
            assert str(path.relative_to(ROOT)) in names
