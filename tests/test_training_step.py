"""The published step, written anew: its passes, its objective at the start, its detached steps; and what is measured of each variant."""

import argparse

import pytest
import torch

from benchmarks import training_step
from benchmarks.published import published_gradient
from ctrl import base as bases
from ctrl.config import for_adapter, merge
from ctrl.costs import with_ratios
from ctrl.finetune.gradients import counted
from ctrl.finetune.task import Task
from scripts.common import DEFAULTS, read_yaml
from tests.conftest import SUBJECTS, TEMPLATES

CONFIG = read_yaml(DEFAULTS)["finetune"] | {"batch_size": 4, "micro_batch_size": 2, "coarse": {"stride": 1, "end": 0}, "gamma": 2.0}


def test_four_passes_a_step_and_an_untrained_adapter_has_no_kl(control, tiny_sd):
    copy = bases.load(tiny_sd)
    copy.passes = control.base.passes
    task = Task(control, control.base.process(3), [(s, 0) for s in SUBJECTS], TEMPLATES, 1.0, 0)
    seen = []

    def log_prob(x_0, y, temperature):
        seen.append(x_0)
        return -x_0.square().flatten(1).mean(1)

    figures = counted(control, published_gradient(task, copy, log_prob, CONFIG))(0)
    assert figures["loss"] == pytest.approx(2.0 * torch.cat(seen).square().mean().item(), rel=1e-5), "the reward alone"
    recomputed = figures["unet_forward"] - 4 * 3 * 4
    assert 0 < recomputed == figures["unet_backward"] < 4 * 3 * 4, "some steps are detached, the others computed again"
    assert any(p.grad.abs().max() > 0 for p in control.parameters().values() if p.grad is not None)
    assert all(p.grad is None for p in copy.network.parameters())


@pytest.mark.slow
def test_every_variant_is_measured(tiny_sd):
    """In this process, where the peak of the memory is not the variant's own."""
    args = argparse.Namespace(base=tiny_sd, image_size=None, num_threads=1, updates=1)
    own = {"finetune": {"batch_size": 2, "micro_batch_size": 2}, "prompts": {"subjects": SUBJECTS}, "sampler": {"num_steps": 3}}
    config = merge(read_yaml(DEFAULTS), own)
    rows = [
        training_step.measure(name, merge(for_adapter(config, of), own, differs), args)
        for name, (of, differs) in training_step.VARIANTS.items()
    ]
    ours, again, rounded, preset, published = with_ratios(rows)
    assert rounded["unet_forward"] == ours["unet_forward"] and rounded["matmul_flops_per_second"] != ours["matmul_flops_per_second"]
    assert again["unet_forward"] == ours["unet_forward"] + again["unet_backward"]
    assert published["speedup_vs_published"] == 1 and published["unet_forward"] >= 4 * 2 * 3 > preset["unet_forward"]
    assert ours["flops_per_update"] < published["flops_per_update"]
    assert all(row["share_of_matmul"] > 0 and row["cpu_seconds_per_update"] > 0 for row in rows)
