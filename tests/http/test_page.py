"""The page in a real browser, against the running graph. Screenshots land in tests/output."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.async_playwright import Axe
from PIL import Image
from playwright.async_api import Page, Route

from serve_app.graph.local import Running
from serve_app.pictures.files import encode_image, read_parameters
from tests.graph.test_batching import stats
from tests.graph.test_faults import until
from tests.http.browser import a_page, screenshot

PROMPT, TIMES = "a lighthouse", "\N{MULTIPLICATION SIGN}"
GENERATIONS = "**/v1/images/generations"

WATCH = """() => {
  window.told = [];
  const bar = document.getElementById("bar");
  new MutationObserver(() => window.told.push(bar.getAttribute("aria-valuetext")))
    .observe(bar, { attributes: true, attributeFilter: ["aria-valuetext"] });
  const said = document.getElementById("said");
  window.said = [];
  new MutationObserver(() => window.said.push(said.textContent)).observe(said, { childList: true });
}"""
DROP = """([name, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name));
  for (const type of ["dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}"""


async def ask(page: Page, **fields: Any) -> None:
    """Types a request into the form; `more` opens the fold."""
    for name, value in {"prompt": PROMPT, "num_inference_steps": 10, **fields}.items():
        await page.fill(f"#{name}", str(value))


async def drawn(page: Page) -> bytes:
    """Presses Draw and waits; the bytes that Download would save."""
    await page.click("#draw")
    await finished(page)
    return await shown(page)


async def finished(page: Page) -> None:
    """Waits for the end of what was begun: the page clears its note as it begins."""
    await page.wait_for_selector("#note:not(:empty), #fault:not([hidden]), .field-fault:not(:empty)")
    assert "inished in" in await page.inner_text("#note"), await page.inner_text("#form .actions")
    assert not await page.is_visible("#drawing") and await page.is_visible("#picture")


async def shown(page: Page) -> bytes:
    async with page.expect_download() as download:
        await page.click("#download")
    return Path(await (await download.value).path()).read_bytes()


def asked(graph: Running, **fields: Any) -> bytes:
    """The same request, of the plain API."""
    body = {"prompt": PROMPT, "num_inference_steps": 10, **fields}
    answer = httpx.post(f"{graph.url}/v1/images/generations", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def check_same(one: bytes, other: bytes) -> None:
    """The same picture, drawn in other company: a grey level apart at most, parameters equal."""
    assert read_parameters(one) == read_parameters(other)
    first, second = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, other))
    assert np.abs(first - second).max() <= 1


async def parameters(page: Page) -> dict[str, str]:
    """What the page says of the picture that it shows."""
    names = await page.locator("#parameters dt").all_inner_texts()
    return dict(zip(names, await page.locator("#parameters dd").all_inner_texts(), strict=True))


async def test_a_picture_is_drawn_and_its_way_is_shown(graph: Running) -> None:
    async with a_page(graph.url or "") as page:
        await page.evaluate(WATCH)
        await ask(page, seed=21)
        assert await drawn(page) == asked(graph, seed=21), "the very file that the API gives"
        told = [text.split(", ", 1) for text in await page.evaluate("told")]
        percents = [int(percent.rstrip("%")) for percent, _ in told]
        assert percents == sorted(percents) and percents[0] == 0
        words = list(dict.fromkeys(word for _, word in told))
        steps = [word for word in words if "step" in word]
        every = [
            *(f"denoise, step {step} of 8" for step in range(1, 9)),
            *(f"refine, step {step} of 2" for step in (1, 2)),
        ]
        # Of many a second the latest are told, and the last of each stage always.
        assert steps == [step for step in every if step in steps] and {every[7], every[9]} <= set(steps)
        assert words[0] == "encode" and words.index("decode") > words.index(steps[-1])
        said = await page.evaluate("said")
        assert said[:4] == [f"Stage: {stage}" for stage in ("encode", "denoise", "refine", "decode")]
        assert len(said) == 5 and said[4].startswith("Finished in ")
        assert await parameters(page) == {
            "Seed": "21", "Size": f"128 {TIMES} 128", "Steps": "10", "Guidance": "7.5",
            "Sampler": "native", "Base's share": "80%",
        }  # fmt: skip
        legend = await page.locator("#time-legend li").all_inner_texts()
        assert [line.split()[0] for line in legend] == ["encode", "denoise", "refine", "decode"]
        assert "8 steps" in legend[1] and "2 steps" in legend[2]
        assert await page.title() == "sdxl-serve"
        natural = "document.getElementById('picture-image').naturalWidth"
        assert await page.evaluate(natural) == 128


async def test_previews_are_shown_on_the_way(graph: Running) -> None:
    async with a_page(graph.url or "") as page:
        await page.evaluate(
            """() => {
              window.previews = new Set();
              new MutationObserver(() => {
                for (const image of document.querySelectorAll("#tiles img[alt^=Preview]")) previews.add(image.src);
              }).observe(document.getElementById("tiles"), { subtree: true, attributes: true, childList: true });
            }"""
        )
        await ask(page, num_inference_steps=20)
        await drawn(page)
        assert await page.evaluate("previews.size") == 3
        await page.click("summary")
        await page.select_option("#partial_images", "0")
        await page.evaluate("previews.clear()")
        await drawn(page)
        assert await page.evaluate("previews.size") == 0


async def test_several_pictures_each_with_its_seed(graph: Running) -> None:
    async with a_page(graph.url or "") as page:
        await ask(page, seed=30, n=3)
        check_same(await drawn(page), asked(graph, seed=30))
        assert await page.locator("#thumbs span").all_inner_texts() == ["seed 30", "seed 31", "seed 32"]
        await page.click("#thumbs button:has-text('seed 32')")
        parameters = read_parameters(await shown(page))
        assert parameters is not None and parameters["seed"] == 32
        assert await page.locator("#thumbs [aria-pressed=true]").all_inner_texts() == ["seed 32"]


@pytest.mark.parametrize("way", ["button", "Escape", "leaving"])
async def test_cancelling_frees_the_slots(way: str, graph: Running) -> None:
    before = await stats("BaseDenoiser")
    async with a_page(graph.url or "") as page:
        await ask(page, num_inference_steps=200, n=4)
        await page.select_option("#size", "custom")
        await ask(page, num_inference_steps=200, width=256, height=256)
        await page.click("#draw")
        await page.wait_for_selector("#tiles .words:has-text('step')")
        if way == "button":
            await page.click("#cancel")
        elif way == "Escape":
            await page.keyboard.press("Escape")
        else:
            await page.goto("about:blank")

        async def is_free() -> bool:
            now = await stats("BaseDenoiser")
            return bool(now["active"] == 0 and now["cancelled"] == before["cancelled"] + 4)

        await until(is_free, seconds=60)
        assert (await stats("BaseDenoiser"))["finished"] == before["finished"]
        if way != "leaving":
            assert await page.inner_text("#note") == "Cancelled."
            assert await page.is_visible("#empty") and not await page.is_visible("#fault")
            await ask(page, n=1, width=64, height=64)
            await drawn(page)


async def test_parameters_are_used_again(graph: Running) -> None:
    async with a_page(graph.url or "") as page:
        await page.click("summary")
        await page.select_option("#scheduler", "euler_ancestral")
        await ask(page, negative_prompt="fog", guidance_scale=4)
        first = await drawn(page)
        seed = (await parameters(page))["Seed"]
        await page.click("#vary")
        await finished(page)
        assert await shown(page) != first and (await parameters(page))["Seed"] != seed
        assert await page.input_value("#seed") == "", "random from now on"
        await ask(page, prompt="something else", negative_prompt="", guidance_scale=9, n=2)
        await page.select_option("#scheduler", "")
        await page.click(f"#thumbs button:has-text('seed {seed}')")
        await page.click("#again")
        assert await page.input_value("#seed") == seed
        assert await drawn(page) == first


async def test_a_bad_size_is_told_at_its_field(graph: Running) -> None:
    before = await stats("BaseDenoiser")
    async with a_page(graph.url or "") as page:
        await page.click("summary")
        await ask(page)
        await page.select_option("#size", "custom")
        await page.fill("#width", "5000")
        await page.click("#draw")
        await page.wait_for_selector("#size-fault:not(:empty)")
        assert await page.inner_text("#size-fault") == "width: 5000 px is outside this service's 64 to 256"
        assert await page.inner_text("[role=alert]") == await page.inner_text("#size-fault"), "and read aloud"
        assert await page.get_attribute("#width", "aria-invalid") == "true"
        assert await page.evaluate("document.activeElement.id") == "width"
        assert await page.is_visible("#empty") and not await page.is_visible("#drawing")
        for field, value, name in (("width", "100", "size"), ("seed", "-3", "seed"), ("prompt", "  ", "prompt")):
            await page.fill("#width", "96")
            await page.fill(f"#{field}", value)
            await page.click("#draw")
            await page.wait_for_selector(f"#{name}-fault:not(:empty)")
            assert await page.locator("[aria-invalid]").count() == 1
            await ask(page, seed="")
        await page.fill("#other", '{"clip_skip": 50}')
        await page.fill("#width", "96")
        await page.click("#draw")
        await page.wait_for_selector("#other-fault:not(:empty)")
        assert "clip_skip" in await page.inner_text("#other-fault")
        assert (await stats("BaseDenoiser"))["finished"] == before["finished"]
        await page.fill("#other", "")
        await drawn(page)
        assert await page.locator("[aria-invalid]").count() == 0
        assert (await parameters(page))["Size"] == f"96 {TIMES} 128"


FIELDS = {
    "prompt": 'a "quoted" {brace} \\ back\nslash, "seed": 12, über ✓',
    "prompt_2": "oil",
    "negative_prompt": "",
    "width": 96,
    "height": 160,
    "seed": 2**62 + 1,
    "num_inference_steps": 7,
    "guidance_scale": 3.25,
    "scheduler": "dpmpp_2m_karras",
    "high_noise_frac": 0.55,
    "clip_skip": 1,
    "crops_coords_top_left": [8, 16],
    "aesthetic_score": 5.5,
}


@pytest.mark.parametrize(("output_format", "way"), [("png", "drop"), ("jpeg", "choose"), ("webp", "drop")])
async def test_a_dropped_picture_gives_its_parameters_back(
    output_format: str, way: str, graph: Running, tmp_path: Path
) -> None:
    original = asked(graph, **FIELDS, output_format=output_format)
    async with a_page(graph.url or "") as page:
        await ask(page, prompt="something else", n=3)
        if way == "drop":
            await page.evaluate(DROP, [f"boat.{output_format}", base64.b64encode(original).decode()])
        else:
            (tmp_path / f"boat.{output_format}").write_bytes(original)
            await page.set_input_files("#file", tmp_path / f"boat.{output_format}")
        await page.wait_for_selector(f"#note:has-text('boat.{output_format}')")
        assert await page.input_value("#prompt") == FIELDS["prompt"]
        assert await page.input_value("#seed") == str(FIELDS["seed"])
        assert await page.input_value("#size") == "custom" and await page.input_value("#height") == "160"
        assert json.loads(await page.input_value("#other")) == {
            "negative_prompt": "", **{name: FIELDS[name] for name in ("prompt_2", "clip_skip", "crops_coords_top_left",
                                                                     "aesthetic_score")},
        }  # fmt: skip
        assert await drawn(page) == original


async def test_a_picture_of_somebody_else_is_refused(graph: Running) -> None:
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    hostile = encode_image(np.zeros((8, 8, 3), np.uint8), "png", 95, {"prompt": ["<img src=x onerror=alert(1)>"]})
    async with a_page(graph.url or "") as page:
        await ask(page, prompt="mine")
        for data in (plain.getvalue(), plain.getvalue()[:40], b"", b"ASCII\0\0\0{{{", hostile):
            await page.evaluate(DROP, ["<b>x</b>.png", base64.b64encode(data).decode()])
            await page.wait_for_selector("#fault:not([hidden])")
            assert await page.inner_text("#fault-message") == "<b>x</b>.png holds no parameters of this service."
            await page.evaluate("document.getElementById('fault').hidden = true")
        assert await page.input_value("#prompt") == "mine"


async def test_what_has_no_effect_is_said(graph: Running) -> None:
    async with a_page(graph.url or "") as page:
        await page.click("summary")
        await ask(page, negative_prompt="fog", guidance_scale=1)
        await drawn(page)
        (line,) = await page.locator("#warnings li").all_inner_texts()
        assert "negative_prompt" in line
        await ask(page, negative_prompt="")
        await drawn(page)
        assert not await page.is_visible("#warnings")


async def test_by_keyboard_alone(graph: Running) -> None:
    async with a_page(graph.url or "") as page:
        focused = "document.activeElement.id || document.activeElement.textContent"
        await page.keyboard.press("Tab")
        assert await page.evaluate(focused) == "Skip to the pictures"
        assert await page.locator(".skip").bounding_box() is not None
        order = ["API", "prompt", "negative_prompt", "size", "seed", "random-seed", "n", "", "num_inference_steps"]
        for name in order:
            await page.keyboard.press("Tab")
            if name:
                assert await page.evaluate(focused) == name
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            assert await page.evaluate(outline) == "solid", f"the focus shows at {name}"
            if name == "prompt":
                await page.keyboard.type(PROMPT)
            if name == "seed":
                await page.keyboard.type("5")
        await page.keyboard.press("Control+a")
        await page.keyboard.type("10")
        await page.keyboard.press("Control+Enter")
        await finished(page)
        assert await page.evaluate(focused) == "num_inference_steps", "the focus stays where it was"
        for _ in range(20):
            await page.keyboard.press("Tab")
            if await page.evaluate(focused) == "vary":
                break
        await page.keyboard.press("Enter")
        await finished(page)
        assert await page.locator("#thumbs button").count() == 2
        assert read_parameters(await shown(page)) != asked(graph, seed=5)


async def test_a_full_service_is_waited_for(graph: Running) -> None:
    refusals = [5]

    async def refuse(route: Route) -> None:
        if not refusals:
            return await route.continue_()
        error = {"message": "the service is full", "type": "overloaded_error", "param": None, "code": "overloaded"}
        headers = {"Retry-After": str(refusals.pop())}
        await route.fulfill(status=503, headers=headers, json={"error": error})

    async with a_page(graph.url or "") as page:
        await page.route(GENERATIONS, refuse)
        await ask(page)
        await page.click("#draw")
        await page.wait_for_selector("#fault:not([hidden])")
        assert await page.inner_text("#fault-message") == "the service is full"
        assert re.fullmatch(r"Try again in [1-5] s", await page.inner_text("#retry"))
        await page.click("#retry", force=True)
        assert await page.is_visible("#fault"), "not yet"
        await page.wait_for_selector("#retry:not([aria-disabled])")
        assert await page.inner_text("#retry") == "Try again"
        await page.click("#retry")
        await finished(page)
        assert not await page.is_visible("#fault")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "The service can't be reached."),
        ({"status": 502, "body": "<h1>Bad Gateway</h1>"}, "HTTP 502 Bad Gateway"),
        ({"status": 200, "body": ": hi\n\n", "headers": {"Content-Type": "text/event-stream"}}, "The connection ended"),
        (
            {
                "status": 200,
                "headers": {"Content-Type": "text/event-stream"},
                "body": 'event: error\ndata: {"error": {"message": "internal error; see the log", "type": '
                '"server_error", "param": null, "code": "internal_error"}}\n\n',
            },
            "internal error; see the log",
        ),
    ],
)
async def test_a_fault_is_told_in_a_line(answer: dict[str, Any] | None, words: str, graph: Running) -> None:
    async def fail(route: Route) -> None:
        await (route.abort() if answer is None else route.fulfill(**answer))

    async with a_page(graph.url or "") as page:
        await page.route(GENERATIONS, fail)
        await ask(page)
        await page.click("#draw")
        await page.wait_for_selector("#fault:not([hidden])")
        assert (await page.inner_text("#fault-message")).startswith(words)
        assert await page.is_visible("#empty") and not await page.is_visible("#drawing")
        await page.unroute(GENERATIONS)
        await drawn(page)


LOOKS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1360, "height": 900}},
    "wide-dark": {"viewport": {"width": 1360, "height": 900}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
    "narrow-dark": {"viewport": {"width": 320, "height": 640}, "color_scheme": "dark", "is_mobile": True},
}


@pytest.mark.parametrize("look", LOOKS)
async def test_it_is_accessible_in_every_state(look: str, graph: Running) -> None:
    async def check(state: str) -> None:
        await screenshot(page, f"{look}-{state}")
        found = await Axe().run(page)
        assert found.violations_count == 0, f"{look}, {state}: {found.generate_report()}"
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.evaluate(overflow) <= 0, f"{look}, {state}: wider than the window"

    async with a_page(graph.url or "", reduced_motion="reduce", **LOOKS[look]) as page:
        await check("empty")
        await page.evaluate("document.getElementById('more').open = true")
        await check("more")
        await page.select_option("#size", "custom")
        await ask(page, num_inference_steps=200, n=10, negative_prompt="fog", guidance_scale=1, width=256, height=256)
        await page.click("#draw")
        await page.wait_for_selector("#tiles img:not([hidden])")
        await check("drawing")
        await page.click("#cancel")
        await page.wait_for_selector("#drawing[hidden]", state="attached")
        await ask(page, width=128, height=128, n=4)
        await drawn(page)
        await check("finished")
        await page.fill("#width", "5000")
        await page.click("#draw")
        await page.wait_for_selector("#size-fault:not(:empty)")
        await check("error")
        body = {"error": {"message": "the service is full: 128 of 128", "type": "x", "param": None, "code": "x"}}
        await page.route(GENERATIONS, lambda route: route.fulfill(status=503, headers={"Retry-After": "9"}, json=body))
        await page.click("#draw")
        await page.wait_for_selector("#fault:not([hidden])")
        await check("busy")
