"""What can be known of a base, a classifier and data before hours are spent on training.

Every check is a function from measurements to a report (plain numbers) and to findings: one line for each thing that is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl.base import Base
from ctrl.classifier import Classifier, Density, Product
from ctrl.config import for_adapter, merge
from ctrl.contradictions import check_across
from ctrl.errors import UserError
from ctrl.gradients import MAX_ERROR, summary
from ctrl.labels import Continuous, Factors

DEAD = 1e-6  # nats per unit of latent: a gradient below this moves nothing
DROP = 0.1  # of accuracy, from held-out to generated images


@dataclass(frozen=True)
class Finding:
    """One line: `bad` where a piece cannot be used as it is, else a warning."""

    bad: bool
    text: str


def check_pieces(base: Base, classifier: Classifier | Product, space: Factors | Continuous, cells: Sequence[tuple]) -> list[Finding]:
    """A line for each piece that is broken in itself, or does not fit the dataset's labels."""
    findings = []
    for name, module in {"classifier": classifier, f"base's {base.part}": base.network, "base's VAE": base.pipe.vae}.items():
        broken = [key for key, value in module.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            findings.append(f"{name}: {len(broken)} of its weights are not finite ({broken[0]}): load or train it again")
    if base.network.class_embedding is not None:
        findings.append(f"base: its {base.part} has a class embedding already; CTRL needs that slot for the new label: take another base")
    return [Finding(True, text) for text in findings + check_labels(classifier, space, cells)]


def check_labels(classifier: Classifier | Product, space: Factors | Continuous, cells: Sequence[tuple]) -> list[str]:
    """A line for each of classifier and cells that speaks of other labels than the dataset."""
    findings, kinds = [], {True: "a number", False: "of classes"}
    continuous, density = isinstance(space, Continuous), isinstance(classifier, Density)
    ranges = all(isinstance(y, tuple) for _, y in cells)
    if density != continuous:
        findings.append(f"classifier: its label is {kinds[density]}, the dataset's is {kinds[continuous]}: train it again")
    elif not continuous and classifier.num_classes != space.num_classes:
        findings.append(f"classifier: it has {classifier.num_classes} labels, the dataset has {space.num_classes}: train it again")
    if ranges != continuous:
        findings.append(f"cells: their label is {kinds[ranges]}, the dataset's is {kinds[continuous]}: estimate them again")
    elif continuous:
        low, high = space.limits
        if wrong := [y for _, limits in cells for y in limits if not low <= y <= high]:
            findings.append(f"cells: they ask for {wrong[0]:g}, but the dataset has {low:.4g} to {high:.4g}: estimate them again")
    elif wrong := [y for _, y in cells if not 0 <= y < space.num_codes]:
        findings.append(f"cells: they ask for label {wrong[0]}, but the dataset has 0 to {space.num_codes - 1}: estimate them again")
    return findings


def recipes(config: dict, examples: bool) -> dict[str, dict]:
    """The configuration that each trainer would run with: `finetune` with that trainer; for `supervised`, the first adapter that has it.

    `supervised` only where there are `examples`. A configuration that contradicts itself is left out: adjoint matching without a KL.
    """
    found = {}
    for trainer in ("backprop", "adjoint", "efficient_adjoint", "policy_gradient", *(["supervised"] if examples else [])):
        changes = {"trainer": trainer} | ({} if trainer == "backprop" else {"truncation": None})
        if trainer == "efficient_adjoint":
            changes |= {"num_terms": None, "control_variate": False}
        if trainer == "policy_gradient":
            changes["checkpoint_every"] = config["finetune"]["policy_gradient"]["reuse"]
        one = merge(config, {"finetune": changes})
        if trainer == "supervised":
            named = (for_adapter(config, name) for name in config["adapters"])
            one = next((c for c in named if c["finetune"]["trainer"] == trainer), one)
        try:
            check_across(one)
        except UserError:
            continue
        found[trainer] = one
    return found


def titles(labels: Tensor, space: Factors) -> dict[int, str]:
    """What each of the codes in `labels` is, in words."""
    return {y: f"{y} ({space.name(y)})" for y in labels.unique().tolist()}


def gradient_report(found: Mapping[str, Tensor], labels: Tensor, names: Mapping[int, str], timesteps: Sequence[int]) -> dict:
    """The norms of `gradient_norms` by label, (B,): a summary of each step; `names` say what each of `labels` is."""
    rows = {
        str(y): {"name": names[y], "n": int((labels == y).sum())}
        | {key: [summary(row[labels == y]) for row in found[key]] for key in ("x_0", "look_ahead", "adjoint")}
        for y in labels.unique().tolist()
    }
    return {"n": len(labels), "timesteps": list(timesteps), "labels": rows}


def gradient_findings(found: Mapping[str, Tensor], labels: Tensor, names: Mapping[int, str], timesteps: Sequence[int]) -> list[Finding]:
    """A line for each gradient that is zero in every trajectory, or not finite in one; labels with the same trouble share a line."""
    steps, troubles = [f"t = {t:g}" for t in timesteps], {}
    places = {"x_0": ["x_0"], "look_ahead": [f"x̂_0 of {s}" for s in steps], "adjoint": steps}
    for y in labels.unique().tolist():
        where = {"a gradient that is not finite": [], "no gradient": []}
        for key, titles in places.items():
            for title, row in zip(titles, found[key][:, labels == y], strict=True):
                if not row.isfinite().all():
                    where["a gradient that is not finite"].append(title)
                elif row.max() <= DEAD:
                    where["no gradient"].append(title)
        for trouble, at in where.items():
            if at:
                troubles.setdefault((trouble, tuple(at)), []).append(y)
    everywhere = sum(map(len, places.values()))
    findings = []
    for (trouble, at), ys in troubles.items():
        shown = "all steps" if len(at) == everywhere else ", ".join(at)
        which = ", ".join(names[y] for y in ys)
        remedy = (
            "check its weights and base.dtype"
            if "finite" in trouble
            else "it says the same of every image: train it again, or take finetune.trainer: policy_gradient"
        )
        bad = "finite" in trouble or at[0] == "x_0"
        findings.append(Finding(bad, f"classifier: log p(y | x) of label {which} has {trouble} at {shown}; {remedy}"))
    return findings


def finite_difference_findings(report: dict) -> list[Finding]:
    if report["passed"]:
        return []
    error = report["relative_error"]["p95"]
    text = f"classifier: its gradient is off by {error:.2g} of finite differences (at most {MAX_ERROR:g} is right); see ctrl/networks.py"
    return [Finding(True, text)]


def accuracy_report(log_probs: Tensor, labels: Tensor) -> dict:
    """Accuracy of log-probabilities (N, K) on `labels` (N,) with its sample size, the share of the commonest label, each label's recall.

    `gain` is how much more often than always naming the commonest label the classifier is right, `gain_error` its standard error.
    """
    right, counts = log_probs.argmax(1) == labels, torch.bincount(labels, minlength=log_probs.shape[1])
    gain = right.double() - (labels == counts.argmax()).double()
    recall = [{"n": int(n), "recall": right[labels == y].double().mean().item() if n else None} for y, n in enumerate(counts.tolist())]
    return {
        "n": len(labels),
        "accuracy": right.double().mean().item(),
        "commonest": {"label": int(counts.argmax()), "share": counts.max().item() / len(labels)},
        "gain": gain.mean().item(),
        "gain_error": gain.std(correction=0).item() / len(labels) ** 0.5,
        "recall": recall,
    }


def accuracy_findings(generated: dict, held_out: dict, asked: Sequence[int], names: Sequence[str]) -> list[Finding]:
    """Lines on the reports of generated and of held-out images; `asked` are the labels that training asks for."""
    n, accuracy, commonest = generated["n"], generated["accuracy"], generated["commonest"]
    if commonest["share"] == 1:
        return [Finding(True, f"data: all {n} generated images have label {commonest['label']}: move label.edges; nothing can be learned")]
    findings, against = [], f"{accuracy:.3f} on {n} generated images, the commonest label's share is {commonest['share']:.3f}"
    if generated["gain"] <= 0:
        findings.append(Finding(True, f"classifier: accuracy {against}: it has learned nothing of them; check the labels, train it again"))
    elif generated["gain"] <= 2 * generated["gain_error"]:
        findings.append(Finding(False, f"classifier: accuracy {against}: hardly better; take more images (--num-images) or train it again"))
    error = sum(r["accuracy"] * (1 - r["accuracy"]) / r["n"] for r in (generated, held_out)) ** 0.5
    if (drop := held_out["accuracy"] - accuracy) > max(DROP, 2 * error):
        text = (
            f"accuracy {accuracy:.3f} on {n} generated images, {held_out['accuracy']:.3f} on {held_out['n']} held-out ones: {drop:.3f} less"
        )
        findings.append(Finding(False, f"classifier: {text}; generated images look different to it (dataset.kind: generated helps)"))
    for y in asked:
        row = generated["recall"][y]
        if row["n"] == 0:
            findings.append(Finding(False, f"data: none of {n} generated images has label {y} ({names[y]}); move label.edges"))
        elif row["n"] >= 5 and row["recall"] == 0:
            findings.append(Finding(False, f"classifier: it recognises none of {row['n']} generated images of label {y} ({names[y]})"))
    return findings
