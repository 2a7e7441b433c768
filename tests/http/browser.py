"""A real Chromium for the tests of the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright

OUTPUT = Path(__file__).parent.parent / "output"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def chromium() -> str:
    """Its path, by the variable CHROMIUM or as distributions call it. A test without one fails: it is never skipped."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.fail("no Chromium: `make chromium` installs Debian's; elsewhere set CHROMIUM to one", pytrace=False)
    return found


@asynccontextmanager
async def a_page(url: str, path: str = "/", ready: str = "#examples button", **context: Any) -> AsyncIterator[Page]:
    """A page of a browser of its own, at an address, once it shows what `ready` selects.

    It fails on a script's error and on a word to anybody else.
    """
    faults: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=FLAGS, timeout=180_000)
        page = await browser.new_page(**context)
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if _is_fault(message) else None)
        page.on(
            "request", lambda request: None if request.url.startswith((url, "blob:")) else faults.append(request.url)
        )
        try:
            await page.goto(f"{url}{path}")
            await page.wait_for_selector(ready, state="attached")
            yield page
        finally:
            await browser.close()
    assert faults == []


def _is_fault(message: Any) -> bool:
    # The browser itself reports each answer of 400 and above.
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


async def screenshot(page: Page, name: str) -> None:
    OUTPUT.mkdir(exist_ok=True)
    await page.screenshot(path=OUTPUT / f"{name}.png", full_page=True)
