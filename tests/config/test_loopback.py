from __future__ import annotations

import pytest

from serve_app.config.settings import AppConfig, HttpConfig


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
def test_who_binds_the_address_knows_whether_others_reach_it(host: str, loopback: bool) -> None:
    for configured in (False, True):
        assert AppConfig(http=HttpConfig(loopback=configured)).listening_on(host).http.loopback is loopback


def test_nobody_says_so_by_default() -> None:
    assert not AppConfig().http.loopback
