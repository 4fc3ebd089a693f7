"""The count of what autograd keeps: by hand on a small network, and alike with data and without."""

import pytest
import torch
from torch import nn

from benchmarks.memory import unet_pass
from ctrl.activations import CONTEXT_MB, MARGIN, guidance_mb, kept_by_blocks_mb, kept_mb, trained_mb, training_mb, weights_mb

SMALL = {"sample_size": 16, "cross_attention_dim": 32, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
SMALL |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def test_count_by_hand():
    """A linear layer keeps its input, and sigmoid its output; the weights are not counted, and nothing twice."""
    network, x = nn.Sequential(nn.Linear(256, 512), nn.Sigmoid()), torch.randn(1024, 256, requires_grad=True)
    assert kept_mb(network, lambda: network(x) + network[1](network[0](x))) == pytest.approx((256 + 2 * 512) * 1024 * 4 / 2**20)
    assert weights_mb(network) == pytest.approx(513 * 256 * 4 / 2**20, rel=0.01)


def test_a_unet_without_data_keeps_what_one_with_data_keeps():
    found = [kept_mb(unet, run) for device in ("meta", "cpu") for unet, _, run in [unet_pass(SMALL, device, torch.float32, 2)]]
    assert found[0] == pytest.approx(found[1], rel=0.05) and found[0] > 1
    twice, _, run = unet_pass(SMALL, "meta", torch.float32, 4)
    assert kept_mb(twice, run) == pytest.approx(2 * found[0], rel=0.05)


def test_a_unet_of_blocks_keeps_what_goes_into_them():
    """Far less than a pass, alike with data and without, in proportion to the batch; and a pass is what it was afterwards."""
    unet, _, run = unet_pass(SMALL, "meta", torch.float32, 2)
    whole, blocks = kept_mb(unet, run), kept_by_blocks_mb(unet, run)
    assert 0.1 * whole < blocks < 0.6 * whole and kept_mb(unet, run) == whole
    with_data, _, run_with_data = unet_pass(SMALL, "cpu", torch.float32, 2)
    assert kept_by_blocks_mb(with_data, run_with_data) == pytest.approx(blocks, rel=0.05)
    twice, _, run_twice = unet_pass(SMALL, "meta", torch.float32, 4)
    assert kept_by_blocks_mb(twice, run_twice) == pytest.approx(2 * blocks, rel=0.05)


def test_the_peak_is_the_passes_of_a_batch_or_decoding():
    assert training_mb(100, 10, 50, 1, micro_batch_size=4, passes=2) == CONTEXT_MB + 100 + MARGIN * 4 * 2 * 10 + 4
    assert training_mb(100, 10, 50, 1, micro_batch_size=1, passes=2) == CONTEXT_MB + 100 + MARGIN * 50 + 1
    assert guidance_mb(100, 10, 50, batch_size=4, passes=2) == CONTEXT_MB + 100 + MARGIN * 4 * (2 * 10 + 50)
    assert trained_mb(2**20) == 16
