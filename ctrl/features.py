"""Networks that no method was trained on: the features of the distances, and whether an image still shows its prompt."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ctrl import clip
from ctrl.errors import UserError, first_line
from ctrl.io import load_tensors, read_json, save_tensors, write_json

CLIP_DEFAULT = ("ViT-B-32", "laion2b_s34b_b79k")  # open_clip's name and pretrained weights


class GarmentNet(nn.Module):
    """A small convolutional classifier of grey images; its pooled last layer gives the features.

    3x3 convolutions with batch norm and ReLU, `widths` their channels: one to widths[0] that halves the image, one to widths[1], and for
    each further width one that halves it again and a second one. Then the mean over positions, D = widths[-1] features, and a linear layer.
    """

    def __init__(self, subjects: Sequence[str], widths: Sequence[int] = (16, 32, 64, 128)):
        super().__init__()
        self.subjects, self.widths = list(subjects), list(widths)
        layers, width = [], 1
        for i, out in enumerate(widths):
            layers += _convolution(width, out, stride=2 if i != 1 else 1)
            layers += _convolution(out, out, stride=1) if i > 1 else []
            width = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, len(self.subjects))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) of images in [-1, 1] with shape (B, 3, H, W), or (B, 1, H, W) if they are grey already."""
        return self.body(images.mean(dim=1, keepdim=True)).mean(dim=(2, 3))

    def prompt_logits(self, images: Tensor) -> Tensor:
        """Unnormalised log-probabilities (B, num_subjects) of `subjects`, for images in [-1, 1] with shape (B, 3, H, W)."""
        return self.head(self.features(images))

    def prompt_scores(self, images: Tensor, subjects: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """1 where the network sees the subject that was asked for, else 0; float (B,). `prompts` are not used."""
        return (self.prompt_logits(images).argmax(1).cpu() == torch.tensor([self.index(s) for s in subjects])).float()

    def index(self, subject: str) -> int:
        """The number of a subject; UserError for one that the network does not know."""
        if subject not in self.subjects:
            raise UserError(f"the garment classifier does not know the subject {subject!r}; it knows {', '.join(self.subjects)}")
        return self.subjects.index(subject)

    score_name = "prompt_accuracy"


def _convolution(width: int, out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(width, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


class ClipFeatures(nn.Module):
    """open_clip's image tower as features, and the cosine of image and prompt as the score; for bases of any subject.

    model: an open_clip model; tokenizer: prompts -> tokens.
    """

    score_name = "clip_score"
    subjects: None = None

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings (B, D), not normalised, of images in [-1, 1] with shape (B, 3, H, W)."""
        return clip.embed(self.model, images)

    def prompt_scores(self, images: Tensor, subjects: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Cosine of image and prompt embeddings, in [-1, 1]; float (B,). `subjects` are not used."""
        text = self.model.encode_text(self.tokenizer(list(prompts)).to(self.device))
        return F.cosine_similarity(self.features(images), text).float().cpu()


def load(path: str | Path) -> GarmentNet | ClipFeatures:
    """A frozen network from a folder with model.safetensors and config.json, or `clip` / `clip:NAME:PRETRAINED` from open_clip.

    Raises UserError where the folder is missing or damaged, or open_clip's weights cannot be had.
    """
    if str(path).split(":")[0] == "clip":
        return load_clip(*clip_of(path))
    folder = Path(path)
    if not (folder / "config.json").exists():
        raise UserError(f"evaluation.features: {folder} has no config.json; give a folder written by scripts/train_garments.py, or `clip`")
    config = read_json(folder / "config.json")
    try:
        net = GarmentNet(config["subjects"], config["widths"])
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_tensors(folder / "model.safetensors").items()})
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"evaluation.features: {folder} does not hold a garment classifier: {str(error).splitlines()[0]}") from error
    return net.eval().requires_grad_(False)


def clip_of(path: str | Path) -> tuple[str, str]:
    """open_clip's name and pretrained weights, for which `clip` or `clip:NAME:PRETRAINED` stands."""
    given = str(path).split(":", 2)[1:]
    return (*given, *CLIP_DEFAULT[len(given) :])


def tokenizer(name: str):
    """The tokenizer of open_clip's model `name`, for some models fetched from the hub; UserError where it cannot be had."""
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # the hub, the network and two libraries each raise their own
        raise UserError(
            f"the tokenizer of CLIP {name} cannot be had ({first_line(error)}): take a model such as ViT-B-32, whose own is here"
        ) from error


def load_clip(name: str = CLIP_DEFAULT[0], pretrained: str | None = CLIP_DEFAULT[1]) -> ClipFeatures:
    """open_clip's model `name` with the weights `pretrained` (a tag or a file; None: random weights)."""
    try:
        return ClipFeatures(clip.load_clip(name, pretrained), tokenizer(name)).eval().requires_grad_(False)
    except UserError as error:
        raise UserError(f"evaluation.features: {error}") from error


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, D) of uint8 images (N, 3, H, W), in batches, on the CPU."""
    return torch.cat([network.features(part.to(network.device).float() / 127.5 - 1).float().cpu() for part in images.split(batch_size)])


@torch.no_grad()
def compute(
    network: nn.Module, images: Tensor, subjects: Sequence[str], prompts: Sequence[str], batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and prompt scores (N,) of uint8 images (N, 3, H, W), in batches, on the CPU."""
    return extract(network, images, batch_size), prompt_scores(network, images, subjects, prompts, batch_size)


@torch.no_grad()
def prompt_scores(network: nn.Module, images: Tensor, subjects: Sequence[str], prompts: Sequence[str], batch_size: int = 256) -> Tensor:
    """The second of them alone."""
    scores = []
    for i in range(0, len(images), batch_size):
        batch = images[i : i + batch_size].to(network.device).float() / 127.5 - 1
        scores.append(network.prompt_scores(batch, subjects[i : i + batch_size], prompts[i : i + batch_size]))
    return torch.cat(scores)


def augment(images: Tensor, generator: torch.Generator, max_shift: int = 2, erase_probability: float = 0.1) -> Tensor:
    """Images (B, C, H, W) moved by up to `max_shift` pixels (black comes in), and some of them with one black square of H/4 pixels."""
    b, _, h, w = images.shape
    padded = F.pad(images, [max_shift] * 4, value=-1)
    dy, dx = torch.randint(2 * max_shift + 1, (2, b, 1), generator=generator)
    rows, columns = dy + torch.arange(h), dx + torch.arange(w)
    out = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    top, left = torch.randint(h - h // 4 + 1, (b, 1), generator=generator), torch.randint(w - w // 4 + 1, (b, 1), generator=generator)
    in_rows = (torch.arange(h) >= top) & (torch.arange(h) < top + h // 4)
    in_columns = (torch.arange(w) >= left) & (torch.arange(w) < left + w // 4)
    erased = torch.rand(b, generator=generator) < erase_probability
    mask = (in_rows[:, :, None] & in_columns[:, None, :] & erased[:, None, None])[:, None]
    return out.masked_fill(mask, -1)


def fit(
    net: GarmentNet, images: Tensor, labels: Tensor, num_epochs: int, batch_size: int, learning_rate: float, seed: int, log=None
) -> None:
    """Trains `net` in place: cross-entropy, AdamW, one cycle of the learning rate (up to its peak, then cosine to zero).

    images: uint8 (N, 3, H, W); labels: int64 (N,). `log(epoch, loss, accuracy)`, if given, gets each epoch's training means.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=0.02)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_epochs * steps, pct_start=0.2)
    net.train().to(memory_format=torch.channels_last)
    for epoch in range(num_epochs):
        order, total, hits = torch.randperm(len(images), generator=generator), 0.0, 0
        for i in order[: steps * batch_size].split(batch_size):
            batch = augment(images[i, :1].float() / 127.5 - 1, generator)
            logits = net.prompt_logits(batch)
            loss = F.cross_entropy(logits, labels[i])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total, hits = total + loss.item(), hits + (logits.argmax(1) == labels[i]).sum().item()
        if log:
            log(epoch + 1, total / steps, hits / (steps * batch_size))
    net.eval()


@torch.no_grad()
def count_correct(net: GarmentNet, images: Tensor, labels: Tensor, batch_size: int = 500) -> int:
    """How many of the uint8 images (N, 3, H, W) the network names right; labels int64 (N,)."""
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return sum(int((net.prompt_logits(x.float() / 127.5 - 1).argmax(1) == y).sum()) for x, y in pairs)


def save(net: GarmentNet, folder: Path, figures: dict) -> None:
    """Writes model.safetensors (half precision) and config.json (the network and `figures`) into an existing folder."""
    save_tensors(Path(folder) / "model.safetensors", {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()})
    write_json(Path(folder) / "config.json", {"subjects": net.subjects, "widths": net.widths} | figures)
