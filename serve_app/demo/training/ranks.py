"""Training by several processes, a core or a GPU each.

    torchrun --nproc-per-node 2 -m serve_app.demo.training.train ...

Two threads of one process wait for each other at every small operation; two processes meet once a step.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start() -> None:
    """Joins the other processes, where torchrun started this one."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> torch.device:
    return torch.device("cuda", rank()) if torch.cuda.is_available() else torch.device("cpu")


def average_gradients(parameters: Iterable[nn.Parameter], loss: Tensor, seconds: float) -> tuple[float, float]:
    """Sets all gradients to their mean over the ranks; returns the mean loss and the mean of `seconds`.

    All ranks get the same numbers, so all end a stage at the same step.
    """
    if not dist.is_initialized():
        return loss.item(), seconds
    trained = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    numbers = torch.tensor([loss.item(), seconds], device=loss.device)
    flat = torch.cat([*(gradient.flatten() for _, gradient in trained), numbers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [parameter.numel() for parameter, _ in trained] + [2])
    for (parameter, gradient), mean in zip(trained, means, strict=False):
        # In place: the fused AdamW of the CPU reads a gradient's memory in the parameter's order, whatever its strides
        # say, and a gradient in another order than a channels-last parameter's is another gradient.
        gradient.copy_(mean.view_as(parameter))
    return float(flat[-2]), float(flat[-1])


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait; then they do, and find what it left."""
    if dist.is_initialized() and rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()
