"""The UNet as a TorchScript trace of itself.

A trace holds the operators that one pass called, in their order, and runs them without the Python between them. They
are called with the arguments of every new pass, so a trace serves any number of rows, any length of text and any
picture size that the UNet halves evenly; the others, whose skip connections diffusers crops by a branch that a trace
does not see, run as they are.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from serve_app.models.backends.eager import PositionalUNet
from serve_app.models.backends.rows import Rows
from serve_app.models.device import Compute
from serve_app.request.errors import ConfigurationError

_jit: Any = torch.jit  # PyTorch has no types for it
# A trace that holds a number which a later pass needs otherwise is wrong by far more than any device's own noise.
_TOLERANCE = 0.01
_TOKENS = 77


class Traced:
    """Traces a UNet at once. Raises `ConfigurationError` where the trace of one pass is not true of another."""

    def __init__(self, unet: Any, compute: Compute, time_ids: int) -> None:
        self._unet = PositionalUNet(unet)
        self._divisor = 2**unet.num_upsamplers
        side = 2 * self._divisor
        traced = Rows.example(unet.config, compute, time_ids, 2, side, side, _TOKENS)
        another = Rows.example(unet.config, compute, time_ids, 3, side + self._divisor, side, 2 * _TOKENS)
        with torch.inference_mode(), warnings.catch_warnings():
            # First, so that what the UNet itself refuses is not laid to the trace.
            wanted = self._unet(*another.tensors()).float()
            # Every shape that becomes a Python number is warned about. What they decide is checked below instead.
            warnings.simplefilter("ignore", _jit.TracerWarning)
            # PyTorch asks for torch.compile in its place: that needs a C++ compiler, or gains a quarter as much.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._trace = _jit.trace(self._unet, traced.tensors(), check_trace=False)
                found = self(another).float()
            except RuntimeError as error:
                raise ConfigurationError(
                    f"trace: this UNet can't be traced, set trace: false ({_last_line(error)})"
                ) from None
        # Numbers that are no numbers are the weights' fault and are looked for where pictures are made.
        bound = _TOLERANCE * float(wanted.nan_to_num().abs().max())
        if not torch.allclose(found, wanted, rtol=0.0, atol=bound, equal_nan=True):
            raise ConfigurationError("trace: this UNet's trace draws something else than the UNet, set trace: false")

    def __call__(self, rows: Rows) -> torch.Tensor:
        height, width = rows.samples.shape[-2:]
        if height % self._divisor or width % self._divisor:
            prediction: torch.Tensor = self._unet(*rows.tensors())
            return prediction
        # Optimized, TorchScript would fuse operators on a GPU and specialise them to the shapes of the first passes.
        with _jit.optimized_execution(False):
            prediction = self._trace(*rows.tensors())
        return prediction


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
