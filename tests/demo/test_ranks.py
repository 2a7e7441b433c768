"""Gradients of several processes: their mean, in the order in which the optimizer reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from serve_app.demo.training import ranks


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(together: bool, layout: torch.memory_format) -> list[torch.Tensor]:
    """The weights of two convolutions after a step of the optimizer that training uses."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=layout)
    model(torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)).square().mean().backward()
    if together:
        assert ranks.average_gradients(model.parameters(), torch.tensor(2.0), 3.0) == (2.0, 3.0)
    torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0, fused=True).step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("one_rank")
def test_a_step_of_one_of_several_processes_is_that_of_one_process(layout: torch.memory_format) -> None:
    for alone, together in zip(step(False, layout), step(True, layout), strict=True):
        assert torch.allclose(alone, together, atol=1e-6)
