"""The fields of webui's txt2img: names, types, defaults, and what each does here.

A field's description is a `Warns` where it has no effect, a `Refused` where it asks for what isn't served.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve_app.formats.words import Refused, Warns
from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import ImageRequest

_HIRES = Warns("Of the second pass. No effect (warns).")
_NOTHING = Warns("No effect (warns).")
_NOISE = Warns("Noise of k-diffusion's samplers. No effect (warns).")
_SUBSEED = Warns("Of the variation seed. No effect (warns).")


class Txt2ImgFields(BaseModel):
    """The body of a request, webui's defaults; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str | None = Field(None, description="What to draw. webui's syntax of weights in it is plain text here.")
    negative_prompt: str = Field("", description="What not to draw; empty is none.")
    seed: int = Field(-1, ge=-1, description="Seed of the first picture; -1 draws one. Picture i has seed + i.")
    sampler_name: str | None = Field(
        None,
        description="A name of /sdapi/v1/samplers; the checkpoint's own (SDXL's is Euler) if absent.",
    )
    sampler_index: str | None = Field(None, description="Older name of sampler_name.")
    scheduler: str | None = Field(None, description="A name of /sdapi/v1/schedulers: Karras goes with DPM++ 2M.")
    batch_size: int = Field(1, ge=1, le=1000, description="Pictures of a batch.")
    n_iter: int = Field(1, ge=1, le=1000, description="Batches: batch_size x n_iter pictures in all.")
    steps: int = Field(50, ge=1, description="Denoising steps, base and refiner together.")
    cfg_scale: float = Field(7.0, description="Classifier-free guidance scale; guidance is on above 1.")
    width: int | None = Field(None, description="Width in pixels, a multiple of 8; the checkpoint's own if absent.")
    height: int | None = Field(None, description="Height in pixels, a multiple of 8; the checkpoint's own if absent.")
    eta: float | None = Field(None, description="DDIM's eta.")
    refiner_checkpoint: str | None = Field(
        None, description="refiner, or this service's model: the refiner takes part. None: the base alone."
    )
    refiner_switch_at: float | None = Field(
        None, ge=0.0, le=1.0, description="Share of the steps that the base takes, with refiner_checkpoint."
    )
    override_settings: dict[str, Any] = Field(default_factory=dict, description="webui's settings for this request.")
    infotext: str | None = Field(
        None,
        max_length=65_536,
        description="A picture's infotext: its parameters hold where the body has none of its own.",
    )
    send_images: bool = Field(True, description="false: the answer has no pictures, info alone.")

    enable_hr: bool = Field(
        False, description=Refused("true is refused: there is no second pass; ask for the size itself.")
    )
    script_name: str | None = Field(None, description=Refused("A name is refused: there are no scripts."))
    alwayson_scripts: dict[str, Any] = Field(
        default_factory=dict, description=Refused("Any is refused: there are no scripts.")
    )

    script_args: list[Any] = Field(default_factory=list, description=_NOTHING)
    save_images: bool = Field(False, description=Warns("Nothing is saved on the server. No effect (warns)."))
    do_not_save_samples: bool = Field(False, description=Warns("Nothing is saved in any case. No effect (warns)."))
    do_not_save_grid: bool = Field(False, description=Warns("Nothing is saved in any case. No effect (warns)."))
    styles: list[str] = Field(default_factory=list, description=Warns("There are no styles. No effect (warns)."))
    subseed: int = Field(-1, description=_SUBSEED)
    subseed_strength: float = Field(0.0, description=_SUBSEED)
    seed_resize_from_h: int = Field(-1, description=_SUBSEED)
    seed_resize_from_w: int = Field(-1, description=_SUBSEED)
    seed_enable_extras: bool = Field(True, description=_SUBSEED)
    restore_faces: bool = Field(False, description=_NOTHING)
    tiling: bool = Field(False, description=_NOTHING)
    denoising_strength: float = Field(0.75, description=_HIRES)
    s_min_uncond: float = Field(0.0, description=_NOISE)
    s_churn: float = Field(0.0, description=_NOISE)
    s_tmax: float = Field(0.0, description=_NOISE)
    s_tmin: float = Field(0.0, description=_NOISE)
    s_noise: float = Field(1.0, description=_NOISE)
    override_settings_restore_afterwards: bool = Field(
        True, description=Warns("Settings always hold for one request alone. No effect (warns).")
    )
    disable_extra_networks: bool = Field(False, description=Warns("There are no extra networks. No effect (warns)."))
    firstpass_image: str | None = Field(None, description=_HIRES)
    firstphase_width: int = Field(0, description=_HIRES)
    firstphase_height: int = Field(0, description=_HIRES)
    hr_scale: float = Field(2.0, description=_HIRES)
    hr_upscaler: str | None = Field(None, description=_HIRES)
    hr_second_pass_steps: int = Field(0, description=_HIRES)
    hr_resize_x: int = Field(0, description=_HIRES)
    hr_resize_y: int = Field(0, description=_HIRES)
    hr_checkpoint_name: str | None = Field(None, description=_HIRES)
    hr_sampler_name: str | None = Field(None, description=_HIRES)
    hr_scheduler: str | None = Field(None, description=_HIRES)
    hr_prompt: str = Field("", description=_HIRES)
    hr_negative_prompt: str = Field("", description=_HIRES)
    token_merging_ratio: float = Field(0.0, description=_NOTHING)
    token_merging_ratio_hr: float = Field(0.0, description=_HIRES)
    force_task_id: str | None = Field(
        None,
        max_length=200,
        description="A name for this body, hard to guess: /internal/progress takes it as id_task, and, ours, so do "
        "progress, interrupt and skip of /sdapi/v1 in the query. One that is under way already is an error.",
    )
    comments: dict[str, Any] = Field(default_factory=dict, description=_NOTHING)


OVERRIDES: dict[str, str] = {
    "sd_model_checkpoint": Refused("A name that this service does not have is refused."),
    "CLIP_stop_at_last_layers": "1 and 2: SDXL's own layer; above 2: clip_skip is this less 2.",
    "samples_format": "File format of the pictures: png, jpg or webp.",
    "jpeg_quality": "Quality of a jpg or webp.",
    "refiner_switch_by_sample_steps": "false: refiner_switch_at is a share of the training timesteps.",
    "sdxl_crop_top": "Micro-conditioning: top of the crop, in pixels.",
    "sdxl_crop_left": "Micro-conditioning: left of the crop, in pixels.",
    "sdxl_refiner_high_aesthetic_score": "Aesthetic score that conditions the refiner.",
    "sdxl_refiner_low_aesthetic_score": "Negative aesthetic score of the refiner.",
    "sd_vae": Warns("The VAE is the checkpoint's. No effect (warns)."),
    "sdxl_clip_l_skip": Warns("Both text encoders skip alike. No effect (warns)."),
    "eta_noise_seed_delta": Warns("No effect (warns)."),
    "enable_pnginfo": Warns("Pictures hold their parameters in any case. No effect (warns)."),
    "return_grid": Warns("There are no grids. No effect (warns)."),
    "face_restoration_model": Warns("No effect (warns)."),
}

# Fields of `ImageRequest` that webui has under a name of its own.
COUNTERPARTS: dict[str, str] = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "n": "batch_size",
    "high_noise_frac": "refiner_switch_at",
    "clip_skip": "override_settings.CLIP_stop_at_last_layers",
    "crops_coords_top_left": "override_settings.sdxl_crop_top",
    "aesthetic_score": "override_settings.sdxl_refiner_high_aesthetic_score",
    "negative_aesthetic_score": "override_settings.sdxl_refiner_low_aesthetic_score",
    "output_format": "override_settings.samples_format",
    "output_compression": "override_settings.jpeg_quality",
}
# SDXL's own, which webui has no name for: they may stand beside its fields.
OWN_FIELDS: tuple[str, ...] = tuple(
    name for name in ImageRequest.model_fields if name not in Txt2ImgFields.model_fields and name not in COUNTERPARTS
)
# What the answer repeats of fields that were not given.
DEFAULTS: dict[str, Any] = Txt2ImgFields().model_dump()

# Other ways to say what the default says.
_ALSO_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "denoising_strength": (0.0, 0.7),  # other defaults of its clients
    "seed_resize_from_h": (0,),
    "seed_resize_from_w": (0,),
    "hr_upscaler": ("", "None", "Latent"),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "firstpass_image": ("",),
}
_NEUTRAL_OVERRIDES: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", ""),
    "sdxl_clip_l_skip": (False,),
    "eta_noise_seed_delta": (0,),
    "enable_pnginfo": (True,),
    "return_grid": (False,),
    "face_restoration_model": ("", "None"),
}
_REFUSED = {
    "enable_hr": "this service has no second pass; ask for the final size with width and height",
    "script_name": "this service has no scripts",
    "alwayson_scripts": "this service has no scripts",
}


def no_effect(asked: Txt2ImgFields) -> list[str]:
    """Warnings of the fields that have none. Raises `InvalidRequest` on what is refused."""
    for name, reason in _REFUSED.items():
        if getattr(asked, name):
            raise InvalidRequest(f"{name}: {reason}", param=name)
    return [
        f"{name} has no effect"
        for name in Txt2ImgFields.model_fields
        if name in asked.model_fields_set
        and isinstance(Txt2ImgFields.model_fields[name].description, Warns)
        and getattr(asked, name) not in (DEFAULTS[name], *_ALSO_NEUTRAL.get(name, ()))
    ]


def override_has_no_effect(name: str, value: Any) -> bool:
    """Whether a setting of `override_settings` asks for something that is not done."""
    return name in _NEUTRAL_OVERRIDES and value not in _NEUTRAL_OVERRIDES[name]
