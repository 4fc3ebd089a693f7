"""Data parallel training: every process takes some rows of the same batch, and gradients are summed. A single process does nothing here.

A trainer calls `backward` several times an update, and the pretrained and the controlled model are one network: a wrapper that reduces
in every backward pass (DDP) would do so many times. One sum of LoRA's and the embedding's gradients, before they are clipped, is all it
takes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn


def world() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return world()[0] == 0


def rows_of(size: int) -> Tensor:
    """The rows of a batch of `size` that are this process's: contiguous, with shape (about size / processes,)."""
    rank, number = world()
    return torch.arange(size).tensor_split(number)[rank]


def gathered(part: Tensor, size: int, dim: int = 0) -> Tensor:
    """The whole batch from every process's `part` of it, whose dimension `dim` has its `rows_of(size)`; the same in all processes."""
    rank, number = world()
    if number == 1:
        return part
    part, sizes = part.movedim(dim, 0), [len(rows) for rows in torch.arange(size).tensor_split(number)]
    whole = part.new_zeros(size, *part.shape[1:])
    whole[sum(sizes[:rank]) : sum(sizes[: rank + 1])] = part
    distributed.all_reduce(whole)
    return whole.movedim(0, dim)


def sum_gradients(parameters: Sequence[nn.Parameter], stop: bool) -> bool:
    """Sums every `.grad` over the processes, in place; returns whether any process says `stop`, the same answer in all of them.

    A parameter that has no gradient in any process keeps None.
    """
    if world()[1] == 1:
        return stop
    flags = torch.tensor([stop, *(p.grad is not None for p in parameters)], dtype=torch.float32, device=parameters[0].device)
    flat = torch.cat([flags, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters)])
    distributed.all_reduce(flat)
    flags, *sums = flat.split([len(flags), *(p.numel() for p in parameters)])
    stop, *used = flags.tolist()
    for parameter, total, number in zip(parameters, sums, used, strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype) if number else None
    return bool(stop)


def total(number: int, device: torch.device | str) -> int:
    """The sum of `number` over the processes."""
    if world()[1] == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.int64, device=device)
    distributed.all_reduce(tensor)
    return int(tensor)
