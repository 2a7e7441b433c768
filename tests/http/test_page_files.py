"""What the page is served as: its headers, its negotiation, its files; and the facts that it is made of."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from serve_app.http.app import build_http_app
from serve_app.http.info import service_info
from serve_app.http.page import read_page
from serve_app.request.fields import MAX_IMAGES
from serve_app.request.schema import parse_request
from tests.fakes import BASE_ALONE, FakeStages, service
from tests.http.test_app import GENERATIONS, get, post

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.mark.parametrize("accept", [{}, {"Accept": "*/*"}, {"Accept": "application/json"}])
async def test_whoever_wants_no_page_reads_healthy(accept: dict[str, str]) -> None:
    answer = await get(FakeStages(), "/", **accept)
    assert (answer.status_code, answer.text) == (200, "Healthy")
    assert answer.headers["content-type"].startswith("text/plain") and answer.headers["vary"] == "Accept"


async def test_a_browser_gets_the_page() -> None:
    answer = await get(FakeStages(), "/", **BROWSER)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["vary"] == "Accept"
    again = await get(FakeStages(), "/", **BROWSER, **{"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in read_page())])
async def test_every_file_is_strictly_typed_and_asks_nobody_else(path: str) -> None:
    answer = await get(FakeStages(), path, **BROWSER)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    foreign = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", answer.text.replace("http://www.w3.org/2000/svg", ""))
    assert foreign == []


async def test_the_page_runs_nothing_inline_and_links_only_what_is_there() -> None:
    html = read_page()["index.html"].content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    links = re.findall(r'(?:src|href)="(page/[^"]+)"', html)
    scripts = [file.content.decode() for name, file in read_page().items() if name.endswith(".js")]
    links += [f"page/{name}" for script in scripts for name in re.findall(r'from "\./([^"]+)"', script)]
    assert {link.removeprefix("page/") for link in links} == set(read_page()) - {"index.html"}


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2f__init__.py", "%2e%2e/cli.py"])
async def test_no_other_file_is_served(name: str) -> None:
    assert (await get(FakeStages(), f"/page/{name}")).status_code == 404


async def test_it_works_under_a_prefix() -> None:
    """Every address in the page is relative to it, and the page's own ends in a slash."""
    app = build_http_app(service(FakeStages()))
    transport = httpx.ASGITransport(app=app, root_path="/sdxl")
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=BROWSER) as client:
        moved = await client.get("/sdxl")
        assert moved.status_code == 307 and moved.headers["location"] == "/sdxl/"
        assert (await client.get("/sdxl/")).text == read_page()["index.html"].content.decode()
        assert (await client.get("/sdxl/page/main.js")).status_code == 200
    for name, file in read_page().items():
        if name.endswith((".js", ".html")):
            assert not re.search(r"""(?:src=|href=|from |import\(|fetch\(|reach\()["']/""", file.content.decode())


async def test_the_facts_are_those_that_bind() -> None:
    fake = FakeStages()
    answer = await get(fake, "/v1/sdxl/info")
    info = answer.json()
    assert (info["native_size_px"], info["refined"], info["max_partial_images"]) == (64, True, 3)
    at_most: dict[str, Any] = {
        "prompt": "p", "num_inference_steps": info["max_steps"], "n": info["max_images"], "width": info["max_side_px"],
        "height": info["max_pixels"] // info["max_side_px"],
    }  # fmt: skip
    assert (await post(fake, GENERATIONS, at_most)).status_code == 200
    for name in ("num_inference_steps", "n", "height"):
        assert (await post(fake, GENERATIONS, at_most | {name: at_most[name] + 8})).status_code == 400
    for scheduler in info["schedulers"]:
        parse_request({"prompt": "p", "scheduler": scheduler})
    # Sent as they stand, the defaults change nothing.
    spoken = (await post(fake, GENERATIONS, {"prompt": "p", "seed": 1, **info["defaults"]})).json()
    silent = (await post(fake, GENERATIONS, {"prompt": "p", "seed": 1})).json()
    assert spoken["data"] == silent["data"]


def test_without_a_refiner_or_room() -> None:
    images = service(FakeStages(), BASE_ALONE, max_images_in_flight=3)
    info = service_info(images.config, images.facts)
    assert (info.refined, info.defaults["high_noise_frac"], info.max_partial_images) == (False, 1.0, 0)
    assert info.max_images == 3 < MAX_IMAGES
