"""A stranger's page in a real browser: what it can send comes as the guard expects it, and is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Page, async_playwright

from serve_app.config.settings import HttpConfig
from serve_app.http.app import build_http_app
from tests.fakes import FakeStages, service
from tests.http.browser import FLAGS, chromium
from tests.http.test_guard import GENERATIONS
from tests.http.web_server import serving


async def blank(scope: Any, receive: Any, send: Any) -> None:
    """A site of somebody else: an empty page."""
    headers = [(b"content-type", b"text/html")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"<!doctype html><title>theirs</title>"})


class Recorded:
    """An application, and what each request of it got: method, path and status."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.answers: list[tuple[str, str, int]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def recording(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((scope["method"], scope["path"], message["status"]))
            await send(message)

        await self._app(scope, receive, recording)


@asynccontextmanager
async def a_browser(*flags: str) -> AsyncIterator[Page]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=[*FLAGS, *flags], timeout=180_000)
        try:
            yield await browser.new_page()
        finally:
            await browser.close()


FETCH = """async ([url, type, mode]) => {
  try {
    const body = JSON.stringify({ prompt: "a red circle", num_inference_steps: 1 });
    const answer = await fetch(url, { method: "POST", headers: { "Content-Type": type }, body, mode });
    return [answer.status, answer.headers.get("x-request-id") ?? ""];
  } catch (error) { return [error.name, ""]; }
}"""
IMAGE = """url => new Promise(done => {
  const image = new Image(); image.onload = () => done("drawn"); image.onerror = () => done("refused"); image.src = url;
})"""
FORM = """([url, type]) => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.name = type;
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, { action: url, method: "POST", enctype: type, target: frame.name });
  form.innerHTML = '<input name=\\'{"prompt": "p", "x": "\\' value=\\'"}\\'>';
  document.body.append(form); frame.onload = () => done(); form.submit();
})"""


async def test_what_a_page_can_send_is_refused_and_its_own_users_page_is_not() -> None:
    fake = FakeStages()
    with serving(blank) as theirs, serving(blank) as allowed:
        # Two sites: an address and a name.
        evil, friend = theirs.url, allowed.url.replace("127.0.0.1", "localhost")
        app = Recorded(build_http_app(service(fake, http=HttpConfig(cors_origins=(friend,)))))
        with serving(app) as ours:
            names = "--host-resolver-rules=MAP evil.example 127.0.0.1"
            async with asyncio.timeout(120), a_browser(names) as page:
                for site in (evil, evil.replace("127.0.0.1", "localhost")):  # the same site, and another
                    await page.goto(site)
                    for kind in ("application/json", "text/plain"):
                        for mode in ("cors", "no-cors"):
                            status, _ = await page.evaluate(FETCH, [f"{ours.url}{GENERATIONS}", kind, mode])
                            assert status in ("TypeError", 0), "nothing of an answer is readable"
                    assert await page.evaluate(IMAGE, f"{ours.url}/imagine?prompt=p") == "refused"
                    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data"):
                        await page.evaluate(FORM, [f"{ours.url}{GENERATIONS}", kind])
                # A name of theirs that leads here is their own origin to the browser.
                await page.goto(ours.url.replace("127.0.0.1", "evil.example") + "/docs")
                status, _ = await page.evaluate(FETCH, [GENERATIONS, "application/json", "cors"])
                assert status == 403
                assert {status for _, _, status in app.answers} <= {403, 415} and len(app.answers) >= 18
                assert fake.calls == []

                app.answers.clear()
                await page.goto(friend)
                url = f"{ours.url}{GENERATIONS}"
                status, request_id = await page.evaluate(FETCH, [url, "application/json", "cors"])
                assert status == 200 and request_id, "and reads the headers"
                assert app.answers == [("OPTIONS", GENERATIONS, 200), ("POST", GENERATIONS, 200)]
                await page.evaluate("url => { location = url }", f"{ours.url}/docs")
                await page.wait_for_selector(".opblock")
