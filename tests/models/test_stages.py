"""The tensor work of the stages, without Ray: what batching, precision and broken numbers do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config.settings import ComputeConfig
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.decode import Decoder
from serve_app.models.denoise import UNetRunner
from serve_app.models.device import Compute, is_context_broken, set_up
from serve_app.models.encode import TextEncoders, TextJob
from serve_app.request.errors import ConfigurationError, InvalidRequest, PictureFailed
from serve_app.runtime.tasks import DenoiseTask, EncodeTask, Noise, StageConditioning

FLOAT32 = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def base(tiny: Path) -> Checkpoint:
    return Checkpoint(tiny / "base", None)


def test_auto_is_float32_on_the_cpu() -> None:
    assert set_up(ComputeConfig(), gpu_fraction=0.0) == FLOAT32
    assert set_up(ComputeConfig(dtype="bfloat16")).dtype == torch.bfloat16


ALLOCATES = """
import resource, sys, threading, torch
from serve_app.config.settings import ComputeConfig
from serve_app.models.device import set_up
if sys.argv[1] == "set-up":
    set_up(ComputeConfig(torch_threads=1))

def allocate(passes):
    for _ in range(passes):  # as a forward pass does: several at once, all freed before the next pass
        tensors = [torch.ones(250_000) for _ in range(8)]
        del tensors

def count():
    allocate(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate(50)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=count)  # as the engine's, whose memory is not the main thread's
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_that_a_pass_frees_is_there_for_the_next_one() -> None:
    def pages(*arguments: str) -> int:
        command = [sys.executable, "-c", ALLOCATES, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages_of_a_pass = 8 * 1_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert pages("as-it-comes") > 5 * pages_of_a_pass  # or there is nothing to see here
    assert pages("set-up") < pages_of_a_pass


def test_a_gpu_that_was_not_booked_is_not_used() -> None:
    with pytest.raises(ConfigurationError, match="no num_gpus"):
        set_up(ComputeConfig(device="cuda"), gpu_fraction=0.0)


def test_a_broken_context_is_told_from_a_full_memory() -> None:
    assert is_context_broken(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_context_broken(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_context_broken(RuntimeError("CUDA error: out of memory"))
    assert not is_context_broken(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    assert is_context_broken(RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    assert not is_context_broken(RuntimeError("shape mismatch"))


def test_one_forward_pass_serves_base_and_refiner(tiny: Path, base: Checkpoint) -> None:
    encoders = TextEncoders(base, Checkpoint(tiny / "refiner", None), FLOAT32)
    assert encoders.refiner_shares_encoder
    jobs = encoders.jobs(EncodeTask("p", None, None, None, None, True, True, True))
    assert set(jobs.values()) == {
        TextJob("text_encoder", "p"),
        TextJob("text_encoder_2", "p"),
        TextJob("text_encoder_2", ""),  # the refiner's missing negative is encoded, the base's is zeros
    }


def test_a_refiner_with_other_files_has_its_own_encoder(tiny: Path, base: Checkpoint, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny / "refiner", tmp_path / "refiner"))
    config = other / "text_encoder_2" / "config.json"
    settings = json.loads(config.read_text())
    # Who wrote the files does not count, nor does another variant beside the weights ...
    config.write_text(json.dumps(settings | {"transformers_version": "4.32.0", "_name_or_path": "elsewhere"}))
    shutil.copy(other / "text_encoder_2" / "model.safetensors", other / "text_encoder_2" / "model.fp16.safetensors")
    assert TextEncoders(base, Checkpoint(other, None), FLOAT32).refiner_shares_encoder
    # ... but what it computes does.
    config.write_text(json.dumps(settings | {"layer_norm_eps": 1e-3}))
    encoders = TextEncoders(base, Checkpoint(other, None), FLOAT32)
    assert not encoders.refiner_shares_encoder
    jobs = encoders.jobs(EncodeTask("p", "q", None, None, None, True, True, False))
    assert jobs["refiner prompt"] == TextJob("refiner_text_encoder_2", "p")
    assert jobs["prompt_2"] == TextJob("text_encoder_2", "q")


def test_texts_encode_alike_alone_and_together(base: Checkpoint) -> None:
    encoders = TextEncoders(base, None, FLOAT32)
    jobs = [TextJob("text_encoder_2", text, skip) for text, skip in (("a", 0), ("b c", 2), ("é 🙂 " * 50, 1))]
    for job, together in zip(jobs, encoders.embed(jobs), strict=True):
        (alone,) = encoders.embed([job])
        assert together.pooled is not None and alone.pooled is not None
        np.testing.assert_allclose(together.hidden, alone.hidden, atol=1e-4)
        np.testing.assert_allclose(together.pooled, alone.pooled, atol=1e-4)
        assert together.cut == alone.cut
    assert not encoders.embed(jobs[:1])[0].cut
    assert encoders.embed(jobs[2:])[0].cut


def task(width: int = 128, height: int = 128, **fields: object) -> DenoiseTask:
    text = np.random.default_rng(0).standard_normal((77, 56), dtype=np.float32)
    pooled = np.random.default_rng(1).standard_normal(32, dtype=np.float32)
    given: dict[str, object] = {
        "id": "t", "conditioning": StageConditioning(text, pooled, text * 0, pooled * 0), "start": Noise(1),
        "width": width, "height": height, "scheduler": None, "num_inference_steps": 4, "guidance_scale": 5.0,
        "guidance_rescale": 0.0, "eta": 0.0, "time_ids": (height, width, 0, 0, height, width),
        "negative_time_ids": (height, width, 0, 0, height, width),
    }  # fmt: skip
    return DenoiseTask(**(given | fields))  # type: ignore[arg-type]


def test_a_forward_pass_changes_no_state(base: Checkpoint) -> None:
    denoiser = UNetRunner(base, FLOAT32)
    state = denoiser.begin(task(scheduler="heun"))
    before = state.latents.clone()
    first, second = denoiser.forward([state])[0], denoiser.forward([state])[0]
    assert torch.equal(first, second)
    assert torch.equal(state.latents, before) and state.index == 0


@pytest.mark.parametrize(
    ("own", "fields", "param"),
    [
        ({"use_beta_sigmas": True}, {"scheduler": "dpmpp_2m_karras"}, "scheduler"),
        ({"_class_name": "LCMScheduler"}, {"num_inference_steps": 60}, "num_inference_steps"),
    ],
)
def test_what_the_checkpoints_scheduler_refuses_is_the_requests_fault(
    tiny: Path, tmp_path: Path, own: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    for name, change in (
        ("scheduler/scheduler_config.json", lambda c: c | own),
        ("model_index.json", _with_class(own)),
    ):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    denoiser = UNetRunner(Checkpoint(tmp_path / "base", None), FLOAT32)
    denoiser.begin(task())
    with pytest.raises(InvalidRequest, match=f"^{param}: ") as caught:
        denoiser.begin(task(**fields))
    assert caught.value.param == param and "\n" not in caught.value.message


def _with_class(own: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda index: index | ({"scheduler": ["diffusers", own["_class_name"]]} if "_class_name" in own else {})


def test_shapes_that_cannot_share_a_pass_have_other_keys(base: Checkpoint) -> None:
    denoiser = UNetRunner(base, FLOAT32)
    sizes = ((128, 128), (128, 96), (96, 128))
    keys = {denoiser.job(denoiser.begin(task(width, height)), "a", 0.0).key for width, height in sizes}
    assert len(keys) == 3


def test_a_trajectory_is_on_the_device_from_its_first_pass_on(base: Checkpoint) -> None:
    denoiser = UNetRunner(base, FLOAT32)
    waiting, going = denoiser.begin(task()), denoiser.begin(task())
    # A device without memory of its own: what is put there is there, and can be told from the CPU's.
    denoiser._compute = Compute(torch.device("meta"), torch.float16)
    denoiser._place(going)
    tensors = ("latents", "prompt_embeds", "pooled", "time_ids")
    assert {getattr(going, name).device.type for name in tensors} == {"meta"}
    assert {getattr(waiting, name).device.type for name in tensors} == {"cpu"}
    assert (going.prompt_embeds.dtype, going.pooled.dtype) == (torch.float16, torch.float16)
    assert (going.latents.dtype, going.time_ids.dtype) == (torch.float32, torch.float32)


def test_a_task_whose_replica_died_asks_to_run_alone(base: Checkpoint) -> None:
    denoiser = UNetRunner(base, FLOAT32)
    assert [denoiser.job(denoiser.begin(task(deaths=n)), "a", 0.0).alone for n in (0, 1)] == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_stay_float32_whatever_the_unet_computes_in(base: Checkpoint, dtype: torch.dtype) -> None:
    denoiser = UNetRunner(base, Compute(torch.device("cpu"), dtype))
    state = denoiser.begin(task())
    (output,) = denoiser.forward([state])
    denoiser.advance(state, output)
    assert output.dtype == state.latents.dtype == torch.float32
    assert bool(state.latents.isfinite().all())


def latents(value: float = 0.1) -> np.ndarray:
    return np.full((4, 16, 16), value, dtype=np.float32)


def test_float16_is_upcast_where_the_checkpoint_forces_it(base: Checkpoint) -> None:
    decoder = Decoder(base, Compute(torch.device("cpu"), torch.float16))
    assert decoder._vae.dtype == torch.float32


def test_a_picture_that_is_not_finite_is_decoded_again_in_float32(base: Checkpoint) -> None:
    decoder = Decoder(base, Compute(torch.device("cpu"), torch.bfloat16))
    mate = decoder.decode([latents()])[0]
    plain = decoder._decode

    def overflow(batch: torch.Tensor) -> torch.Tensor:
        images = plain(batch)
        if decoder._vae.dtype == torch.bfloat16:
            images[0] = float("nan")
        return images

    decoder._decode = overflow  # type: ignore[method-assign]
    broken, fine = decoder.decode([latents(0.3), latents()])
    assert not isinstance(broken, PictureFailed) and not isinstance(fine, PictureFailed)
    assert decoder.float32_retries == 1
    assert decoder._vae.dtype == torch.bfloat16
    reference = Decoder(base, FLOAT32).decode([latents(0.3)])[0]
    assert np.abs(np.asarray(broken, int) - np.asarray(reference, int)).max() <= 6  # weights were rounded to bfloat16
    # A batch of two and one of one differ by rounding in bfloat16, no more.
    assert np.abs(np.asarray(fine, int) - np.asarray(mate, int)).max() <= 3


def test_a_picture_that_stays_not_finite_is_an_error_and_no_black_image(base: Checkpoint) -> None:
    decoder = Decoder(base, FLOAT32)
    broken, fine = decoder.decode([latents(float("nan")), latents()])
    assert isinstance(broken, PictureFailed)
    assert isinstance(fine, np.ndarray) and fine.shape == (128, 128, 3) and fine.dtype == np.uint8
