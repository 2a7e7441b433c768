from __future__ import annotations

import pytest

from serve_app.graph.local import _is_loopback


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("sdxl.example.com", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_which_addresses_nobody_else_reaches(host: str, loopback: bool) -> None:
    assert _is_loopback(host) is loopback
