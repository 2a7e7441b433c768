from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app import __version__
from serve_app.formats.automatic1111 import wire as automatic1111
from serve_app.formats.automatic1111.fields import OVERRIDES, Txt2ImgFields
from serve_app.pictures.infotext import infotext, parse_infotext
from serve_app.request import timesteps
from serve_app.request.errors import InvalidRequest, ModelNotFound, Overloaded, ServiceError
from serve_app.request.facts import ModelFacts, NoiseSchedule
from serve_app.request.limits import Limits
from serve_app.request.resolve import parameters, resolve
from serve_app.request.schema import GeneratedImage, ImageRequest, ImageResult
from tests.fakes import BASE_ALONE
from tests.pictures.test_infotext import FACTS
from tests.strategies import JSON

NAMES = ("sdxl", "other")
SEED = 99
PLAIN = ImageRequest(prompt="p", seed=SEED, guidance_scale=7.0)
SPACED_ANOTHER_WAY = replace(FACTS, base=replace(FACTS.base, noise_schedule=NoiseSchedule(own_sigmas=True)))


def decode(**fields: Any) -> automatic1111.Decoded:
    return automatic1111.decode(json.dumps({"prompt": "p"} | fields).encode(), NAMES, 32, SEED, FACTS)


def decode_for(fields: dict[str, Any], facts: ModelFacts) -> automatic1111.Decoded:
    return automatic1111.decode(json.dumps({"prompt": "p"} | fields).encode(), NAMES, 32, SEED, facts)


def request(**fields: Any) -> ImageRequest:
    (one,) = decode(**fields).requests
    return one


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode(**fields)
    assert "\n" not in caught.value.message
    return caught.value


def like(**fields: Any) -> ImageRequest:
    return PLAIN.model_copy(update=fields)


def test_a_prompt_is_enough_and_the_defaults_are_webuis_but_for_the_size() -> None:
    asked = decode()
    assert asked.requests == [PLAIN]
    assert (PLAIN.num_inference_steps, PLAIN.width, PLAIN.negative_prompt) == (50, None, None)
    assert (asked.send_images, asked.warnings) == (True, ())


def test_webuis_names_are_ours() -> None:
    assert request(
        negative_prompt="n", seed=5, steps=20, cfg_scale=3, width=64, height=128, sampler_name="Euler a", batch_size=2
    ) == ImageRequest(
        prompt="p", negative_prompt="n", seed=5, num_inference_steps=20, guidance_scale=3.0, width=64, height=128,
        scheduler="euler_ancestral", n=2,
    )  # fmt: skip


def test_null_means_absent() -> None:
    assert decode(**dict.fromkeys(Txt2ImgFields.model_fields) | {"prompt": "p"}) == decode()


def test_the_defaults_spelt_out_warn_of_nothing() -> None:
    spelt_out = {name: value for name, value in Txt2ImgFields().model_dump().items() if name != "prompt"}
    assert decode(**spelt_out) == decode()


def test_an_empty_negative_prompt_is_none() -> None:
    assert request(negative_prompt="").negative_prompt is None


@pytest.mark.parametrize(
    ("name", "schedule", "ours"),
    [
        ("Euler", None, "euler"),
        ("euler", "Automatic", "euler"),
        ("k_euler_a", None, "euler_ancestral"),
        ("DPM++ 2M", None, "dpmpp_2m"),
        ("DPM++ 2M", "uniform", "dpmpp_2m"),
        ("DPM++ 2M", "Karras", "dpmpp_2m_karras"),
        ("DPM++ 2M", "Automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M Karras", None, "dpmpp_2m_karras"),
        ("DPM++ 2M Karras", "Automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M SDE", None, "dpmpp_2m_sde"),
        ("Heun", "", "heun"),
        ("DDIM", None, "ddim"),
        ("UniPC", None, "unipc"),
        ("LMS", None, "lms"),
        ("dpmpp_2m_karras", None, "dpmpp_2m_karras"),
    ],
)
def test_sampler_and_schedule_name_one_scheduler(name: str, schedule: str | None, ours: str) -> None:
    assert request(sampler_name=name, scheduler=schedule) == like(scheduler=ours)
    assert request(sampler_index=name, scheduler=schedule) == like(scheduler=ours)


def test_a_sampler_or_schedule_that_is_not_there_is_refused_and_ours_are_listed() -> None:
    listed = "Automatic, Euler, Euler a, DPM++ 2M, DPM++ 2M Karras, DPM++ 2M SDE, Heun, DDIM, UniPC, LMS"
    assert refusal(sampler_name="PLMS").message == f"sampler_name: 'PLMS' is unknown; this service has {listed}"
    assert refusal(sampler_index="PLMS").param == "sampler_index"
    error = refusal(sampler_name="Euler", scheduler="SGM Uniform")
    assert error.message == "scheduler: 'SGM Uniform' is unknown; this service has Automatic, Uniform, Karras"
    assert refusal(sampler_name="Euler", scheduler="Karras").param == "scheduler"
    assert refusal(sampler_name="DPM++ 2M Karras", scheduler="Uniform").param == "scheduler"


def test_what_automatic_is_elsewhere_is_said_where_it_differs() -> None:
    assert decode(sampler_name="DPM++ 2M SDE", scheduler="Automatic").warnings == (
        "scheduler Automatic is Uniform for DPM++ 2M SDE in this service, Exponential in webui",
    )


def test_seed_minus_one_is_drawn_and_pictures_count_on() -> None:
    assert request(seed=-1).seed == SEED
    asked = decode(seed=5, batch_size=4, n_iter=6)
    assert [(one.seed, one.n) for one in asked.requests] == [(5, 10), (15, 10), (25, 4)]
    assert refusal(batch_size=3, n_iter=11).message == (
        "n_iter: 11 times batch_size 3 is 33 pictures, this service takes at most 32"
    )


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, None),
        ({"refiner_checkpoint": ""}, 1.0),
        ({"refiner_checkpoint": "None", "refiner_switch_at": 1.0}, 1.0),
        ({"refiner_checkpoint": "sdxl"}, None),
        ({"refiner_checkpoint": "sd_xl_refiner_1.0.safetensors [7440042bbd]", "refiner_switch_at": 1.0}, 1.0),
    ],
)
def test_which_model_draws(fields: dict[str, Any], share: float | None) -> None:
    assert request(**fields).high_noise_frac == share
    assert decode(**fields).warnings == ()


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M", "UniPC"])
@pytest.mark.parametrize(("switch_at", "steps", "base"), [(0.8, 30, 24), (0.28, 25, 7), (0.5, 7, 4), (0.0, 10, 0)])
def test_refiner_switch_at_counts_steps(sampler: str, switch_at: float, steps: int, base: int) -> None:
    asked = decode(sampler_name=sampler, steps=steps, refiner_checkpoint="refiner", refiner_switch_at=switch_at)
    (one,) = asked.requests
    assert one.scheduler is not None and one.high_noise_frac is not None
    assert timesteps.base_steps(one.scheduler, steps, one.high_noise_frac) == base
    assert asked.warnings == ()


def test_webuis_other_rule_of_the_switch_is_ours() -> None:
    settings = {"refiner_switch_by_sample_steps": False}
    assert (
        request(refiner_checkpoint="refiner", refiner_switch_at=0.7, override_settings=settings).high_noise_frac == 0.7
    )


def test_a_switch_that_no_cut_makes_is_said() -> None:
    asked = decode(sampler_name="DPM++ 2M Karras", steps=150, refiner_checkpoint="refiner", refiner_switch_at=0.99)
    assert asked.warnings == ("refiner_switch_at 0.99 is 149 of 150 steps; the base takes 147: timesteps coincide",)


@pytest.mark.parametrize("fields", [{}, {"refiner_checkpoint": ""}])
def test_a_switch_without_a_refiner_is_said(fields: dict[str, Any]) -> None:
    (warning,) = decode(refiner_switch_at=0.8, **fields).warnings
    assert warning.startswith("refiner_switch_at has no effect")


@pytest.mark.parametrize("fields", [{}, {"refiner_checkpoint": ""}, {"refiner_checkpoint": "refiner"}])
def test_a_rule_for_a_switch_without_one_is_said(fields: dict[str, Any]) -> None:
    (warning,) = decode(override_settings={"refiner_switch_by_sample_steps": False}, **fields).warnings
    assert warning.startswith("override_settings.refiner_switch_by_sample_steps has no effect")
    assert decode(override_settings={"refiner_switch_by_sample_steps": True}, **fields).warnings == (), "holds anyway"


@pytest.mark.parametrize("fields", [{}, {"refiner_switch_at": 0.8}, {"refiner_switch_at": 1.0}])
def test_a_refiner_that_the_service_lacks_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="this service has no refiner") as caught:
        decode_for({"refiner_checkpoint": "sd_xl_refiner_1.0.safetensors"} | fields, BASE_ALONE)
    assert caught.value.param == "refiner_checkpoint"
    assert decode_for({"refiner_checkpoint": "None"}, BASE_ALONE).warnings == ()


def test_what_the_answer_could_not_repeat_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="script_args: holds a number that is too large"):
        automatic1111.decode(b'{"prompt": "p", "script_args": [{"a": 1e999}]}', NAMES, 32, SEED, FACTS)


def test_a_switch_by_steps_that_the_scheduler_spaces_itself_is_said_to_be_rough() -> None:
    fields = {"refiner_checkpoint": "refiner", "refiner_switch_at": 0.8}
    (warning,) = decode_for(fields, SPACED_ANOTHER_WAY).warnings
    assert "only about" in warning
    for sampler in ("DDIM", "Euler a"):
        assert decode_for(fields | {"sampler_name": sampler}, SPACED_ANOTHER_WAY).warnings == ()


def test_eta_is_ddims() -> None:
    assert request(sampler_name="DDIM", eta=0.5).eta == 0.5
    assert decode(sampler_name="Euler a", eta=1).warnings == ()
    assert decode(eta=0.5).warnings == ("eta has no effect: in this service it is DDIM's alone",)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"sd_model_checkpoint": "other"}, {}),
        ({"sd_model_checkpoint": "other.safetensors [0123456789]"}, {}),
        ({"CLIP_stop_at_last_layers": 1}, {}),
        ({"CLIP_stop_at_last_layers": 2}, {}),
        ({"CLIP_stop_at_last_layers": 4}, {"clip_skip": 2}),
        ({"samples_format": "jpg", "jpeg_quality": 80}, {"output_format": "jpeg", "output_compression": 80}),
        ({"sdxl_crop_top": 3, "sdxl_crop_left": 4}, {"crops_coords_top_left": (3, 4)}),
        ({"sdxl_crop_left": 4}, {"crops_coords_top_left": (0, 4)}),
        (
            {"sdxl_refiner_high_aesthetic_score": 5, "sdxl_refiner_low_aesthetic_score": 1.5},
            {"aesthetic_score": 5.0, "negative_aesthetic_score": 1.5},
        ),
        ({"sd_vae": "Automatic", "enable_pnginfo": True, "eta_noise_seed_delta": 0}, {}),
    ],
)
def test_settings_of_one_request(settings: dict[str, Any], fields: dict[str, Any]) -> None:
    asked = decode(override_settings=settings)
    assert asked.requests == [like(**fields)]
    assert asked.warnings == ()


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"CLIP_stop_at_last_layers": 0}, "CLIP_stop_at_last_layers"),
        ({"CLIP_stop_at_last_layers": "2"}, "CLIP_stop_at_last_layers"),
        ({"samples_format": "avif"}, "samples_format"),
        ({"samples_format": ["png"]}, "samples_format"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
        ({"sdxl_crop_left": "4"}, "sdxl_crop_left"),
        ({"sdxl_crop_top": -1}, "sdxl_crop_top"),
        ({"sdxl_refiner_low_aesthetic_score": "x"}, "sdxl_refiner_low_aesthetic_score"),
        ({"refiner_switch_by_sample_steps": 1}, "refiner_switch_by_sample_steps"),
        ({"sd_model_checkpoint": "sd15"}, "sd_model_checkpoint"),
        ({"sd_model_checkpoint": 5}, "sd_model_checkpoint"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], param: str) -> None:
    error = refusal(override_settings=settings)
    assert error.param == f"override_settings.{param}"
    assert error.message.startswith(error.param)


def test_an_unknown_model_is_404() -> None:
    error = refusal(override_settings={"sd_model_checkpoint": "x" * 1_000_000})
    assert isinstance(error, ModelNotFound) and error.status == 404 and len(error.message) < 250


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"styles": ["oil"]}, "styles has no effect"),
        ({"subseed": 5}, "subseed has no effect"),
        ({"tiling": True}, "tiling has no effect"),
        ({"save_images": True}, "save_images has no effect"),
        ({"denoising_strength": 0.4}, "denoising_strength has no effect"),
        ({"hr_scale": 1.5}, "hr_scale has no effect"),
        ({"override_settings": {"sd_vae": "mine"}}, "override_settings.sd_vae has no effect"),
        ({"override_settings": {"enable_pnginfo": False}}, "override_settings.enable_pnginfo has no effect"),
        ({"override_settings": {"foo": 1}}, "override_settings.foo is unknown and was ignored"),
        ({"num_inference_steps": 5}, "num_inference_steps is unknown and was ignored"),
        ({"sampler_name": "Automatic", "sampler_index": "DDIM"}, "sampler_index has no effect beside sampler_name"),
    ],
)
def test_what_has_no_effect_is_said(fields: dict[str, Any], warning: str) -> None:
    assert decode(**fields).warnings == (warning,)
    assert decode(**fields).requests == [PLAIN]


@pytest.mark.parametrize(
    ("prompt", "warning"),
    [
        ("a (cat:1.3)", "prompt: attention weights of webui are read as plain text"),
        ("((cat)) <lora:x:1>", "prompt: extra networks, attention weights of webui are read as plain text"),
        ("a [cat:dog:0.5] AND b", "prompt: prompt editing, AND and BREAK of webui are read as plain text"),
        ("a (small) cat", "prompt: attention weights of webui are read as plain text"),
        ("a cat, [blurry]", "prompt: attention weights of webui are read as plain text"),
        (r"a cat \(small\), 3:2", None),
    ],
)
def test_webuis_syntax_in_a_prompt_is_said_to_be_plain_text(prompt: str, warning: str | None) -> None:
    assert decode(prompt=prompt).warnings == (() if warning is None else (warning,))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("prompt", None),
        ("prompt", " "),
        ("prompt", ["p"]),
        ("seed", -2),
        ("seed", 1.5),
        ("steps", 0),
        ("steps", 501),
        ("steps", "20"),
        ("cfg_scale", -1),
        ("cfg_scale", "7"),
        ("width", 65),
        ("height", 0),
        ("batch_size", 0),
        ("n_iter", True),
        ("sampler_name", 5),
        ("refiner_checkpoint", "sd15"),
        ("refiner_switch_at", 1.1),
        ("override_settings", []),
        ("styles", "oil"),
        ("tiling", "yes"),
        ("enable_hr", True),
        ("script_name", "x/y/z plot"),
        ("alwayson_scripts", {"controlnet": {"args": []}}),
        ("prompt_2", 5),
        ("infotext", "p\nSteps: many, Seed: 1, CFG scale: 1"),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(name: str, wrong: Any) -> None:
    error = refusal(**{name: wrong})
    assert error.param == name
    assert error.message.startswith(f"{name}: ")


def test_sdxls_own_fields_ride_beside_webuis() -> None:
    asked = decode(prompt_2="q", guidance_rescale=0.5, original_size=[64, 32])
    assert asked.requests == [like(prompt_2="q", guidance_rescale=0.5, original_size=(64, 32))]
    assert asked.warnings == ()


def test_an_infotext_gives_what_the_body_does_not() -> None:
    text = (
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 3, "
        "Size: 64x128, Model: elsewhere, Clip skip: 3, Version: v1.10.0, Hires upscale: 2"
    )
    body = json.dumps({"infotext": text, "steps": 30, "prompt": "two cats"}).encode()
    asked = automatic1111.decode(body, NAMES, 32, SEED, FACTS)
    assert asked.requests == [
        ImageRequest(
            prompt="two cats", negative_prompt="dog", num_inference_steps=30, scheduler="dpmpp_2m_karras",
            guidance_scale=4.0, seed=3, width=64, height=128, clip_skip=1, high_noise_frac=1.0,
        )
    ]  # fmt: skip
    assert asked.warnings == (
        "infotext: Hires upscale is unknown and was ignored",
        "infotext: Model is another than this service's sdxl",
    )
    assert decode(infotext="a cat\nSteps: 5, CFG scale: 2, Size: 64x64, Seed: 1", negative_prompt="").requests == [
        ImageRequest(
            prompt="p", num_inference_steps=5, guidance_scale=2.0, seed=1, width=64, height=64,
            high_noise_frac=1.0,
        )
    ]  # fmt: skip
    assert request(infotext="a cat") == like(high_noise_frac=1.0)


def test_a_pictures_own_infotext_draws_it_again() -> None:
    asked = ImageRequest(
        prompt="p", negative_prompt="", prompt_2="q", seed=5, scheduler="heun", high_noise_frac=0.6, n=1, width=64,
        height=64, original_size=(10, 20), num_inference_steps=13,
    )  # fmt: skip
    drawn = parameters(resolve(asked, FACTS, Limits()), 0)
    body = json.dumps({"infotext": infotext(drawn, "sdxl")}).encode()
    again = automatic1111.decode(body, NAMES, 32, SEED, FACTS).requests[0]
    # webui zeroes an empty negative prompt, which for this base is a missing one
    assert again == asked.model_copy(update={"negative_prompt": None})


def result(request: ImageRequest, width: int = 64, height: int = 72) -> ImageResult:
    assert request.seed is not None
    images = [
        GeneratedImage(b"one", request.seed + index, request.output_format, width, height) for index in range(request.n)
    ]
    return ImageResult(images, warnings=["cut"], created=1_700_000_000)


def test_the_response_is_webuis() -> None:
    asked = decode(
        negative_prompt="n", seed=5, batch_size=2, steps=10, sampler_name="DPM++ 2M Karras", tiling=True,
        refiner_checkpoint="refiner", refiner_switch_at=0.5,
    )  # fmt: skip
    body = automatic1111.encode(asked, [result(one) for one in asked.requests], "sdxl", FACTS)
    assert [base64.b64decode(image) for image in body["images"]] == [b"one", b"one"]
    assert body["warnings"] == ["tiling has no effect", "cut"]
    assert body["parameters"] == Txt2ImgFields().model_dump() | {
        "prompt": "p", "negative_prompt": "n", "seed": 5, "batch_size": 2, "steps": 10, "tiling": True,
        "sampler_name": "DPM++ 2M Karras", "refiner_checkpoint": "refiner", "refiner_switch_at": 0.5,
    }  # fmt: skip
    info = json.loads(body["info"])
    line = (
        "p\nNegative prompt: n\nSteps: 10, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: {}, "
        "Size: 64x72, Model: sdxl, Refiner: sdxl, Refiner switch at: 0.5, Refiner switch by sampling steps: True, "
        f"Version: sdxl-serve {__version__}"
    )
    assert info.pop("infotexts") == [line.format(5), line.format(6)]
    assert info == {
        "prompt": "p", "all_prompts": ["p", "p"], "negative_prompt": "n", "all_negative_prompts": ["n", "n"],
        "seed": 5, "all_seeds": [5, 6], "subseed": -1, "all_subseeds": [-1, -1], "subseed_strength": 0,
        "width": 64, "height": 72, "sampler_name": "DPM++ 2M", "cfg_scale": 7.0, "steps": 10, "batch_size": 2,
        "restore_faces": False, "face_restoration_model": None, "sd_model_name": "sdxl", "sd_model_hash": None,
        "sd_vae_name": None, "sd_vae_hash": None, "seed_resize_from_w": -1, "seed_resize_from_h": -1,
        "denoising_strength": None, "index_of_first_image": 0, "styles": [], "job_timestamp": "20231114221320",
        "extra_generation_params": {"Schedule type": "Karras", "Refiner": "sdxl", "Refiner switch at": "0.5"},
        "clip_skip": 1, "is_using_inpainting_conditioning": False, "version": f"sdxl-serve {__version__}",
    }  # fmt: skip


@pytest.mark.parametrize("facts", [FACTS, replace(FACTS, refiner=None)])
def test_info_and_the_picture_hold_the_same_infotext(facts: ModelFacts) -> None:
    asked = decode(seed=5, batch_size=2, override_settings={"CLIP_stop_at_last_layers": 3}, prompt_2="q")
    resolved = resolve(asked.requests[0], facts, Limits())
    body = automatic1111.encode(asked, [result(asked.requests[0], 128, 128)], "sdxl", facts)
    own = facts.base.native_scheduler
    assert json.loads(body["info"])["infotexts"] == [infotext(parameters(resolved, i), "sdxl", own) for i in (0, 1)]


def test_pictures_can_be_left_out() -> None:
    asked = decode(send_images=False)
    body = automatic1111.encode(asked, [result(one) for one in asked.requests], "sdxl", BASE_ALONE)
    assert body["images"] == [] and json.loads(body["info"])["all_seeds"] == [SEED]


def test_an_error_has_webuis_keys_and_words() -> None:
    assert automatic1111.encode_error(Overloaded("full")) == {
        "error": "Overloaded", "detail": "full", "body": "", "errors": "full"
    }  # fmt: skip
    error = InvalidRequest("num_inference_steps: 300 is above", param="num_inference_steps")
    assert automatic1111.encode_error(error)["detail"] == "steps: 300 is above"


def test_the_schema_has_every_field_that_is_read_and_its_example_is_accepted() -> None:
    schema = automatic1111.txt2img_schema()
    assert set(schema["properties"]) >= set(Txt2ImgFields.model_fields) | {"prompt_2", "original_size"}
    assert set(schema["properties"]["override_settings"]["properties"]) == set(OVERRIDES)
    assert decode(**schema["example"]).warnings == ()


KEYS = st.sampled_from([*Txt2ImgFields.model_fields, "prompt_2", "original_size", "\ud800"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=6), st.dictionaries(st.sampled_from([*OVERRIDES, "x"]), JSON, max_size=3))
def test_no_body_raises_anything_but_an_error_with_one_line(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    try:
        decode(**fields, **({} if "override_settings" in fields else {"override_settings": overrides}))
    except ServiceError as error:
        assert "\n" not in error.message
        json.dumps(automatic1111.encode_error(error), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "fields",
    [{"steps": 10**12}, {"steps": 501}, {"infotext": "p\nSteps: 0, Sampler: Euler, CFG scale: 7"}],
    ids=["very many", "too many", "none"],
)
def test_a_split_of_impossible_steps_is_refused_before_it_is_computed(fields: dict[str, Any]) -> None:
    error = refusal(**fields, refiner_checkpoint="refiner", refiner_switch_at=0.8)
    assert error.param == "steps" and error.status == 400


def test_a_long_line_is_read_in_linear_time_and_a_longer_one_not_at_all() -> None:
    """Without bounds in the reader's pattern the first takes longer than the whole suite may."""
    for line in ("a" * 500_000, "b" + " " * 65_534 + "a"):
        assert parse_infotext(line)["Prompt"] == line
    assert decode(infotext="a" * 65_536).requests[0].prompt == "p"
    assert refusal(infotext="a" * 65_537).param == "infotext"
