"""Whether only this machine's own users reach HTTP: by the address that it is bound to, and what the file says."""

from __future__ import annotations

import pytest

from serve_app.config.settings import AppConfig, HttpConfig

LOOPBACK = ("127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST")
ELSEWHERE = ("0.0.0.0", "::", "10.0.0.5", "sdxl.example.com", "localhost.example.com", "", None)


@pytest.mark.parametrize("host", LOOPBACK)
def test_on_loopback_an_explicit_no_stands(host: str) -> None:
    for configured, loopback in ((None, True), (True, True), (False, False)):
        assert AppConfig(http=HttpConfig(loopback=configured)).listening_on(host).http.loopback is loopback


@pytest.mark.parametrize("host", ELSEWHERE)
def test_elsewhere_and_where_it_is_not_known_others_may_reach_it(host: str | None) -> None:
    for configured in (None, True, False):
        assert AppConfig(http=HttpConfig(loopback=configured)).listening_on(host).http.loopback is False


def test_nobody_says_so_by_default() -> None:
    assert AppConfig().http.loopback is None


@pytest.mark.parametrize(("proxy_s", "bound_s"), [(None, 600), (0, 600), (30, 30), (600, 600), (900, 600)])
def test_the_smaller_of_the_time_limits_holds(proxy_s: float | None, bound_s: float) -> None:
    assert AppConfig().listening_on("127.0.0.1", proxy_s).http.request_timeout_s == bound_s
