"""Settings of the section `finetune` that follow from what was measured, each with its reason, as a fragment of a config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ctrl.doctor import DEAD

RECOMPUTED = {"backprop, recomputed": True, "backprop, by blocks": "blocks"}  # gradient checkpointing, in the order to try
MARGIN = 0.8  # of the free memory, to be filled
STAKE = 10.0  # nats of reward, of gamma times log p, to be gained at the start beyond a guess; a path KL of this size is soon paid
STARTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)  # temperature.start, per gamma 1


def recomputed(finetune: Mapping) -> dict[str, dict]:
    """What of RECOMPUTED takes less than the section `finetune` as it is, each with the settings to change; compilation excludes blocks."""
    order = [False, *RECOMPUTED.values()]
    more = order[order.index(finetune["gradient_checkpointing"]) + 1 :]
    return {
        how: {"gradient_checkpointing": level}
        for how, level in RECOMPUTED.items()
        if level in more and not (level == "blocks" and finetune["speed"]["compile"])
    }


@dataclass(frozen=True)
class Setting:
    """A key of `finetune`, its value as YAML, and why."""

    key: str
    value: str
    reason: str


def stakes(log_prob: Callable[[float], Tensor], guess: Tensor, gamma: float) -> dict[float, float]:
    """gamma · (guess − log p̂(y | x_0)) in nats, its mean over pretrained images, at the temperature that each of STARTS amounts to.

    `log_prob(temperature)` with shape (B,) is of the labels asked for, `guess` (B,) what saying nothing of the image would give them.
    """
    return {start: gamma * (guess - log_prob(max(1.0, start * gamma)).cpu()).double().mean().item() for start in STARTS}


def temperature_start(stake: Mapping[float, float], gamma: float) -> Setting:
    """The least softening at which the reward that is missing is of the size of a KL that a policy can pay at once."""
    start = next((s for s in STARTS if stake[s] <= STAKE), min(stake, key=stake.get))
    sharp = f", and {stake[STARTS[0]]:.3g} at {STARTS[0]:g}" if start != STARTS[0] else ""
    reason = (
        f"per gamma 1: at gamma {gamma:g} pretrained images then miss {stake[start]:.3g} nats of reward{sharp}; {STAKE:g} are a fair start"
    )
    return Setting("temperature", f"{{start: {start:g}}}", reason)


def max_adjoint_norm(found: Mapping[str, Tensor]) -> Setting:
    """The bound at which no trajectory pulls harder than the typical one: the median gradient, of those that are not zero."""
    g = found["adjoint"].flatten()
    pulling = g[g > DEAD]
    if not len(pulling):
        return Setting("max_adjoint_norm", "null", "no trajectory has a gradient: there is nothing to bound")
    median, high = pulling.median().item(), pulling.quantile(0.95).item()
    reason = f"per gamma 1: the median gradient by x_t, so that no trajectory pulls harder; 95 % are below {high:.3g}, and null bounds none"
    return Setting("max_adjoint_norm", f"{float(f'{median:.2g}'):g}", reason)


def fitting(cost: Mapping, free_mb: float | None) -> int | None:
    """The largest divisor of the batch whose memory fits, by what a trajectory took; the configured one where nothing is known."""
    size, before, measured = cost["micro_batch_size"], cost["memory_before_mb"], cost["measured_memory_mb"]
    if free_mb is None:
        return size
    kept = cost["memory_mb"] - measured  # beside the micro-batch
    divisors = [d for d in range(cost["batch_size"], 0, -1) if cost["batch_size"] % d == 0]
    return next((d for d in divisors if before + (measured - before) * d / size + kept <= MARGIN * free_mb), None)


def trainer_and_memory(costs: Mapping[str, dict], free_mb: float | None, dull: bool) -> list[Setting]:
    """trainer, micro_batch_size and gradient_checkpointing; `costs` by trainer, also those of RECOMPUTED that were measured.

    `dull`: the classifier's gradient is of no use.
    """
    free = "" if free_mb is None else f" of {free_mb:.0f} MB that are free"
    order = ("policy_gradient",) if dull else ("backprop", *RECOMPUTED, "adjoint")
    fits = {name: fitting(costs[name], free_mb) for name in order if "seconds_per_update" in costs.get(name, {})}
    if not fits:
        return []
    name = next((name for name, size in fits.items() if size), list(fits)[-1])
    cost, size = costs[name], fits[name] or 1
    if dull:
        reason = "the classifier's gradient or its labels are of no use; the oracle's own answer is the reward"
    elif name.startswith("backprop"):
        reason = "exact, and its memory fits"
    else:
        reason = "back-propagation does not fit or was not measured; adjoint matching keeps a graph of one step"
    if cost["micro_batch_size"] == size:
        why = f"{cost['memory_mb']:.0f} MB{free} with it; {cost['seconds_per_update']:.3g} s an update"
    else:
        why = f"the largest divisor of batch_size that fits; {cost['micro_batch_size']} takes {cost['memory_mb']:.0f} MB{free}"
    settings = [Setting("trainer", cost["trainer"], reason)]
    if cost["trainer"] != "backprop":
        settings.append(Setting("truncation", "null", "this trainer takes none"))
    if cost["trainer"] == "policy_gradient":
        every = cost["reuse"] * -(-25 // cost["reuse"])
        settings.append(Setting("checkpoint_every", str(every), "a multiple of policy_gradient.reuse"))
    checkpointing = cost["gradient_checkpointing"]
    needed = "activations do not fit; they are computed again on the way back" if checkpointing else "everything fits without it"
    return [
        *settings,
        Setting("micro_batch_size", str(size), why),
        Setting("gradient_checkpointing", str(checkpointing).lower(), needed),
    ]


def memory_text(name: str, cost: Mapping, free_mb: float | None) -> str | None:
    """One line where a trainer takes more than is free, naming the setting to lower."""
    if free_mb is None or cost["memory_mb"] <= free_mb:
        return None
    level = {False: "true", True: "blocks"}.get(cost["gradient_checkpointing"]) if cost["trainer"] == "backprop" else None
    more = f" or set finetune.gradient_checkpointing: {level}" if level else ""
    taken = f"{cost['memory_mb']:.0f} MB for {(size := cost['micro_batch_size'])} at a time, {free_mb:.0f} MB are free"
    return f"memory: {name} takes {taken}; lower finetune.micro_batch_size ({size}){more}"


def fragment(settings: Sequence[Setting], adapters: Mapping[str, Mapping]) -> str:
    """YAML to be laid over a config; nothing where there is nothing to say.

    Of the config's `adapters`, those that only back-propagation can train keep it, whatever the trainer of the rest.
    """
    if not settings:
        return ""
    text = "finetune:\n" + "".join(f"  # {s.reason}\n  {s.key}: {s.value}\n" for s in settings)
    if any(s.key == "trainer" and s.value != "backprop" for s in settings):
        bound = [name for name, a in adapters.items() if "trainer" not in a and (a.get("kl_weight") == 0 or a.get("truncation"))]
        if bound:
            text += "adapters:\n  # without a KL, or truncated: for back-propagation alone\n"
        text += "".join(f"  {name}: {{trainer: backprop}}\n" for name in bound)
    return text
