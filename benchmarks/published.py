"""One update as the code published with the paper computes it, for a comparison of costs: github.com/zhaoyl18/CTRL.

Written anew from what that code does, in full precision, with the same LoRA and embedding as ours:

- a second copy of the UNet is the pretrained model;
- a step takes four UNet passes, one after the other: of either copy, with the prompt and without it, whatever the guidance scale;
- each pass is checkpointed: its activations are computed again on the way back;
- each step i of N draws an integer r from 0 to N, and where i < r what all four passes said is detached, so that about half of the steps
  have a gradient; all of them were computed with one;
- attention with LoRA is a plain softmax of a product; TF32 is allowed on a GPU.
"""

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctrl.base import Base
from ctrl.finetune.task import LogProb, Task, batch_function


def published_gradient(task: Task, pretrained: Base, log_prob: LogProb, config: dict) -> Callable[[int], dict[str, float]]:
    """`gradient(update)` like that of `recipe.gradient_function`; `pretrained` is the second copy."""
    control, process, size = task.control, task.process, config["batch_size"]
    base, batch_of, micro = control.base, batch_function(task, config), config["micro_batch_size"]
    base.network.set_attn_processor(AttnProcessor())
    torch.backends.cuda.matmul.allow_tf32 = True

    def trajectories(prompts: list[str], labels: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_0, and the KL averaged over all dimensions and summed over the steps."""
        x, kl = noise[0], 0.0
        empty, text = base.encode([None] * len(prompts)), base.encode(prompts)
        null = torch.full_like(labels, control.null)
        for i in range(process.num_steps):
            t = process.timesteps[i].expand(len(x)).to(x.device)
            passes = [(base, empty, null), (base, text, labels), (pretrained, empty, None), (pretrained, text, None)]
            eps = [checkpoint(one.eps, x, t, c, y, use_reentrant=False) for one, c, y in passes]
            if i < torch.randint(process.num_steps + 1, (), generator=generator):
                eps = [e.detach() for e in eps]
            psi, pre = (u + task.guidance_scale * (c - u) for u, c in (eps[:2], eps[2:]))
            kl = kl + process.kl(i, psi, pre).mean() / x[0].numel()
            x = process.step(i, x, psi, noise[i + 1])
        return x, kl

    def gradient(update: int) -> dict[str, float]:
        batch, loss = batch_of(update), 0.0
        for rows in torch.arange(size).split(micro):
            _, y, noise = batch.part(task, rows, False)
            x_0, kl = trajectories([batch.prompts[k] for k in rows], y, noise, batch.generator)
            value = (config["kl_weight"] * kl - config["gamma"] * log_prob(x_0, y, 1.0).mean()) * len(rows) / size
            if value.requires_grad:  # with few steps it happens that all of them are detached
                value.backward()
            loss += value.item()
        return {"loss": loss}

    return gradient
