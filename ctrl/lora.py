"""LoRA on all, none or half of a batch, on PEFT's layers.

Where the controlled and the pretrained model are asked about the same x_t, one pass of both costs less than two: the frozen layers see
twice the batch, and LoRA its second half. PEFT's own way to mix adapters in a batch gathers and scatters rows by lists; a half is a view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

ADAPTER = "ctrl"


@dataclass
class Rows:
    """The rows of a batch that LoRA is added to: all of them, none, or the second half."""

    on: Literal["all", "none", "half"] = "all"


def install(layers: Sequence[BaseTunerLayer]) -> Rows:
    """From now on the layers compute base(x) + B(A(x)), and the second term for those rows alone that the returned `Rows` say.

    That is PEFT's forward without dropout and at a scaling of 1, which alpha equal to the rank amounts to. PEFT's own switches (scale,
    disable, further adapters) do nothing to these layers, and a deep copy of the network would go on computing with the original's.
    """
    rows = Rows()
    for layer in layers:
        layer.forward = forward_of(layer, rows)
    return rows


def forward_of(layer: BaseTunerLayer, rows: Rows) -> Callable[[Tensor], Tensor]:
    """The forward of one layer, whose input and output have the batch first."""
    base, a, b = layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]

    def forward(x: Tensor) -> Tensor:
        result = base(x)
        if rows.on == "none":
            return result
        part = result
        if rows.on == "half":
            x, part = x[len(x) // 2 :], result[len(x) // 2 :]
        part.add_(b(a(x.to(a.weight.dtype))))  # in place: nothing else has seen the result, and base needs it no more
        return result

    return forward
