"""p_t(y | x_t): a classifier of noisy latents, for classifier guidance (Dhariwal & Nichol, NeurIPS 2021, arXiv 2105.05233).

Trained by maximum likelihood on labelled latents noised to the levels of the sampler's steps,

    x_t = sqrt(ᾱ_t) x_0 + sqrt(1 − ᾱ_t) eps,    loss = −log p_t(y | x_t),    step uniform, eps fresh every time

whose optimum is E[p(y | x_0) | x_t]. It sees no prompt: y ⊥ c given x_0 does not make y ⊥ c given x_t, which this method leaves aside.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ctrl.errors import UserError
from ctrl.io import load_tensors, read_json, save_tensors, write_json
from ctrl.labels import check_codes
from ctrl.process import Process

NUM_DRAWS = 4  # of the noise for each latent, where the classifier is measured


class Block(nn.Module):
    """Two 3x3 convolutions with group normalisation, added to a 1x1 convolution of the input; the noise level scales and shifts between."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels_in, channels, 3, stride, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(channels // 8, channels) for _ in range(2))
        self.level = nn.Linear(NoisyClassifier.NUM_TIMES, 2 * channels)
        self.skip = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        scale, shift = self.level(times)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norms[0](self.first(x)) * (1 + scale) + shift)
        return F.silu(self.norms[1](self.second(h)) + self.skip(x))


class NoisyClassifier(nn.Module):
    """Three residual blocks (stride 1, 2, 2), dropout, global pooling, a logit a label; it knows the noise level by its log-SNR.

    `description` holds num_classes, latent_channels, width (a multiple of 8) and dropout; what else it holds is kept.
    """

    NUM_TIMES = 12

    def __init__(self, description: dict):
        super().__init__()
        self.description, width = description, description["width"]
        self.register_buffer("frequencies", 2.0 ** torch.arange(-4, 2), persistent=False)
        channels = [description["latent_channels"], width, 2 * width, 2 * width]
        self.blocks = nn.ModuleList(Block(*channels[k : k + 2], stride) for k, stride in enumerate((1, 2, 2)))
        self.dropout = nn.Dropout(description["dropout"])
        self.linear = nn.Linear(2 * width, description["num_classes"])

    def log_probs(self, x_t: Tensor, abar: Tensor) -> Tensor:
        """log p_t(y | x_t) of every label in nats, shape (B, K), from x_t with shape (B, C, h, w) and ᾱ_t in (0, 1) with shape (B,)."""
        angles = torch.logit(abar.double()).to(x_t)[:, None] * self.frequencies
        times, h = torch.cat([angles.sin(), angles.cos()], dim=1), x_t
        for block in self.blocks:
            h = block(h, times)
        return F.log_softmax(self.linear(self.dropout(h.mean(dim=(2, 3)))), dim=1)

    def log_prob(self, process: Process, y: Tensor) -> Callable[[Tensor, int], Tensor]:
        """(x_t, i) -> log p_t(y | x_t) with shape (B,), for labels with shape (B,): what `classifier_guidance` takes.

        UserError where these are no labels, or not one for each image.
        """

        def log_prob(x_t: Tensor, i: int) -> Tensor:
            labels = check_codes(y, len(x_t), self.linear.out_features).to(x_t.device)
            return self.log_probs(x_t, process.abar_t[i].expand(len(x_t))).gather(1, labels[:, None])[:, 0]

        return log_prob


def noised(x_0: Tensor, abar: Tensor, generator: torch.Generator) -> Tensor:
    """x_t with the shape of x_0, (B, *), at noise levels `abar` with shape (B,); `generator` is on the CPU."""
    abar = abar.to(x_0).view(-1, *[1] * (x_0.ndim - 1))
    return abar.sqrt() * x_0 + (1 - abar).sqrt() * torch.randn(x_0.shape, generator=generator).to(x_0)


def fit(
    latents: dict[str, tuple[Tensor, Tensor]], process: Process, description: dict, config: dict, seed: int
) -> tuple[NoisyClassifier, list[dict]]:
    """Trains on `latents["train"]`, keeps the epoch that is best on `latents["calibration"]`; both (x_0, labels): (N, C, h, w), (N,).

    config: num_epochs, batch_size, learning_rate, weight_decay. Returns the frozen classifier, on the latents' device, and a row an epoch
    (epoch, train_loss, calibration_loss). Raises UserError where a split is empty or the loss is not finite.
    """
    for name in ("train", "calibration"):
        if len(latents[name][1]) == 0:
            raise UserError(f"the dataset has no image in its split {name}: raise dataset.splits.{name} or add images")
    device = latents["train"][0].device
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        torch.manual_seed(seed)  # of the first weights and of dropout
        return train_epochs(NoisyClassifier(description).to(device), latents, process, config, torch.Generator().manual_seed(seed))


def train_epochs(
    net: NoisyClassifier, latents: dict[str, tuple[Tensor, Tensor]], process: Process, config: dict, generator: torch.Generator
) -> tuple[NoisyClassifier, list[dict]]:
    """AdamW with a cosine to zero."""
    (x_0, labels), num_epochs, size = latents["train"], config["num_epochs"], config["batch_size"]
    optimizer = torch.optim.AdamW(net.parameters(), config["learning_rate"], weight_decay=config["weight_decay"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs * math.ceil(len(labels) / size))
    history, best, best_state = [], math.inf, {}
    progress = tqdm(range(num_epochs), desc="noisy classifier", mininterval=2, disable=None)
    for epoch in progress:
        total = 0.0
        net.train()
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            abar = process.abar_t[torch.randint(process.num_steps, (len(rows),), generator=generator)]
            rows = rows.to(labels.device)
            loss = F.nll_loss(net.log_probs(noised(x_0[rows], abar, generator), abar), labels[rows])
            if not torch.isfinite(loss):
                raise UserError(f"the noisy classifier's loss is {loss.item()} in epoch {epoch}: lower noisy_classifier.learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        rows = evaluate(net, process, *latents["calibration"])
        held_out = sum(row["nll"] for row in rows) / len(rows)
        if held_out < best:
            best, best_state = held_out, copy.deepcopy(net.state_dict())
        history.append({"epoch": epoch, "train_loss": total / len(labels), "calibration_loss": held_out})
        progress.set_postfix(train=f"{history[-1]['train_loss']:.3f}", calibration=f"{held_out:.3f}")
    net.load_state_dict(best_state)
    return net.eval().requires_grad_(False), history


@torch.no_grad()
def evaluate(net: NoisyClassifier, process: Process, x_0: Tensor, labels: Tensor, batch_size: int = 1024) -> list[dict]:
    """A row for each step: step, timestep, abar, n, accuracy, nll in nats; every latent noised NUM_DRAWS times, by seeds of their own."""
    net.eval()
    rows = []
    for i in range(process.num_steps):
        generator, abar = torch.Generator().manual_seed(i), process.abar_t[i]
        right, nll = 0.0, 0.0
        for _ in range(NUM_DRAWS):
            for x, y in zip(x_0.split(batch_size), labels.split(batch_size), strict=True):
                log_probs = net.log_probs(noised(x, abar.expand(len(x)), generator), abar.expand(len(x)))
                right, nll = right + (log_probs.argmax(1) == y).sum().item(), nll + F.nll_loss(log_probs, y, reduction="sum").item()
        n = NUM_DRAWS * len(labels)
        rows.append(
            {"step": i, "timestep": int(process.timesteps[i]), "abar": abar.item(), "n": len(labels), "accuracy": right / n, "nll": nll / n}
        )
    return rows


def save(folder: Path, net: NoisyClassifier) -> None:
    """Writes model.safetensors and config.json, the description."""
    save_tensors(Path(folder) / "model.safetensors", net.state_dict())
    write_json(Path(folder) / "config.json", net.description)


def load(folder: Path) -> NoisyClassifier:
    """The classifier that `save` wrote, frozen, in evaluation mode; UserError where a file is missing, or holds something else."""
    folder = Path(folder)
    description, state = read_json(folder / "config.json"), load_tensors(folder / "model.safetensors")
    try:
        net = NoisyClassifier(description)
        net.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__} {str(error).splitlines()[0]}"
        raise UserError(f"{folder} holds no noisy classifier ({reason}): make one by scripts/train_noisy_classifier.py") from error
    return net.eval().requires_grad_(False)
