"""Images for a table of (prompt, label, seed) rows, whatever the method, with what each of them cost."""

import time
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from ctrl.base import Base
from ctrl.errors import UserError
from ctrl.finetune.objective import within_cell_variance
from ctrl.process import Denoiser, Process
from ctrl.sampling import noise_of, path_statistics, sample

MakeDenoiser = Callable[[list[str], Tensor], Denoiser]  # prompts, labels with shape (B,)
# prompts, labels, seeds -> x_0 with shape (B, *), and what the method says of each image: further columns of the table, B entries each
Draw = Callable[[list[str], Tensor, Sequence[int]], tuple[Tensor, dict[str, list]]]


def denoised(base: Base, process: Process, make_denoiser: MakeDenoiser) -> Draw:
    """The common sampling loop, of whatever `make_denoiser` makes."""

    def draw(prompts: list[str], labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, dict[str, list]]:
        return sample(process, make_denoiser(prompts, labels), noise_of(seeds, base.latent_shape, process.num_steps, base.device)), {}

    return draw


def generate(base: Base, rows: pd.DataFrame, draw: Draw, batch_size: int) -> Iterator[tuple[Tensor, pd.DataFrame]]:
    """Yields batches of images in [-1, 1] with shape (B, 3, H, W), with their rows and the columns nfe_forward, nfe_backward, seconds.

    What else `draw` says of each image becomes a column too. An image depends on its row and on nothing else.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows.iloc[start : start + batch_size]
        started, forward, backward = time.perf_counter(), base.passes.forward, base.passes.backward
        x_0, columns = draw(batch["prompt"].tolist(), torch.tensor(batch["label"].to_numpy()), batch["seed"].tolist())
        with torch.no_grad():
            images = base.decode(x_0).clamp(-1, 1)
        base.synchronize()
        n = len(batch)
        cost = {
            "nfe_forward": (base.passes.forward - forward) / n,
            "nfe_backward": (base.passes.backward - backward) / n,
            "seconds": (time.perf_counter() - started) / n,
        }
        yield images, batch.assign(**cost, **columns)


def reject(
    base: Base, rows: pd.DataFrame, draw: Draw, batch_size: int, label_of: Callable[[Tensor], Sequence[float]], seeds: Sequence[int],
    tolerance: float = 0.0,
) -> Iterator[tuple[Tensor, pd.DataFrame]]:  # fmt: skip
    """Exact conditional samples of one prompt: draws from the pretrained model until the oracle (`label_of` images) says the row's label.

    All labels share one stream of draws, in which the draws with label y are independent samples of p(x | c, y). A row's cost is what it
    would have been for that label alone: all draws since the label came last. The draws take `seeds` in turn, which replace the rows'.
    A continuous label is met by a score within `tolerance` of it; the labels are to be at least two tolerances apart.
    Raises UserError where the `seeds` do not suffice.
    """
    (prompt,), (subject,) = rows["prompt"].unique(), rows["subject"].unique()
    open_rows = {y: list(group.index) for y, group in rows.groupby("label")}
    cost = {y: {"nfe_forward": 0.0, "nfe_backward": 0.0, "seconds": 0.0} for y in open_rows}
    for start in range(0, len(seeds), batch_size):
        draws = pd.DataFrame({"prompt": prompt, "label": -1, "seed": seeds[start : start + batch_size]})
        images, draws = next(generate(base, draws, draw, batch_size))
        taken, accepted = [], []
        for k, found in enumerate(label_of(images)):
            y = next((asked for asked in open_rows if abs(asked - found) <= tolerance), None)
            for spent in cost.values():
                for name in spent:
                    spent[name] += draws.iloc[k][name]
            if y is not None:
                taken.append(k)
                accepted.append(rows.loc[open_rows[y].pop(0)].to_dict() | {"seed": draws.iloc[k]["seed"]} | cost[y])
                cost[y] = dict.fromkeys(cost[y], 0.0)
                if not open_rows[y]:
                    del open_rows[y], cost[y]
        if taken:
            yield images[taken], pd.DataFrame(accepted)
        if not open_rows:
            return
    y, left = next(iter(open_rows.items()))
    raise UserError(
        f"rejection: {len(seeds)} draws of {subject!r} left {len(left)} rows of label {y:.4g}; "
        f"raise {'label.tolerance' if tolerance else 'cells.min_probability'}"
    )


def path_figures(
    base: Base, process: Process, rows: pd.DataFrame, psi: MakeDenoiser, pre: MakeDenoiser, log_prob: Callable[[Tensor, Tensor], Tensor],
    gamma: float, batch_size: int, active: Sequence[bool] | None = None,
) -> dict[str, dict]:  # fmt: skip
    """kl_nats and var_log_w over the paths of `rows`, each with its sample size; `log_prob` takes x_0 and labels, in nats.

    kl_nats also has each path's `values` and `seeds`, for an interval.
    """
    kl, log_w = [], []
    for start in range(0, len(rows), batch_size):
        part = rows.iloc[start : start + batch_size]
        prompts, labels = part["prompt"].tolist(), torch.tensor(part["label"].to_numpy(), device=base.device)
        noise = noise_of(part["seed"], base.latent_shape, process.num_steps, base.device)
        x_0, kl_nats, log_ratio = path_statistics(process, psi(prompts, labels), pre(prompts, labels), noise, active)
        with torch.no_grad():
            log_w.append(gamma * log_prob(x_0, labels) - log_ratio)
        kl.append(kl_nats)
    variance = within_cell_variance(torch.cat(log_w), list(zip(rows["subject"], rows["label"], strict=True)))
    paths, n = torch.cat(kl), len(rows)
    kl_nats = {"value": paths.mean().item(), "n": n, "values": paths.tolist(), "seeds": rows["seed"].tolist()}
    return {"kl_nats": kl_nats, "var_log_w": {"value": variance, "n": n}}
