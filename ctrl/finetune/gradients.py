"""`gradient(update)` of each trainer, for the loop: draws an update's trajectories, anneals, runs the trainer, and sums up the figures."""

import math
from collections.abc import Callable

import torch

from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.finetune.adjoint import adjoint
from ctrl.finetune.backprop import backprop
from ctrl.finetune.efficient_adjoint import efficient_adjoint, information, levels
from ctrl.finetune.objective import annealed, effective_gamma, summed_kl_weight, term_weights
from ctrl.finetune.parallel import gathered, rows_of, total, world
from ctrl.finetune.policy_gradient import advantages, policy_gradient, rollout
from ctrl.finetune.speed import autocast, in_slices
from ctrl.finetune.supervised import supervised
from ctrl.finetune.task import Batch, Examples, LogProb, Policies, Task, batch_function, recomputed

TRAINERS = {"backprop": backprop, "adjoint": adjoint}
LABEL_DROPOUT = 0.1  # of each factor in supervised fine-tuning, so that it also learns what it means to leave it free


def gradient_function(task: Task, log_prob: LogProb, config: dict) -> Callable[[int], dict[str, float]]:
    """`gradient(update)`, for the loop: adds the gradient of CTRL's objective over one batch of trajectories to every `.grad`.

    With several processes each adds that of its own rows; the figures are of all.
    """
    if config["trainer"] == "policy_gradient":
        return policy_gradient_function(task, log_prob, config)
    if config["trainer"] == "efficient_adjoint":
        return efficient_adjoint_function(task, log_prob, config)
    batch_of, kl_weight, size = batch_function(task, config), kl_weight_of(task, config), config["batch_size"]
    switch, gamma = config["speed"]["autocast"], config["gamma"]
    dimensions = math.prod(task.control.base.latent_shape)
    optimum = effective_gamma(gamma, config["kl_weight"], config["kl_reduction"], dimensions)  # log w is constant at its optimum
    # With blocks, whole passes too. No graph of adjoint matching spans two steps: to compute a pass again would save nothing there.
    backward = config["trainer"] == "backprop"
    again = {"recompute": recomputed} if config["gradient_checkpointing"] and backward else {}

    def own_of(batch: Batch, policies: Policies, rows: torch.Tensor) -> dict:
        """What one of the trainers alone takes."""
        if backward:
            return again or {"both": policies.both}  # not both: a pass of the two, computed again, holds twice the activations
        return {"unguided": batch.unguided(task, rows, switch)} if config["unguided_jacobian"] else {}

    log_prob, temperature_of, max_adjoint_norm = reward_of(task, log_prob, config)

    def gradient(update: int) -> dict[str, float]:
        batch = batch_of(update)
        cut = {}
        if config["truncation"]:
            low, high = config["truncation"]
            cut = {"num_grad_steps": torch.randint(low, high + 1, (size,), generator=batch.generator).clamp(max=batch.process.num_steps)}
        temperature = temperature_of(update)
        parts, active = [], task.control.active(batch.process)
        weights = term_weights(active, config["num_terms"], batch.generator)
        for rows in rows_of(size).split(config["micro_batch_size"]):
            policies, y, noise = batch.part(task, rows, switch)
            parts.append(
                TRAINERS[config["trainer"]](
                    batch.process, policies.psi, policies.pre, lambda x_0, y=y: log_prob(x_0, y, temperature), noise, gamma, kl_weight,
                    share=1 / size, active=active, max_adjoint_norm=max_adjoint_norm, weights=weights,
                    held=policies.held if config["control_variate"] else None, **{key: k[rows] for key, k in cut.items()},
                    **own_of(batch, policies, rows),
                )
            )  # fmt: skip
        terms = {key: gathered(torch.cat([p[key] for p in parts]), size).double().cpu() for key in ("log_prob", "kl_nats", "log_ratio")}
        mean = {key: terms[key].mean().item() for key in ("log_prob", "kl_nats")}
        loss = kl_weight * mean["kl_nats"] - gamma * mean["log_prob"]
        variance = batch.variance(optimum * terms["log_prob"] - terms["log_ratio"]) if math.isfinite(optimum) else {}
        return {"loss": loss, **mean, "temperature": temperature, **variance}

    return counted(task.control, gradient)


def counted(control: Control, gradient: Callable[[int], dict[str, float]]) -> Callable[[int], dict[str, float]]:
    """`gradient`, whose figures also say how many images went through the UNet, forward and backward, of all processes."""

    def counting(update: int) -> dict[str, float]:
        passes = control.base.passes
        before = passes.forward, passes.backward
        figures = gradient(update)
        ways, device = zip(("forward", "backward"), before, strict=True), control.base.device
        return figures | {f"unet_{way}": total(getattr(passes, way) - old, device) for way, old in ways}

    return counting


def kl_weight_of(task: Task, config: dict) -> float:
    """The weight of the summed KL."""
    return summed_kl_weight(config["kl_weight"], config["kl_reduction"], torch.Size(task.control.base.latent_shape).numel())


def reward_of(task: Task, log_prob: LogProb, config: dict) -> tuple[LogProb, Callable[[int], float], float | None]:
    """`log_prob` as `speed` has it computed, its temperature at each update, and the bound on its gradient.

    A steep reward needs a softer start and has steeper gradients: both settings are given for a gamma of 1.
    """
    speed, softening, gamma = config["speed"], config["temperature"], config["gamma"]
    log_prob = in_slices(autocast(log_prob, speed["autocast"], task.control.base.device), speed["decode_size"])
    start = max(1.0, softening["start"] * gamma)
    max_adjoint_norm = None if config["max_adjoint_norm"] is None else config["max_adjoint_norm"] * gamma
    return (
        log_prob,
        lambda update: annealed(update / config["num_updates"], start, softening["hold"], softening["end"]),
        max_adjoint_norm,
    )


def updates_per_draw(config: dict) -> int:
    """How many updates learn from the same trajectories: costs can be measured of all of these together."""
    return config["policy_gradient"]["reuse"] if config["trainer"] == "policy_gradient" else 1


def policy_gradient_function(task: Task, reward: LogProb, config: dict) -> Callable[[int], dict[str, float]]:
    """`gradient(update)`, for the loop, by policy gradients; `reward(x_0, y, 1.0)` with shape (B,) is a black box.

    Every `reuse`-th update draws trajectories, and those up to the next learn from them too: a checkpoint between the two would lose them.
    """
    settings, kl_weight, gamma, size = config["policy_gradient"], kl_weight_of(task, config), config["gamma"], config["batch_size"]
    batch_of, held, switch = batch_function(task, config), {}, config["speed"]["autocast"]

    def collect(update: int) -> None:
        batch, paths, rewards = batch_of(update), [], []
        for rows in rows_of(size).split(config["micro_batch_size"]):
            policies, y, noise = batch.part(task, rows, switch)
            # Not both in one batch: of psi's ratio to itself the rounding would be left.
            paths.append(rollout(batch.process, policies.psi, policies.pre, noise, task.control.active(batch.process)))
            with torch.no_grad():
                rewards.append(reward(paths[-1]["x_0"], y, 1.0).to(noise))
        r, kl = gathered(torch.cat(rewards), size), gathered(torch.cat([path["kl_nats"] for path in paths], 1), size, 1)
        log_ratio = gathered(torch.cat([path["log_ratio"] for path in paths]), size)
        advantage = advantages(r, kl, batch.labels.to(r.device), gamma, kl_weight)
        mean = {"reward": r.mean().item(), "kl_nats": kl.sum(0).mean().item()}
        loss = kl_weight * mean["kl_nats"] - gamma * mean["reward"]
        variance = batch.variance((gamma / kl_weight * r - log_ratio).double().cpu()) if kl_weight else {}
        held.update(batch=batch, paths=paths, advantage=advantage, figures={"loss": loss, **mean, **variance})

    def gradient(update: int) -> dict[str, float]:
        if update % settings["reuse"] == 0:
            collect(update)
        batch, clipped = held["batch"], []
        for rows, path in zip(rows_of(size).split(config["micro_batch_size"]), held["paths"], strict=True):
            psi = batch.part(task, rows, switch)[0].psi
            found = policy_gradient(
                batch.process, psi, path, held["advantage"][:, rows], settings["clip"], kl_weight, 1 / size,
                task.control.active(batch.process),
            )  # fmt: skip
            clipped.append(found["clipped"])
        return held["figures"] | {"clipped": gathered(torch.cat(clipped), size).mean().item()}

    return counted(task.control, gradient)


def efficient_adjoint_function(task: Task, log_prob: LogProb, config: dict) -> Callable[[int], dict[str, float]]:
    """`gradient(update)`, for the loop, by adjoint matching in closed form, which measures no KL.

    Raises UserError where the control acts on the sampler's last step.
    """
    control, size, num_levels = task.control, config["batch_size"], config["efficient_adjoint"]["num_levels"]
    if all(control.active(task.process)):
        raise UserError(
            f"finetune.trainer is efficient_adjoint; it needs a last step that is the pretrained model's own: raise finetune.min_timestep "
            f"above {task.process.timesteps[-1]:g}, the sampler's last timestep"
        )
    batch_of, kl_weight, switch = batch_function(task, config), kl_weight_of(task, config), config["speed"]["autocast"]
    recompute = config["gradient_checkpointing"] is True
    log_prob, temperature_of, max_adjoint_norm = reward_of(task, log_prob, config)
    before, m = batch_of(-1), 0.0  # no update draws these trajectories; a run that goes on measures them again
    for rows in torch.arange(size).split(config["micro_batch_size"]):
        policies, _, noise = before.part(task, rows, switch)
        m += len(rows) / size * information(before.process, policies.pre, noise, control.active(before.process))

    def gradient(update: int) -> dict[str, float]:
        batch, temperature, parts = batch_of(update), temperature_of(update), []
        active = control.active(batch.process)
        drawn = levels(active, num_levels, (size, *control.base.latent_shape), batch.generator)
        for rows in rows_of(size).split(config["micro_batch_size"]):
            policies, y, noise = batch.part(task, rows, switch)
            # The one graph here that spans several steps: those without control.
            pre = recomputed(policies.pre) if recompute else policies.pre
            parts.append(
                efficient_adjoint(
                    batch.process, policies.psi, pre, lambda x_0, y=y: log_prob(x_0, y, temperature), noise, config["gamma"], kl_weight,
                    active=active, steps=drawn["steps"][:, rows], fresh=drawn["fresh"][:, rows].to(noise), information=m, share=1 / size,
                    max_adjoint_norm=max_adjoint_norm,
                )
            )  # fmt: skip
        mean = {key: gathered(torch.cat([p[key] for p in parts]), size).mean().item() for key in ("loss", "log_prob")}
        return {**mean, "temperature": temperature}

    return counted(control, gradient)


def supervised_gradient(task: Task, examples: Examples, config: dict) -> Callable[[int], dict[str, float]]:
    """`gradient(update)`, for the loop: denoising of labelled images, some of whose labels are dropped (Ho & Salimans 2022).

    With several factors each is dropped by itself, since guidance is asked for labels that leave some of them free, and at times all. Where
    the prompt is guided, too, some images lose both.
    """
    control, process, batch_size = task.control, task.process, config["batch_size"]
    labels, num_factors = control.space.check_codes(examples.labels, len(examples.x_0)), control.space.num_factors
    if len(examples.prompts) != len(labels):
        raise UserError(f"the labelled images have {len(examples.prompts)} prompts and {len(labels)} labels: one of each is needed")

    def gradient(update: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(task.seed * 1_000_003 + update)
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        dropped = torch.rand(num_factors, batch_size, generator=generator) < LABEL_DROPOUT
        if num_factors > 1:  # guidance starts from no label at all, which is rare where each factor is dropped by itself
            dropped |= torch.rand(batch_size, generator=generator) < LABEL_DROPOUT
        prompts = [examples.prompts[k] for k in chosen.tolist()]
        if task.guidance_scale != 1:  # of the prompt, which at sampling starts from neither prompt nor label
            unprompted = torch.rand(batch_size, generator=generator) < LABEL_DROPOUT
            dropped |= unprompted
            prompts = [None if without else prompt for prompt, without in zip(prompts, unprompted.tolist(), strict=True)]
        y = control.space.freed(labels[chosen], dropped.T)
        x_0, state, loss = examples.x_0[chosen.to(examples.x_0.device)], generator.get_state(), 0.0
        for rows in rows_of(batch_size).split(config["micro_batch_size"]):
            generator.set_state(state)  # what is random of an image does not depend on the others at a time
            psi = control.denoiser(process, [prompts[k] for k in rows], y[rows])
            psi = autocast(psi, config["speed"]["autocast"], control.base.device)
            loss = loss + supervised(process, psi, x_0, generator, 1 / batch_size, control.active(process), rows)["loss"]
        return {"loss": gathered(loss[None], world()[1]).sum().item()}

    return counted(control, gradient)
