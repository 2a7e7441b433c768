"""The worked example of docs/planning.md, run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from serve_app.cli import main

PAGE = (Path(__file__).parent.parent.parent / "docs" / "planning.md").read_text()
EXAMPLES = re.findall(r"```sh\n(sdxl-serve plan [^\n]*)\n```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_the_page_shows(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip() == output.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3
