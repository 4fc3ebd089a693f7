"""The count of what autograd keeps: by hand on a small network, and alike with data and without."""

import pytest
import torch
from torch import nn

from benchmarks.memory import network_pass
from ctrl.activations import CONTEXT_MB, MARGIN, guidance_mb, kept_by_blocks_mb, kept_mb, trained_mb, training_mb, weights_mb

SMALL = {"sample_size": 16, "in_channels": 4, "cross_attention_dim": 32, "block_out_channels": (32, 64), "norm_num_groups": 8}
SMALL |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SMALL |= {"layers_per_block": 1}
FLOW = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4}
FLOW |= {"joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 8}
KINDS = pytest.mark.parametrize("config", [SMALL, FLOW], ids=["unet", "transformer"])


def test_count_by_hand():
    """A linear layer keeps its input, and sigmoid its output; the weights are not counted, and nothing twice."""
    network, x = nn.Sequential(nn.Linear(256, 512), nn.Sigmoid()), torch.randn(1024, 256, requires_grad=True)
    assert kept_mb(network, lambda: network(x) + network[1](network[0](x))) == pytest.approx((256 + 2 * 512) * 1024 * 4 / 2**20)
    assert weights_mb(network) == pytest.approx(513 * 256 * 4 / 2**20, rel=0.01)


@KINDS
def test_a_network_without_data_keeps_what_one_with_data_keeps(config):
    found = [kept_mb(network, run) for device in ("meta", "cpu") for network, _, run in [network_pass(config, device, torch.float32, 2)]]
    assert found[0] == pytest.approx(found[1], rel=0.05) and found[0] > 1
    twice, _, run = network_pass(config, "meta", torch.float32, 4)
    assert kept_mb(twice, run) == pytest.approx(2 * found[0], rel=0.05)


@KINDS
def test_a_network_of_blocks_keeps_what_goes_into_them(config):
    """Far less than a pass, alike with data and without, in proportion to the batch; and a pass is what it was afterwards."""
    network, _, run = network_pass(config, "meta", torch.float32, 2)
    whole, blocks = kept_mb(network, run), kept_by_blocks_mb(network, run)
    assert 0.1 * whole < blocks < 0.6 * whole and kept_mb(network, run) == whole
    with_data, _, run_with_data = network_pass(config, "cpu", torch.float32, 2)
    assert kept_by_blocks_mb(with_data, run_with_data) == pytest.approx(blocks, rel=0.05)
    twice, _, run_twice = network_pass(config, "meta", torch.float32, 4)
    assert kept_by_blocks_mb(twice, run_twice) == pytest.approx(2 * blocks, rel=0.05)


def test_the_peak_is_the_passes_of_a_batch_or_decoding():
    assert training_mb(100, 10, 50, 1, micro_batch_size=4, passes=2) == CONTEXT_MB + 100 + MARGIN * 4 * 2 * 10 + 4
    assert training_mb(100, 10, 50, 1, micro_batch_size=1, passes=2) == CONTEXT_MB + 100 + MARGIN * 50 + 1
    assert guidance_mb(100, 10, 50, batch_size=4, passes=2) == CONTEXT_MB + 100 + MARGIN * 4 * (2 * 10 + 50)
    assert trained_mb(2**20) == 16
