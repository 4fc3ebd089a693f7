"""What rounding puts into the KL: the imitation rounds as it says, and leaves the network as it was."""

import torch

from benchmarks.rounding import measure, rounded
from tests.conftest import SUBJECTS


def test_rounded_keeps_so_many_bits():
    x = torch.tensor([1 + 2**-10, 1 + 2**-11 - 2**-20, -3.0, 1 + 2**-7 + 2**-10])
    assert rounded(x, 10).tolist() == [1 + 2**-10, 1.0, -3.0, 1 + 2**-7 + 2**-10]
    assert rounded(x, 7).tolist() == [1.0, 1.0, -3.0, 1 + 2**-7]
    assert torch.equal(rounded(x.to(torch.bfloat16).float(), 7), x.to(torch.bfloat16).float())


def test_each_precision_is_farther_off_and_the_network_stays(control):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in control.parameters().values():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    before = {name: value.clone() for name, value in control.base.network.state_dict().items()}
    exact, tf32, bfloat16 = measure(control.base, control, SUBJECTS * 2, 2.0, 3)
    assert exact["kl_of_rounding"] == 0 < tf32["kl_of_rounding"] < bfloat16["kl_of_rounding"] < exact["kl_nats"]
    assert all(torch.equal(before[name], value) for name, value in control.base.network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in control.base.network.modules())
