"""The UNet's trace against the UNet itself: no number may differ, whatever the pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.config.settings import DEMO_FOLDER
from serve_app.models.backends.eager import Eager
from serve_app.models.backends.rows import Rows
from serve_app.models.backends.traced import Traced
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.denoise import UNetRunner
from serve_app.models.device import Compute
from serve_app.models.loading import load_unet
from serve_app.request.errors import ConfigurationError

# rows, latent height and width, tokens: one row, many, beyond the 64 where diffusers copies, small, large, wide, long
# prompts, and sides that the UNet does not halve evenly.
CPU = Compute(torch.device("cpu"), torch.float32)
PASSES = [
    (1, 16, 16, 77),
    (7, 16, 16, 77),
    (65, 8, 8, 77),
    (2, 4, 4, 77),
    (2, 64, 48, 77),
    (3, 8, 32, 231),
    (2, 18, 16, 77),
    (2, 17, 15, 154),
]


@pytest.fixture(scope="module", params=["base", "refiner"])
def both(request: pytest.FixtureRequest) -> tuple[Any, Eager, Traced, int]:
    unet = load_unet(Checkpoint(DEMO_FOLDER / request.param, None), torch.float32)
    time_ids = 6 if request.param == "base" else 5
    return unet, Eager(unet), Traced(unet, CPU, time_ids), time_ids


def rows_of(unet: Any, rows: int, height: int, width: int, tokens: int, time_ids: int) -> Rows:
    generator = torch.Generator().manual_seed(rows * height + width)
    pooled = unet.config.projection_class_embeddings_input_dim - time_ids * unet.config.addition_time_embed_dim
    return Rows(
        torch.randn(rows, 4, height, width, generator=generator),
        torch.linspace(1, 999, rows),
        torch.randn(rows, tokens, unet.config.cross_attention_dim, generator=generator),
        torch.randn(rows, pooled, generator=generator),
        torch.randint(0, 1024, (rows, time_ids), generator=generator).float(),
    )


@pytest.mark.parametrize(("rows", "height", "width", "tokens"), PASSES)
def test_a_trace_gives_the_very_numbers_of_the_unet(
    both: tuple[Any, Eager, Traced, int], rows: int, height: int, width: int, tokens: int
) -> None:
    unet, eager, traced, time_ids = both
    given = rows_of(unet, rows, height, width, tokens, time_ids)
    with torch.inference_mode():
        assert torch.equal(traced(given), eager(given))


def test_the_cpu_traces_unless_told_otherwise(tiny: Path) -> None:
    base, compute = Checkpoint(tiny / "base", None), Compute(torch.device("cpu"), torch.float32)
    assert [type(UNetRunner(base, compute, trace)._backend) for trace in ("auto", True, False)] == [
        Traced,
        Traced,
        Eager,
    ]


class Counting(torch.nn.Module):
    """A model whose numbers depend on a shape as no trace sees it."""

    def __init__(self, inner: Any, how: str) -> None:
        super().__init__()
        self.inner, self.config, self.num_upsamplers, self.how = inner, inner.config, inner.num_upsamplers, how

    def forward(self, sample: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        (noise,) = self.inner(sample, *arguments, **keywords)
        rows = int(noise.shape[0])
        return (noise * rows if self.how == "numbers" else noise.view(rows, *noise.shape[1:]),)


@pytest.mark.parametrize(("how", "said"), [("numbers", "draws something else"), ("shape", "can't be traced")])
def test_a_trace_that_is_not_true_of_another_pass_is_refused(tiny: Path, how: str, said: str) -> None:
    inner = load_unet(Checkpoint(tiny / "base", None), torch.float32)
    with pytest.raises(ConfigurationError, match=f"trace: .*{said}"):
        Traced(Counting(inner, how), CPU, 6)


def test_text_widths_may_be_a_list(tiny: Path) -> None:
    """As diffusers' configuration allows and `check` lets through."""
    inner = load_unet(Checkpoint(tiny / "base", None), torch.float32)
    inner.register_to_config(cross_attention_dim=[inner.config.cross_attention_dim])
    Traced(inner, CPU, 6)


def test_what_the_unet_itself_refuses_is_not_laid_to_the_trace(tiny: Path) -> None:
    inner = load_unet(Checkpoint(tiny / "base", None), torch.float32)
    inner.register_to_config(addition_time_embed_dim=inner.config.addition_time_embed_dim // 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Traced(inner, CPU, 6)
