"""Ways to compute the same update in less time or memory: `finetune.speed` and `gradient_checkpointing`; docs/speed.md has what each gave.

A switch that says `gpu` is on only where there is one: on a CPU it gains nothing. None changes what is computed but for rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctrl.control import Control
from ctrl.device import set_tf32

# Of one network: with LoRA, without and on half of the rows, with and without gradients, a smaller last part of a batch.
GRAPHS = 32


def wanted(switch: bool | str, device: torch.device) -> bool:
    """What true, false or `gpu` means on this device."""
    return device.type == "cuda" if switch == "gpu" else bool(switch)


def prepare(control: Control, settings: dict) -> None:
    """By the finetune section: the precision of this process's float32 on a GPU, and the frozen weights' layout in memory, compilation and
    checkpointing by blocks of `control`'s networks.

    What is trained keeps its layout: that of its gradients, and of the optimizer's state from a checkpoint.
    """
    base, speed = control.base, settings["speed"]
    set_tf32(wanted(speed["tf32"], base.device))
    if settings["gradient_checkpointing"] == "blocks":
        control.recompute_blocks()
        base.pipe.vae.enable_gradient_checkpointing()
    if wanted(speed["channels_last"], base.device):
        for module in (base.network, base.pipe.vae):
            for weight in module.parameters():
                if weight.ndim == 4 and not weight.requires_grad:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if wanted(speed["compile"], base.device):
        compile_for_fixed_shapes(base.network)


def compile_for_fixed_shapes(network: nn.Module, backend: str = "inductor") -> None:
    """torch.compile in place, a graph for each batch size and each state of the LoRA, all of them kept: nothing is compiled twice."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    network.compile(dynamic=False, backend=backend)


def autocast(function: Callable, switch: bool | str, device: torch.device) -> Callable:
    """`function` with bfloat16 in its matrix products and convolutions; what is trained stays float32, and so do its gradients."""
    if not wanted(switch, device):
        return function

    def cast(*arguments):
        with torch.autocast(device.type, torch.bfloat16):
            return function(*arguments)

    return cast


def in_slices(log_prob: Callable[..., Tensor], size: int | None) -> Callable[..., Tensor]:
    """`log_prob(x_0, y, temperature)` of `size` images at a time, each part computed again on its way back: decoding to pixels takes as
    much memory as a part of them; None: all at once."""
    if size is None:
        return log_prob

    def sliced(x_0: Tensor, y: Tensor, temperature: float) -> Tensor:
        pairs = zip(x_0.split(size), y.split(size), strict=True)
        return torch.cat([torch.utils.checkpoint.checkpoint(log_prob, *pair, temperature, use_reentrant=False) for pair in pairs])

    return sliced
