"""Whose an application is, and where it is said to be. No Ray is started here."""

from __future__ import annotations

import pytest

from serve_app.graph.local import _in_url, _is_ours


@pytest.mark.parametrize(
    ("now", "before", "deployed", "ours"),
    [
        (2.0, None, 2.0, True),
        (2.0, 1.0, 2.0, True),
        (3.0, 1.0, 2.0, False),  # somebody's, put there since
        (None, None, 2.0, False),
        # Ended before the time of ours was learnt.
        (2.0, None, None, True),
        (2.0, 1.0, None, True),
        (1.0, 1.0, None, False),  # that of before: ours was refused
        (None, None, None, False),
    ],
)
def test_only_what_was_deployed_here_is_deleted(
    now: float | None, before: float | None, deployed: float | None, ours: bool
) -> None:
    assert _is_ours(now, before, deployed) is ours


@pytest.mark.parametrize(
    ("host", "written"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("gpubox", "gpubox"), ("[::1]", "[::1]")]
)
def test_an_ipv6_address_stands_in_brackets(host: str, written: str) -> None:
    assert _in_url(host) == written
