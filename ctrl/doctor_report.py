"""The doctor's report in words."""

from collections.abc import Mapping

from ctrl.estimate import duration


def text_of(report: Mapping) -> str:
    """Everything in `report` that was measured, and at the end a line for each finding."""
    parts = []
    if "gradients" in report:
        parts += [gradients(report["gradients"]), differences(report["finite_differences"])]
        parts += [accuracy(report["accuracy"]) if "accuracy" in report else errors(report["errors"])]
        parts += [trainers(report["trainers"], report["free_memory_mb"])] if report["trainers"] else []
        parts += ["Suggested settings, to be laid over the config:\n\n" + report["suggestion"].rstrip()] if report["suggestion"] else []
    lines = [f"{'bad' if f['bad'] else 'warning'}: {f['text']}" for f in report["findings"]]
    return "\n\n".join([*parts, "\n".join(lines or ["nothing wrong was found"])])


def points(row: Mapping) -> str:
    return f"{row['mean']:9.3g} [{row['p5']:.2g}, {row['p95']:.2g}]"


def gradients(found: Mapping) -> str:
    """A table: a row for x_0 and for each step, two columns a label."""
    lines = [
        f"Norm of the gradient of log p(y | x), in nats per unit of latent: mean [5 %, 95 %] of {found['n']} pretrained trajectories.",
        "Look-ahead: by x_t through the denoised estimate; carried back: that by x_0 through the sampler's steps.",
    ]
    for row in found["labels"].values():
        lines.append(f"\nlabel {row['name']} (n = {row['n']})\n  {'x_0':>8}  {points(row['x_0'][0])}")
        lines.append(f"  {'t':>8}  {'look-ahead':28}{'carried back'}")
        for t, ahead, adjoint in zip(found["timesteps"], row["look_ahead"], row["adjoint"], strict=True):
            lines.append(f"  {t:>8g}  {points(ahead):28}{points(adjoint)}")
    return "\n".join(lines)


def differences(found: Mapping) -> str:
    error, rounding = found["relative_error"], found["rounding"]
    return (
        f"Gradient of the classifier against finite differences: {'pass' if found['passed'] else 'FAIL'}. Relative error "
        f"{error['median']:.2g} [{error['p5']:.2g}, {error['p95']:.2g}], {found['num_directions']} directions on each of "
        f"{found['n']} images.\n"
        f"Rounding to 256 levels changes log p by {rounding['nats']:.2g} nats; for a step of one level the gradient is off by "
        f"{rounding['error_of_one_level']:.2g}, without rounding by {rounding['without_rounding']:.2g}."
    )


def accuracy(found: Mapping) -> str:
    lines = ["Accuracy of the classifier by the oracle's labels:"]
    for name, row in found.items():
        recall = ", ".join(f"{y}: {'-' if r['n'] == 0 else format(r['recall'], '.3f')} (n = {r['n']})" for y, r in enumerate(row["recall"]))
        lines.append(
            f"  {name.replace('_', '-')} images (n = {row['n']}): {row['accuracy']:.3f}; always the commonest label: "
            f"{row['commonest']['share']:.3f}; recall by label {recall}"
        )
    return "\n".join(lines)


def errors(found: Mapping) -> str:
    lines = ["The classifier's density against the oracle's scores:"]
    for name, row in found.items():
        lines.append(
            f"  {name.replace('_', '-')} images (n = {row['n']}): RMSE {row['rmse']:.3g}, their spread {row['spread']:.3g}, "
            f"R² {row['r2']:.3f}; its 80 % intervals hold {row['coverage_80']:.3f}"
        )
    return "\n".join(lines)


def trainers(costs: Mapping, free_mb: float | None) -> str:
    free = "unknown" if free_mb is None else f"{free_mb:.0f} MB"
    lines = [f"Memory and time of each trainer, without probes and checkpoints; free memory: {free}"]
    for name, c in costs.items():
        if "error" in c:
            lines.append(f"  {name:22} {c['error'].splitlines()[0]}")
            continue
        lines.append(
            f"  {name:22} {c['memory_mb']:8.0f} MB  {c['seconds_per_update']:8.2f} s an update of {c['batch_size']} "
            f"({c['micro_batch_size']} at a time)  {duration(3600 * c['hours'])} for {c['num_updates']} updates"
        )
    return "\n".join(lines)
