"""How much memory a training takes, computed without a GPU: what autograd keeps, counted on tensors that have a shape and no data."""

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT_MB = 1500.0  # assumed, not measured: CUDA's context and cuDNN's workspaces
MARGIN = 1.1  # times what autograd keeps: what comes and goes beside it; `benchmarks/memory.py --check` measures it on a CPU


class _Attention(torch.autograd.Function):
    """What the fused kernels keep of an attention: queries, keys, values and the result, and no matrix of all pairs."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def kept_mb(network: nn.Module, function: Callable[[], object]) -> float:
    """MB that autograd keeps of `function()`, each tensor once and the network's own weights left out."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes the place of one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage)
        return tensor

    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    fused = mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: _Attention.apply(q, k, v))
    with fused, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights) / 2**20


def kept_by_blocks_mb(network: nn.Module, function: Callable[[], object]) -> float:
    """`kept_mb` where the diffusers model `network` computes its blocks again: what goes into each, and the inside of the largest."""
    inputs: dict[int, torch.UntypedStorage] = {}
    largest = 0.0

    def checkpoint(block: nn.Module, *arguments) -> Tensor:
        nonlocal largest
        for tensor in (a for a in arguments if isinstance(a, Tensor)):
            inputs.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        results = []
        largest = max(largest, kept_mb(block, lambda: results.append(block(*arguments))))
        return results[0]

    network.enable_gradient_checkpointing(checkpoint)
    outside = kept_mb(network, function)
    network.disable_gradient_checkpointing()
    return outside + sum(storage.nbytes() for storage in inputs.values()) / 2**20 + largest


def weights_mb(*networks: nn.Module) -> float:
    """MB of all weights."""
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters()) / 2**20


def trained_mb(number: int) -> float:
    """MB of `number` trained float32 values: themselves, their gradients, and AdamW's two moments."""
    return number * 16 / 2**20


def training_mb(fixed_mb: float, kept: float, decode_mb: float, latents_mb: float, micro_batch_size: int, passes: int) -> float:
    """The peak of a training with gradient checkpointing and decoding image by image, in MB.

        context + weights and optimizer + 1.1 · max(B · passes · kept, decoding one image) + B · latents

    `fixed_mb` are weights and optimizer, `kept` what autograd keeps of one image's pass, by blocks or of all of it, `passes` 2 with
    prompt guidance, `latents_mb` of a trajectory: what each step keeps to begin its pass again.
    """
    return CONTEXT_MB + fixed_mb + MARGIN * max(micro_batch_size * passes * kept, decode_mb) + micro_batch_size * latents_mb


def guidance_mb(fixed_mb: float, kept: float, decode_mb: float, batch_size: int, passes: int) -> float:
    """The peak of reconstruction guidance in MB: a step's graph goes through the UNet and the decoder, for a whole batch at once.

    context + weights + 1.1 · B · (passes · kept + decoding one image)
    """
    return CONTEXT_MB + fixed_mb + MARGIN * batch_size * (passes * kept + decode_mb)
