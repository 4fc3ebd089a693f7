"""One update of CTRL, from an update's number to gradients: draws pairs and noise, anneals, runs the trainer, sums up the figures."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.control import Control
from ctrl.finetune.backprop import backprop
from ctrl.finetune.objective import annealed, summed_kl_weight, within_cell_variance
from ctrl.pairs import draw
from ctrl.process import Process
from ctrl.sampling import noise_of, sample

Cells = Sequence[tuple[str, int]]
LogProb = Callable[[Tensor, Tensor, float], Tensor]


def gradient_function(
    control: Control, process: Process, log_prob: LogProb, cells: Cells, templates: Sequence[str], config: dict, guidance_scale: float, seed: int
) -> Callable[[int], dict[str, float]]:
    """`gradient(update)`, for the loop: `log_prob(x_0, y, temperature)` gives nats with shape (B,), `config` is the finetune section."""
    size, micro = config["batch_size"], config["micro_batch_size"]
    shape = control.base.latent_shape
    kl_weight = summed_kl_weight(config["kl_weight"], config["kl_reduction"], torch.Size(shape).numel())
    softening = config["temperature"]

    def gradient(update: int) -> dict[str, float]:
        passes = control.base.passes
        before = passes.forward, passes.backward
        generator = torch.Generator().manual_seed(seed * 1_000_003 + update)
        prompts, subjects, labels = draw(cells, templates, size, generator)
        seeds = torch.randint(2**62, (size,), generator=generator)
        cuts = None
        if config["truncation"]:
            low, high = config["truncation"]
            cuts = torch.randint(low, high + 1, (size,), generator=generator).clamp(max=process.num_steps)
        temperature = annealed(update, softening["start"], softening["updates"])
        parts = []
        for part in torch.arange(size).split(micro):
            chosen, y = [prompts[k] for k in part], labels[part].to(control.base.device)
            psi = control.denoiser(process, chosen, y, guidance_scale)
            pre = control.base_denoiser(process, chosen, guidance_scale)
            if config["gradient_checkpointing"]:
                psi, pre = recomputed(psi), recomputed(pre)
            noise = noise_of(seeds[part].tolist(), shape, process.num_steps, control.base.device)
            parts.append(
                backprop(
                    process, psi, pre, lambda x_0, y=y: log_prob(x_0, y, temperature), noise, config["gamma"], kl_weight,
                    None if cuts is None else cuts[part], 1 / size,
                )
            )  # fmt: skip
        terms = {key: torch.cat([p[key] for p in parts]).double().cpu() for key in ("log_prob", "kl_nats", "log_ratio")}
        mean = {key: terms[key].mean().item() for key in ("log_prob", "kl_nats")}
        log_w = config["gamma"] * terms["log_prob"] - terms["log_ratio"]
        loss = kl_weight * mean["kl_nats"] - config["gamma"] * mean["log_prob"]
        variance = within_cell_variance(log_w, list(zip(subjects, labels.tolist(), strict=True)))
        counts = {"unet_forward": passes.forward - before[0], "unet_backward": passes.backward - before[1]}
        return {"loss": loss, **mean, "temperature": temperature, "var_log_w": variance, **counts}

    return gradient


def recomputed(denoiser: Callable) -> Callable:
    """A denoiser that keeps no activations, and computes them again on the way back (gradient checkpointing)."""
    return lambda x_t, i: torch.utils.checkpoint.checkpoint(denoiser, x_t, i, use_reentrant=False)


def probe_function(
    control: Control, process: Process, score: Callable[[Tensor, Tensor], dict[str, float]], cells: Cells, templates: Sequence[str],
    num_images: int, guidance_scale: float, seed: int, batch_size: int,
) -> Callable[[int], dict[str, float]]:  # fmt: skip
    """`probe(update)`, for the loop: `score(images, labels)` of the same prompts, labels and noise each time."""
    generator = torch.Generator().manual_seed(seed)
    prompts, _, labels = draw(cells, templates, num_images, generator)
    noise = noise_of(torch.randint(2**62, (num_images,), generator=generator).tolist(), control.base.latent_shape, process.num_steps)

    def probe(update: int) -> dict[str, float]:
        images = []
        for part in torch.arange(num_images).split(batch_size):
            psi = control.denoiser(process, [prompts[k] for k in part], labels[part], guidance_scale)
            x_0 = sample(process, psi, noise[:, part].to(control.base.device))
            with torch.no_grad():
                images.append(control.base.decode(x_0).clamp(-1, 1).cpu())
        return score(torch.cat(images), labels)

    return probe
