"""Our forward of PEFT's layers: PEFT's own, bit for bit, and on those rows alone that it is told."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ctrl import base as bases
from ctrl.control import Control
from ctrl.labels import Continuous, Factors
from tests.test_control import PROMPTS, scramble


@pytest.fixture(params=["float32", "bfloat16"])
def control(request, tiny_sd):
    control = Control(bases.load(tiny_sd, dtype=request.param), 3, 4, ["to_q", "to_v", "conv1", "ff.net.2", "time_emb_proj"])
    scramble(control)
    return control


def eps(control, x_t):
    y = torch.tensor([0, 2, 1])
    return control.base.eps(x_t, torch.full((3,), 500), control.base.encode(PROMPTS), y)


def test_forward_is_that_of_peft(control):
    """The adapter is saved for others to load, who have PEFT's forward."""
    x_t = torch.randn(3, *control.base.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for peft in (False, True):
        for layer in control.base.network.modules():
            if peft and isinstance(layer, BaseTunerLayer):
                del layer.forward
        out = eps(control, x_t)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x_t, *control.parameters().values()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_half_is_the_second_half_of_every_layer(control):
    layer = next(m for m in control.base.network.modules() if isinstance(m, BaseTunerLayer) and isinstance(m.base_layer, torch.nn.Conv2d))
    x = torch.randn(4, layer.base_layer.in_channels, 4, 4, dtype=control.base.dtype)
    with torch.no_grad():
        whole, none = layer(x), layer.base_layer(x)
        with control.lora_on("half"):
            half = layer(x)
        with control.lora_on("none"):
            assert torch.equal(layer(x), none)
    assert torch.allclose(half[:2], none[:2], atol=1e-6) and torch.allclose(half[2:], whole[2:], atol=1e-6)
    assert not torch.allclose(whole[2:], none[2:], atol=1e-3)


@pytest.mark.parametrize("space", ["factors", "continuous"])
def test_both_models_in_one_batch_for_every_kind_of_label(base, space):
    if space == "factors":
        space, labels = Factors.of((2, 2)), torch.tensor([0, 3, 8])
    else:
        space, labels = Continuous(-2.0, 2.0, 0.0, 1.0), torch.tensor([-1.0, 0.5, 2.0])
    control, process = Control(base, space, 4, ["to_q", "conv1"]), base.process(4)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn_like(p))
        x_t = torch.randn(3, *base.latent_shape)
        psi, pre = control.both(process, PROMPTS, labels, 3.0)(x_t, 1)
        assert torch.allclose(psi, control.denoiser(process, PROMPTS, labels, 3.0)(x_t, 1), atol=1e-5)
        assert torch.allclose(pre, control.base_denoiser(process, PROMPTS, 3.0)(x_t, 1), atol=1e-5)
        assert not torch.allclose(psi, pre, atol=1e-3)
    control.merge()
    with pytest.raises(ValueError, match="merged"):
        control.both(process, PROMPTS, labels)
