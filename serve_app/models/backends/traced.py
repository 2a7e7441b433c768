"""The UNet as a function of tensors, and as a TorchScript trace of itself.

A trace holds the operators that one pass called, in their order, and runs them without the Python between them. They
are called with the arguments of every new pass, so a trace serves any number of rows, any length of text and any
picture size that the UNet halves evenly; the others, whose skip connections diffusers crops by a branch that a trace
does not see, run as they are.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from serve_app.models.device import Compute
from serve_app.request.errors import ConfigurationError

# A trace that holds a number which a later pass needs otherwise is wrong by far more than any device's own noise.
_TOLERANCE = 0.01
_TOKENS = 77


class UNet(torch.nn.Module):
    """SDXL's UNet of diffusers over positional tensors.

    sample (R, 4, h, w), timestep (R,) float32, prompt_embeds (R, 77k, D), pooled (R, P), time_ids (R, 5 or 6) float32
    -> the prediction, (R, 4, h, w), in the dtype of the weights.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return prediction


class TracedUNet:
    """Traces a UNet at once. Raises `ConfigurationError` where the trace of one pass is not true of another."""

    def __init__(self, unet: UNet, compute: Compute, time_ids: int) -> None:
        self._unet = unet
        self._compute = compute
        self._time_ids = time_ids
        self._divisor = 2**unet.unet.num_upsamplers
        side = 2 * self._divisor
        another = self._example(3, side + self._divisor, side, 2 * _TOKENS)
        with torch.inference_mode(), warnings.catch_warnings():
            wanted = unet(*another).float()  # first, so that what the UNet itself refuses is not laid to the trace
            # Every shape that becomes a Python number is warned about. What they decide is checked below instead.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            # PyTorch asks for torch.compile in its place: that needs a C++ compiler, or gains a quarter as much.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._trace = torch.jit.trace(unet, self._example(2, side, side, _TOKENS), check_trace=False)
                found = self(*another).float()
            except RuntimeError as error:
                raise ConfigurationError(
                    f"trace: this UNet can't be traced, set trace: false ({_last_line(error)})"
                ) from None
        # Numbers that are no numbers are the weights' fault and are looked for where pictures are made.
        bound = _TOLERANCE * float(wanted.nan_to_num().abs().max())
        if not torch.allclose(found, wanted, rtol=0.0, atol=bound, equal_nan=True):
            raise ConfigurationError("trace: this UNet's trace draws something else than the UNet, set trace: false")

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        height, width = tensors[0].shape[-2:]
        if height % self._divisor or width % self._divisor:
            prediction: torch.Tensor = self._unet(*tensors)
            return prediction
        # Optimized, TorchScript would fuse operators on a GPU and specialise them to the shapes of the first passes.
        with torch.jit.optimized_execution(False):
            prediction = self._trace(*tensors)
        return prediction

    def _example(self, rows: int, height: int, width: int, tokens: int) -> tuple[torch.Tensor, ...]:
        config, generator = self._unet.unet.config, torch.Generator("cpu").manual_seed(0)
        pooled = config.projection_class_embeddings_input_dim - self._time_ids * config.addition_time_embed_dim
        width = config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]  # diffusers takes a list, one for each block
        device, dtype = self._compute.device, self._compute.dtype

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        return (
            drawn(rows, config.in_channels, height, width),
            torch.linspace(900, 100, rows, device=device),
            drawn(rows, tokens, width),
            drawn(rows, pooled),
            torch.full((rows, self._time_ids), 128.0, device=device),
        )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
