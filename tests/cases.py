"""The requests that parity is tried on: every field, every scheduler, the edges of the split."""

from __future__ import annotations

from serve_app.request.schema import ImageRequest, parse_request

_PLAIN = {"prompt": "a red fox in the snow", "seed": 11, "num_inference_steps": 8}
_CASES: dict[str, dict[str, object]] = {
    "defaults": {"prompt": "a lighthouse", "seed": 1},
    **{f"scheduler {name}": {"scheduler": name} for name in
       ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "heun", "ddim", "unipc", "lms")},
    "ddim eta": {"scheduler": "ddim", "eta": 0.7},
    "heun odd split": {"scheduler": "heun", "num_inference_steps": 7, "high_noise_frac": 0.55},
    "wide": {"width": 160, "height": 96},
    "tall": {"width": 72, "height": 200, "scheduler": "dpmpp_2m"},
    "guidance off": {"guidance_scale": 1.0},
    "guidance off in the base": {"guidance_scale": 0.0, "refiner_guidance_scale": 6.0, "negative_prompt": "blurry"},
    "guidance off in the refiner": {"refiner_guidance_scale": 1.0, "negative_prompt": "blurry"},
    "strong guidance": {"guidance_scale": 15.0, "guidance_rescale": 0.7},
    "negative prompt empty": {"negative_prompt": ""},
    "negative prompt given": {"negative_prompt": "blurry, low quality"},
    "negative prompt_2 given": {"negative_prompt": "blurry", "negative_prompt_2": "text, frame"},
    "negative prompt_2 alone": {"negative_prompt_2": "text, frame"},
    "prompt_2": {"prompt_2": "an oil painting"},
    "prompt_2 empty": {"prompt_2": ""},
    "long prompt": {"prompt": "many words " * 40},
    "micro-conditioning": {"original_size": (512, 384), "crops_coords_top_left": (16, 32), "target_size": (256, 200)},
    "negative micro-conditioning": {
        "negative_original_size": (64, 64), "negative_crops_coords_top_left": (8, 40),
        "negative_target_size": (300, 20)},
    "negative original size alone": {"negative_original_size": (64, 64)},
    "negative target size alone": {"negative_target_size": (64, 64)},
    "aesthetic scores": {"aesthetic_score": 2.0, "negative_aesthetic_score": 7.0},
    "clip_skip 1": {"clip_skip": 1},
    "clip_skip 2": {"clip_skip": 2, "negative_prompt": "blurry", "high_noise_frac": 0.5},
    "split 0.5": {"high_noise_frac": 0.5},
    "base alone": {"high_noise_frac": 1.0},
    "base alone ancestral": {"high_noise_frac": 1.0, "scheduler": "euler_ancestral"},
    "one step": {"num_inference_steps": 1},
    "one step, base alone": {"num_inference_steps": 1, "high_noise_frac": 1.0},
    "two steps": {"num_inference_steps": 2, "high_noise_frac": 0.5},
    "two steps dpmpp_2m": {"num_inference_steps": 2, "scheduler": "dpmpp_2m"},
    "refiner from the start": {"num_inference_steps": 4, "high_noise_frac": 0.02},
    "three images": {"n": 3, "num_inference_steps": 6, "scheduler": "euler_ancestral"},
    "fifty steps sde": {"num_inference_steps": 50, "scheduler": "dpmpp_2m_sde"},
}  # fmt: skip

CASES: dict[str, ImageRequest] = {name: parse_request(_PLAIN | fields) for name, fields in _CASES.items()}

# Other work to share passes with: step counts, sizes, schedulers and guidance all differ.
TRAFFIC: list[ImageRequest] = [
    parse_request(
        {
            "prompt": f"picture {number}",
            "seed": 100 + number,
            "num_inference_steps": 6 + 3 * number,
            "scheduler": ("euler", "heun", "ddim", "unipc", "dpmpp_2m_sde", "euler_ancestral")[number % 6],
            "guidance_scale": (7.5, 1.0, 4.0)[number % 3],
            "width": (128, 128, 96)[number % 3],
            "high_noise_frac": (0.8, 0.5)[number % 2],
        }
    )
    for number in range(16)
]
