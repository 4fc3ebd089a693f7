"""p(y | x) for labels that are bins of a score: networks, heads, fit, calibration. Differentiable down to the pixels.

A classifier is a network, which makes a few numbers of an image, and a head, which makes label probabilities of these numbers.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from ctrl import metrics
from ctrl.errors import UserError
from ctrl.io import load_tensors, read_json, save_tensors, write_json
from ctrl.labels import Categorical, Factors
from ctrl.networks import NETWORKS, CnnNetwork, to_float
from ctrl.oracles import check_edges


def straight_through(images: Tensor) -> Tensor:
    """The 256 levels in [-1, 1] that an image file keeps of `images`, with the gradient of the identity (clamping included)."""
    images = images.float()
    seen = ((images.detach() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    return seen + (images - images.detach())


# ------------------------------------------------------------------------------------------------------------------ heads


def interval_log_probs(mean: Tensor, scale: Tensor, edges: Tensor) -> Tensor:
    """Log-probabilities (B, K) that Logistic(mean, scale), both with shape (B,), is between the K - 1 ascending `edges`, outer bins open.

    log(F(b) - F(a)) = log F(b) + log(1 - F(a) / F(b)) with F = sigmoid, reflected to the lower tail, in double precision: value and
    gradient stay right hundreds of scales away.
    """
    z = (edges.double() - mean.double()[:, None]) / scale.double()[:, None]
    lower, upper = z[:, :-1], z[:, 1:]
    reflect = lower + upper > 0
    lower, upper = torch.where(reflect, -upper, lower), torch.where(reflect, -lower, upper)
    log_upper = F.logsigmoid(upper)
    difference = (F.logsigmoid(lower) - log_upper).clamp(max=-1e-15)
    inner = log_upper + torch.log(-torch.expm1(difference))
    return torch.cat([F.logsigmoid(z[:, :1]), inner, F.logsigmoid(-z[:, -1:])], dim=1).to(mean.dtype)


class DensityHead(nn.Module):
    """score ~ Logistic(mean(x), scale(x)), fitted in units of the training scores' standard deviation; labels by its distribution function.

    The logistic law has the normal's shape and heavier tails: log p(y | x) falls linearly, not quadratically, with the distance from the
    bin, so the slope that fine-tuning climbs is bounded and no single image far off drowns a batch.

    The network's two outputs are the mean and s, with scale = exp(log_scale + tanh(s) log 2): within a factor of two of the common one.
    """

    num_outputs = 2
    MIN_SCALE = 5e-3  # of the scores' standard deviation: a score that the network computes exactly would leave no slope to climb

    def __init__(self, num_classes: int):
        super().__init__()
        for name, value in {"edges": torch.zeros(num_classes - 1), "score_mean": torch.zeros(()), "score_sd": torch.ones(())}.items():
            self.register_buffer(name, value)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def prepare(self, scores: Tensor, edges: Sequence[float]) -> Tensor:
        """Sets the unit and the edges, in the scores' unit, from the training scores with shape (N,); returns these in the new unit."""
        self.score_mean.fill_(scores.mean())
        self.score_sd.fill_(scores.std(correction=0).clamp(min=1e-6))
        self.edges.copy_(torch.from_numpy(check_edges(edges)))
        return (scores - self.score_mean) / self.score_sd

    def logistic(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the score, in its unit, each with shape (B,). The standard deviation is scale · pi / sqrt(3)."""
        scale = torch.exp(self.log_scale + math.log(2) * torch.tanh(outputs[:, 1])).clamp(min=self.MIN_SCALE)
        return self.score_mean + self.score_sd * outputs[:, 0], self.score_sd * scale

    def log_probs(self, outputs: Tensor, temperature: Tensor, descending: bool) -> Tensor:
        mean, scale = self.logistic(outputs)
        log_probs = interval_log_probs(mean, scale * temperature, self.edges)
        return log_probs.flip(1) if descending else log_probs

    def lowest_temperature(self, outputs: Tensor) -> float:
        """That keeps the scale, of most images, above MIN_SCALE."""
        return min(1.0, (self.MIN_SCALE * self.score_sd / self.logistic(outputs)[1].median()).item())

    def loss(self, outputs: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood of the scores, in units of their standard deviation."""
        mean, scale = self.logistic(outputs)
        z = (scores - mean) / scale
        return (torch.log(scale / self.score_sd) + z + 2 * F.softplus(-z)).mean()


class SoftmaxHead(nn.Module):
    """A logit a label, divided by the temperature."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_outputs = num_classes

    def prepare(self, scores: Tensor, edges: Sequence[float]) -> Tensor:
        return scores

    def log_probs(self, outputs: Tensor, temperature: Tensor, descending: bool) -> Tensor:
        return F.log_softmax(outputs / temperature, dim=1)

    def lowest_temperature(self, outputs: Tensor) -> float:
        return 0.0

    def loss(self, outputs: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)


HEADS = {"density": DensityHead, "softmax": SoftmaxHead}


class Classifier(nn.Module):
    """p(y | x) of the images that a file would hold: pixels are rounded to 256 levels first, with a straight-through gradient.

    `description` holds network, head, num_classes, descending and, for clip, clip = {model, pretrained}; what else it holds is kept.
    """

    def __init__(self, description: dict):
        super().__init__()
        self.description = description
        self.num_classes, self.descending = description["num_classes"], description["descending"]
        self.rounding = True  # False: the smooth function behind the levels
        head, network = description["head"], description["network"]
        self.head = HEADS[head](self.num_classes)
        linear = {"positive": head == "density"}
        options = {"dct": linear, "pixels": linear, "clip": description.get("clip", {})}.get(network, {})
        self.network = NETWORKS[network](self.head.num_outputs, **options)
        self.register_buffer("temperature", torch.ones(()))

    def outputs(self, images: Tensor) -> Tensor:
        """The network's outputs for images in [-1, 1] with shape (B, 3, H, W)."""
        return self.network(self.network.features(straight_through(images) if self.rounding else images.float()))

    def log_probs(self, images: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(y | x) of every label, shape (B, K), for images in [-1, 1]; `temperature` > 1 softens the calibrated classifier."""
        return self.head.log_probs(self.outputs(images), self.temperature * temperature, self.descending)

    def log_prob(self, images: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(y | x) with shape (B,), for images in [-1, 1] and labels with shape (B,)."""
        return self.log_probs(images, temperature).gather(1, y.to(images.device)[:, None])[:, 0]

    def state(self) -> dict[str, Tensor]:
        """Everything that was learned; the frozen CLIP is named in the description instead."""
        return {k: v for k, v in self.state_dict().items() if "network.clip." not in k}


class Product(nn.Module):
    """p(y | x) = Π p_f(y_f | x) for labels of several factors, which are functions of the image alone: a calibrated classifier of each.

    Labels are codes of ctrl.labels; a factor that a label leaves free says nothing.
    """

    def __init__(self, classifiers: Sequence[Classifier]):
        super().__init__()
        self.factors = nn.ModuleList(classifiers)
        self.space = Factors(tuple(Categorical(c.num_classes) for c in classifiers))
        self.num_classes = self.space.num_classes
        self.description = {"factors": [c.description for c in classifiers]}

    def log_probs(self, images: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(y | x) of every full combination, shape (B, K); for the arguments see `Classifier.log_probs`."""
        parts = self.space.parts[: self.num_classes].to(images.device)
        return sum(factor.log_probs(images, temperature)[:, y] for factor, y in zip(self.factors, parts.T, strict=True))

    def log_prob(self, images: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
        """log p(y | x) of the factors that the codes `y` with shape (B,) set; shape (B,)."""
        parts = self.space.parts.to(images.device)[y.to(images.device)]
        total = 0.0
        for factor, part in zip(self.factors, parts.T, strict=True):
            total = total + torch.where(part < 0, 0.0, factor.log_prob(images, part.clamp(min=0), temperature))
        return total

    def state(self) -> dict[str, Tensor]:
        return {f"{k}.{name}": value for k, factor in enumerate(self.factors) for name, value in factor.state().items()}


# -------------------------------------------------------------------------------------------------------- fit, calibration


def fit(
    images: Tensor, scores: Sequence[float], labels: Sequence[int], splits: Sequence[str], description: dict, config: dict, seed: int,
    device: str = "cpu",
) -> tuple[Classifier, list[dict]]:  # fmt: skip
    """Trains on the split `train`, keeps the epoch that is best on `val`, calibrates the temperature on `calibration` alone.

    images: uint8, shape (N, 3, H, W). config: num_epochs, batch_size, learning_rate, weight_decay. description: see Classifier, with
    `edges`. Returns the classifier, on `device`, and a row per epoch (epoch, train_loss, val_loss, learning_rate).
    """
    scores, labels = torch.tensor(np.array(scores), dtype=torch.float32), torch.tensor(np.array(labels), dtype=torch.int64)
    where = {name: torch.from_numpy(np.flatnonzero(np.asarray(splits) == name)) for name in ("train", "val", "calibration")}
    for name, rows in where.items():
        if len(rows) == 0:
            raise UserError(f"the dataset has no image in its split {name}: raise dataset.splits.{name} or add images")
    if description["network"] == "dct" and (images.shape[2] % 8 or images.shape[3] % 8):
        raise UserError(f"network dct needs sides that are multiples of 8 pixels, not {images.shape[3]}x{images.shape[2]}; take cnn")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(description)
    targets = classifier.head.prepare(scores[where["train"]], description["edges"])
    features = precompute(classifier.to(device), images)
    residual_sd = classifier.cpu().network.prepare(features[where["train"]], targets)
    if residual_sd is not None:
        classifier.head.log_scale.data.fill_(math.log(residual_sd * math.sqrt(3) / math.pi))
    history = train_epochs(classifier.to(device), (features, scores, labels), where, config, seed)
    rows = where["calibration"]
    calibrate(classifier, outputs_of(classifier, features[rows]), labels[rows])
    return classifier.requires_grad_(False), history


@torch.no_grad()
def precompute(classifier: Classifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """The network's fixed features of uint8 images; a network that learns from the pixels gets the images themselves."""
    if isinstance(classifier.network, CnnNetwork):
        return images
    device = classifier.temperature.device
    return torch.cat([classifier.network.features(to_float(batch.to(device))).cpu() for batch in images.split(batch_size)])


@torch.no_grad()
def outputs_of(classifier: Classifier, features: Tensor, batch_size: int = 256) -> Tensor:
    device = classifier.temperature.device
    return torch.cat([classifier.network(batch.to(device)) for batch in features.split(batch_size)])


def train_epochs(classifier: Classifier, data: tuple[Tensor, Tensor, Tensor], where: dict, config: dict, seed: int) -> list[dict]:
    """Adam with the learning rate halved on plateaus of the validation loss; leaves the best epoch's weights in `classifier`."""
    features, scores, labels = data
    network, head = classifier.network, classifier.head
    groups = [
        {"params": [p for p in network.parameters() if p.requires_grad], "weight_decay": config["weight_decay"]},
        {"params": list(head.parameters()), "lr": 10 * config["learning_rate"], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config["learning_rate"])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    generator = torch.Generator().manual_seed(seed)
    history, best, best_state = [], math.inf, copy.deepcopy(classifier.state())

    def loss_at(rows: Tensor) -> Tensor:
        batch = [values[rows].to(classifier.temperature.device) for values in (features, scores, labels)]
        return head.loss(network(batch[0]), batch[1], batch[2])

    progress = tqdm(range(config["num_epochs"]), desc="classifier", mininterval=2, disable=None)
    for epoch in progress:
        total = 0.0
        classifier.train()
        for rows in where["train"][torch.randperm(len(where["train"]), generator=generator)].split(config["batch_size"]):
            loss = loss_at(rows)
            if not torch.isfinite(loss):
                raise UserError(f"the classifier's loss is {loss.item()} in epoch {epoch}: lower classifier.learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        classifier.eval()
        with torch.no_grad():
            val = sum(loss_at(rows).item() * len(rows) for rows in where["val"].split(1024)) / len(where["val"])
        if val < best:
            best, best_state = val, {k: v.clone() for k, v in classifier.state().items()}
        history.append(
            {"epoch": epoch, "train_loss": total / len(where["train"]), "val_loss": val, "learning_rate": plateau.get_last_lr()[0]}
        )
        plateau.step(val)
        progress.set_postfix(train=f"{history[-1]['train_loss']:.3f}", val=f"{val:.3f}")
    classifier.eval().load_state_dict(best_state, strict=False)
    return history


@torch.no_grad()
def calibrate(classifier: Classifier, outputs: Tensor, labels: Tensor) -> float:
    """Sets the temperature, in 0.05 to 20, that minimises the labels' NLL given the network's outputs (N, .); returns it.

    Temperature scaling of Guo et al. 2017 (arXiv 1706.04599): a search along one dimension, log T.
    """
    outputs, labels = outputs.double(), labels.cpu()

    def nll(log_temperature: float) -> float:
        log_probs = classifier.head.log_probs(outputs, torch.tensor(math.exp(log_temperature)), classifier.descending)
        return metrics.nll(log_probs.cpu(), labels)

    limit = math.log(20)
    found = scipy.optimize.minimize_scalar(nll, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-4})
    temperature = max(math.exp(found.x), classifier.head.lowest_temperature(outputs))
    classifier.temperature.fill_(temperature)
    return temperature


# --------------------------------------------------------------------------------------------------- scores of a classifier


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor, batch_size: int = 256) -> dict[str, Tensor]:
    """Log-probabilities (N, K) of uint8 images, `before` and `after` calibration."""
    device = classifier.temperature.device
    outputs = torch.cat([classifier.outputs(to_float(batch.to(device))) for batch in images.split(batch_size)])
    temperatures = {"before": torch.ones_like(classifier.temperature), "after": classifier.temperature}
    return {k: classifier.head.log_probs(outputs, t, classifier.descending).cpu() for k, t in temperatures.items()}


def evaluate(log_probs: dict[str, Tensor], labels: Tensor) -> dict:
    """Sample size n, and accuracy, nll (nats) and ece (15 bins) for each entry of `log_probs`."""
    rows = {
        name: {
            "accuracy": (values.argmax(1) == labels).double().mean().item(),
            "nll": metrics.nll(values, labels),
            "ece": metrics.ece(values.exp(), labels),
        }
        for name, values in log_probs.items()
    }
    return {"n": len(labels), **rows}


def reliability_diagram(panels: dict[str, tuple[dict[str, Tensor], Tensor]]) -> Figure:
    """Accuracy against confidence, before and after calibration; a panel for each entry of `panels`: (log-probabilities, labels).

    Small figures are the number of images in a bin, after calibration.
    """
    figure = Figure(figsize=(4.5 * len(panels), 4.5), layout="constrained")
    for axes, (title, (log_probs, labels)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        for name, values in log_probs.items():
            bins = metrics.reliability(values.exp(), labels)
            full = bins["count"] > 0
            label = f"{name}: ECE {metrics.ece(values.exp(), labels):.3f}"
            axes.plot(bins["confidence"][full], bins["accuracy"][full], marker="o", label=label)
        for x, y, n in zip(*(bins[k][full].tolist() for k in ("confidence", "accuracy", "count")), strict=True):
            axes.annotate(f"{n:.0f}", (x, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=7)
        axes.set(title=f"{title} (n = {len(labels)})", xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend(loc="upper left")
    return figure


# --------------------------------------------------------------------------------------------------------------- on disk


def save(folder: Path, classifier: Classifier | Product) -> None:
    """Writes model.safetensors and config.json: the description, each temperature, and the SHA-256 of the weights."""
    folder = Path(folder)
    save_tensors(folder / "model.safetensors", classifier.state())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if isinstance(classifier, Product):
        description = {"factors": [c.description | {"temperature": c.temperature.item()} for c in classifier.factors]}
    else:
        description = classifier.description | {"temperature": classifier.temperature.item()}
    write_json(folder / "config.json", description | {"sha256": digest})


def load(folder: Path) -> Classifier | Product:
    """The classifier that `save` wrote, frozen, in evaluation mode; UserError where a file is missing, corrupt or does not fit."""
    folder = Path(folder)
    description, state = read_json(folder / "config.json"), load_tensors(folder / "model.safetensors")
    try:
        if description["sha256"] != hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest():
            raise ValueError("its weights are not those that config.json names")
        if "factors" in description:
            classifier = Product([Classifier(d) for d in description["factors"]])
            state = {f"factors.{name}": value for name, value in state.items()}
        else:
            classifier = Classifier(description)
        missing, unexpected = classifier.load_state_dict(state, strict=False)
        if wrong := [name for name in [*missing, *unexpected] if "network.clip." not in name]:
            raise ValueError(f"missing or unknown: {wrong[0]}")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}/model.safetensors is corrupt or of another version ({error}): train the classifier again") from error
    return classifier.eval().requires_grad_(False)
