"""A profile file is read strictly, and its tables mean what the docs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.planning.profile import Line, PassTable, parse_profile, read_profile, shipped_profiles
from serve_app.request.errors import ConfigurationError
from tests.planning.small import content


def changed(path: str, value: Any) -> dict[str, Any]:
    """The content with one key set, or taken out where the value is None."""
    whole: dict[str, Any] = json.loads(json.dumps(content()))
    *folders, last = path.split(".")
    place = whole
    for folder in folders:
        place = place[folder]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("denoise.pass_ms", 3, "denoise.pass_ms: unknown key"),
        ("denoise.pass_s", -1, "denoise.pass_s: Input should be greater than or equal to 0"),
        ("denoise.pass_s", "3", "denoise.pass_s: Input should be a valid number"),
        ("denoise.pass_s", float("nan"), "denoise.pass_s: Input should be a finite number"),
        ("hop_s", None, "hop_s: Field required"),
        ("decode.passes", {}, "decode.passes: Dictionary should have at least 1 item"),
        ("decode.passes", {"64x64": {}}, "decode.passes.64x64: Dictionary should have at least 1 item"),
        ("decode.passes", {"64": {"1": 1.0}}, "decode.passes.64.[key]: String should match"),
        ("decode.passes", {"64x64": {"0": 1.0}}, "decode.passes.64x64.0.[key]: String should match"),
        ("denoise.policy", "fair", "denoise.policy: Input should be 'first_come'"),
        ("made.how", "guessed", "made.how: Input should be 'measured' or 'derived'"),
        ("made.date", "today", "made.date: String should match"),
        ("cores", {"count": 1, "slowdown": 1.5}, "cores: slowdown: 1.5, but one core is all of them"),
        (
            "decode.passes",
            {"64x32": {"1": 1.0}, "32x64": {"1": 1.0}},
            "decode: passes: 64x32 and 32x64 have the same number of pixels",
        ),
    ],
)
def test_a_fault_is_one_line_that_names_its_key(path: str, value: Any, line: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_profile(changed(path, value))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^nowhere\.json: no such file, nor one of ours: demo-cpu, "):
        read_profile("nowhere.json")
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ConfigurationError, match=r"broken\.json: not JSON: Expecting"):
        read_profile(str(path))
    path.write_text(json.dumps(changed("denoise.x", 1)))
    with pytest.raises(ConfigurationError, match=r"broken\.json: denoise\.x: unknown key$"):
        read_profile(str(path))
    path.write_text(json.dumps(content()))
    assert read_profile(str(path)) == parse_profile(content())


def test_shipped_profiles_are_valid_and_say_where_they_are_from() -> None:
    assert shipped_profiles() == ["demo-cpu", "h100", "h200"]
    assert read_profile("demo-cpu").made.how == "measured"
    for name in ("h100", "h200.json"):
        made = read_profile(name).made
        assert made.how == "derived"
        assert "NOT MEASURED" in made.notes[0]


def test_a_line_between_and_beyond_its_points() -> None:
    line = Line({2: 1.0, 4: 3.0, 8: 4.0})
    assert [line(x) for x in (1, 2, 3, 4, 6, 8)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0]
    assert line(12) == 5.0, "the last slope goes on"
    assert Line({4: 2.0})(8) == 4.0, "one point alone: in proportion"
    assert Line({2: 1.0, 4: 0.5})(100) == 0.5, "more work is never faster"


def test_a_table_between_and_beyond_its_sizes() -> None:
    table = PassTable({"10x10": {"1": 1.0, "3": 3.0}, "30x10": {"1": 2.0, "3": 8.0}})
    assert table.seconds(2, 100) == 2.0
    assert table.seconds(2, 200) == 3.5  # halfway between 2 and 5
    assert table.seconds(2, 50) == 2.0, "the smallest size's"
    assert table.seconds(2, 400) == 6.5, "the last slope goes on"
    assert [table.measured(pixels) for pixels in (99, 100, 250, 300, 301)] == [False, True, True, True, False]


@given(
    st.dictionaries(st.integers(1, 64), st.floats(0.001, 10), min_size=1, max_size=5),
    st.integers(1, 200),
)
def test_a_line_stays_within_its_neighbours(points: dict[int, float], x: int) -> None:
    value = Line(points)(x)
    below = [at for at in points if at <= x]
    above = [at for at in points if at >= x]
    if below and above:
        ends = (points[max(below)], points[min(above)])
        assert min(ends) - 1e-9 <= value <= max(ends) + 1e-9
    elif above:
        assert value == points[min(points)]
    else:
        assert value >= points[max(points)]
