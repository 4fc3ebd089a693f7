"""What a classifier makes label probabilities of: a few numbers of an image become log p(y | x)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrl.oracles import check_edges


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


class ScoreHead(nn.Module):
    """Location and scale of a score's law, fitted in units of the training scores' standard deviation.

    The network's two outputs are the mean and s, with scale = exp(log_scale + tanh(s) log 2): within a factor of two of the common one.
    """

    num_outputs = 2
    MIN_SCALE = 5e-3  # of the scores' standard deviation: a score that the network computes exactly would leave no slope to climb

    def __init__(self):
        super().__init__()
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_sd", torch.ones(()))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def prepare(self, scores: Tensor, edges: Sequence[float] | None = None) -> Tensor:
        """Sets the unit from the training scores with shape (N,); returns these in the new unit."""
        self.score_mean.fill_(scores.mean())
        self.score_sd.fill_(scores.std(correction=0).clamp(min=1e-6))
        return (scores - self.score_mean) / self.score_sd

    def start(self, residual_sd: float) -> None:
        """Sets the scale at the start of the fit, from a standard deviation in the new unit."""
        self.log_scale.data.fill_(math.log(residual_sd))

    def location_scale(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the score, in its unit, each with shape (B,)."""
        scale = torch.exp(self.log_scale + math.log(2) * torch.tanh(outputs[:, 1])).clamp(min=self.MIN_SCALE)
        return self.score_mean + self.score_sd * outputs[:, 0], self.score_sd * scale


class GaussianHead(ScoreHead):
    """score ~ N(mean(x), sd(x)²): the density of a continuous label.

    A temperature T makes the law p^(1/T), normalised, which is the Gaussian with sd · sqrt(T).
    """

    def log_prob(self, outputs: Tensor, y: Tensor, temperature: Tensor | float) -> Tensor:
        """log p(y | x) in nats, of a density per unit of the score, shape (B,)."""
        mean, sd = self.location_scale(outputs)
        sd = sd * temperature**0.5
        return -0.5 * ((y - mean) / sd).square() - torch.log(sd) - 0.5 * math.log(2 * math.pi)

    def best_temperature(self, outputs: Tensor, scores: Tensor) -> float:
        """That of the highest likelihood of `scores` (N,), mean z²; not so low that the sd, of most images, would be below MIN_SCALE."""
        mean, sd = self.location_scale(outputs)
        lowest = (self.MIN_SCALE * self.score_sd / sd.median()).square().item()
        return max(((scores - mean) / sd).square().mean().item(), lowest)

    def loss(self, outputs: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood of the scores, in units of their standard deviation."""
        return -(self.log_prob(outputs, scores, 1.0) + torch.log(self.score_sd)).mean()


class DensityHead(ScoreHead):
    """score ~ Logistic(mean(x), scale(x)), fitted in units of the training scores' standard deviation; labels by its distribution function.

    The logistic law has the normal's shape and heavier tails: log p(y | x) falls linearly, not quadratically, with the distance from the
    bin, so the slope that fine-tuning climbs is bounded and no single image far off drowns a batch.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("edges", torch.zeros(num_classes - 1))

    def prepare(self, scores: Tensor, edges: Sequence[float]) -> Tensor:
        """Also sets the edges, in the scores' unit."""
        self.edges.copy_(torch.from_numpy(check_edges(edges)))
        return super().prepare(scores)

    def start(self, residual_sd: float) -> None:
        """The standard deviation of a logistic law is scale · pi / sqrt(3)."""
        self.log_scale.data.fill_(math.log(residual_sd * math.sqrt(3) / math.pi))

    def log_probs(self, outputs: Tensor, temperature: Tensor, descending: bool) -> Tensor:
        mean, scale = self.location_scale(outputs)
        log_probs = interval_log_probs(mean, scale * temperature, self.edges)
        return log_probs.flip(1) if descending else log_probs

    def lowest_temperature(self, outputs: Tensor) -> float:
        """That keeps the scale, of most images, above MIN_SCALE."""
        return min(1.0, (self.MIN_SCALE * self.score_sd / self.location_scale(outputs)[1].median()).item())

    def loss(self, outputs: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood of the scores, in units of their standard deviation."""
        mean, scale = self.location_scale(outputs)
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


HEADS = {"density": DensityHead, "softmax": SoftmaxHead}  # of labels that are classes
