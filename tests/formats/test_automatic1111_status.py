from __future__ import annotations

import json

import pytest

from serve_app.formats.automatic1111 import status as automatic1111_status
from serve_app.formats.automatic1111 import wire as automatic1111
from serve_app.formats.automatic1111.fields import OVERRIDES
from serve_app.formats.automatic1111.status import Job, Tracker
from serve_app.request.schedulers import NAMES
from serve_app.request.schema import GeneratedImage, ImageReady, ImageRequest, Progress
from tests.fakes import FACTS


def test_nothing_is_drawn() -> None:
    assert automatic1111_status.encode_progress(None) == {
        "progress": 0.0,
        "eta_relative": 0.0,
        "state": {
            "skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
            "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0,
        },
        "current_image": None,
        "textinfo": None,
    }  # fmt: skip


def test_a_job_on_its_way() -> None:
    job = Job(images=2, images_done=1, step=15, steps=30, started=1_700_000_000, elapsed_s=6.0, interrupted=True)
    body = automatic1111_status.encode_progress(job, "UE5H")
    assert (body["progress"], body["eta_relative"], body["current_image"]) == (0.75, 2.0, "UE5H")
    assert body["state"] == {
        "skipped": False, "interrupted": True, "stopping_generation": False, "job": "txt2img", "job_count": 2,
        "job_timestamp": "20231114221320", "job_no": 1, "sampling_step": 15, "sampling_steps": 30,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("job", "progress"),
    [
        (Job(1, 0, 0, 0, 0, 1.0), 0.0),
        (Job(1, 0, 40, 30, 0, 1.0), 1.0),  # Heun takes more steps than were asked for
        (Job(0, 0, 0, 0, 0, 1.0), 0.0),
        (Job(2, 2, 30, 30, 0, 1.0), 1.0),
    ],
)
def test_progress_stays_between_0_and_1(job: Job, progress: float) -> None:
    body = automatic1111_status.encode_progress(job)
    assert body["progress"] == progress and body["eta_relative"] >= 0


def test_a_body_is_followed_through_its_streams() -> None:
    tracker = Tracker(images=3, steps=10, started=100.0)
    assert tracker.job(101.0).progress == 0.0
    for step in (1, 2, 8):
        tracker.see(Progress("denoise", 0, step, 8))
    tracker.see(Progress("denoise", 1, 3, 8))
    tracker.see(Progress("refine", 0, 1, 2))
    tracker.see(Progress("decode", 0))
    assert tracker.job(102.0) == Job(3, 0, 9, 10, 100, 2.0)
    tracker.see(ImageReady(0, GeneratedImage(b"", 1, "png", 8, 8)))
    assert tracker.job(103.0) == Job(3, 1, 3, 10, 100, 3.0)
    tracker.see(Progress("denoise", 0, 5, 8), first_image=2)  # of the body's second request
    tracker.interrupted = True
    assert tracker.job(104.0) == Job(3, 1, 5, 10, 100, 4.0, interrupted=True)


def test_every_listed_name_is_accepted() -> None:
    samplers = automatic1111_status.encode_samplers()
    schedulers = automatic1111_status.encode_schedulers()
    names = ("sdxl", "other")
    bodies = [
        *({"sampler_name": name} for item in samplers for name in (item["name"], *item["aliases"])),
        *(
            {"sampler_name": "DPM++ 2M", "scheduler": name}
            for item in schedulers
            for name in (item["name"], item["label"])
        ),
        *(
            {"override_settings": {"sd_model_checkpoint": item["title"]}}
            for item in automatic1111_status.encode_models(names)
        ),
    ]
    drawn = {
        automatic1111.decode(json.dumps({"prompt": "p"} | body).encode(), names, 1, 0, FACTS).requests[0].scheduler
        for body in bodies
    }
    assert drawn == {None, *NAMES}  # every scheduler of ours can be reached, and the checkpoint's own


def test_the_options_are_those_that_hold_anyway() -> None:
    options = automatic1111_status.encode_options(("sdxl",))
    override = {name: value for name, value in options.items() if name in OVERRIDES}
    body = {"prompt": "p", "override_settings": override}
    asked = automatic1111.decode(json.dumps(body).encode(), ("sdxl",), 1, 7, FACTS)
    assert asked.warnings == ()
    assert asked.requests == [ImageRequest(prompt="p", seed=7, guidance_scale=7.0, output_compression=95)]


def test_the_rest_answers_in_shape() -> None:
    assert automatic1111_status.encode_interrupt() == automatic1111_status.encode_ping() == {}
    assert automatic1111_status.encode_cmd_flags()["api"] is True
