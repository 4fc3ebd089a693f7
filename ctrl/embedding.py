"""From a label to the vector that is added to the time embedding: zero at the start, so that the model is the pretrained one."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl.errors import UserError
from ctrl.labels import Continuous, Factors


class LabelEmbedding(nn.Embedding):
    """The sum of a vector for each factor of a label, (B, width), from codes (B,); zero at the start, and always for a free factor.

    The weight has the factors' labels below each other, and last the one row of their nulls: the padding row, which gets no gradient.
    """

    def __init__(self, space: Factors, width: int, device: torch.device | str | None = None):
        rows = space.rows
        super().__init__(int(rows.max()) + 1, width, padding_idx=int(rows.max()), device=device)
        self.register_buffer("rows", rows.to(device), persistent=False)
        nn.init.zeros_(self.weight)

    def forward(self, codes: Tensor) -> Tensor:
        return super().forward(self.rows[codes]).sum(1)


class FourierEmbedding(nn.Module):
    """A vector for each continuous label, (B, width), from labels (B,); zero at the start, and always for the null label, NaN.

    Fourier features of z = (y - mean) / sd (Tancik et al. 2020, arXiv 2006.10739), sin and cos of pi/4 · 2^k · z: the slowest tells all
    labels within 4 sd apart, the fastest turns once in one sd, so that what is learned stays smooth between the labels seen. Then an MLP,
    whose last layer is zero at the start.
    """

    HIDDEN, NUM_FREQUENCIES = 64, 4

    def __init__(self, mean: float, sd: float, width: int, seed: int = 0):
        super().__init__()
        self.mean, self.sd = mean, sd
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(2 * self.NUM_FREQUENCIES, self.HIDDEN)
            self.out = nn.Linear(self.HIDDEN, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, y: Tensor) -> Tensor:
        weight, null = self.out.weight, y.isnan()
        z = (y.float().masked_fill(null, self.mean) - self.mean) / self.sd
        angles = math.pi / 4 * 2.0 ** torch.arange(self.NUM_FREQUENCIES, device=y.device) * z[:, None]
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(weight.dtype)
        return self.out(nn.functional.silu(self.hidden(features))).masked_fill(null[:, None], 0)


def check_distinct(space: Factors | Continuous, embedding: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError where two labels of a factor, or one and its null, have the same row in the tensors of a trained `embedding`.

    They would draw the same images: asking for the label changes nothing. The same: closer than a thousandth of the longest row, which
    half precision hardly tells apart. A continuous label changes nothing where the last layer is still zero.
    """
    if isinstance(space, Continuous):
        if not embedding["out.weight"].any():
            raise UserError(f"{where}: the label changes no image: its embedding is zero; train with more finetune.num_updates")
        return
    weight, first = embedding["weight"], 0
    for k, factor in enumerate(space.factors):
        rows = torch.cat([weight[first : first + factor.num_classes], weight[-1:]]).float()
        equal = (rows[:, None] - rows).norm(dim=-1) <= 1e-3 * weight.float().norm(dim=1).max()
        key = f"label of {space.keys[k]}" if space.keys and len(space.factors) > 1 else "label"
        for y, other in equal.triu(1).nonzero().tolist():
            named = f"{key} {y}" + (f" ({factor.names[y]})" if factor.names else "")
            same = f"{key} {other}" if other < factor.num_classes else "no label"
            raise UserError(
                f"{where}: {named} changes no image: its embedding is that of {same}; train with more finetune.num_updates, or a higher "
                "finetune.embedding_learning_rate"
            )
        first += factor.num_classes
