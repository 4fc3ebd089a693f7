"""Policy gradients: in expectation back-propagation's gradient, from rewards alone; baselines and the clip by hand."""

import pytest
import torch

from ctrl.finetune.backprop import backprop
from ctrl.finetune.policy_gradient import advantages, policy_gradient, rollout
from tests.test_backprop import PRE, PROCESS, Toy, log_prob


def gradient(psi, noise, gamma, kl_weight=1.0, reward=log_prob):
    """psi's gradient of one batch, and the trajectories."""
    path = rollout(PROCESS, psi, PRE, noise)
    advantage = advantages(reward(path["x_0"]), path["kl_nats"], torch.zeros(noise.shape[1], dtype=torch.long), gamma, kl_weight)
    psi.weight.grad = None
    policy_gradient(PROCESS, psi, path, advantage, 0.2, kl_weight, 1 / noise.shape[1])
    return psi.weight.grad, path


@pytest.mark.parametrize(("gamma", "kl_weight"), [(1.0, 1.0), (0.3, 3.0), (0.0, 1.0)])
def test_expected_gradient_is_that_of_backprop(gamma, kl_weight):
    """Of the reward and of the KL, whose later terms are part of what a step is paid for."""
    noise = torch.randn(4, 200_000, 2, generator=torch.Generator().manual_seed(0)).double()
    psi = Toy()
    found = gradient(psi, noise, gamma, kl_weight)[0].flatten()
    psi.weight.grad = None
    backprop(PROCESS, psi, PRE, log_prob, noise, gamma, kl_weight, share=1 / noise.shape[1])
    expected = psi.weight.grad.flatten()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    assert (found.norm() / expected.norm()).item() == pytest.approx(1, abs=0.05)


def test_trajectories_are_those_of_backprop_and_start_without_divergence():
    noise = torch.randn(4, 5, 2).double()
    path, figures = gradient(Toy(), noise, 2.0)[1], backprop(PROCESS, Toy(), PRE, log_prob, noise, 2.0)
    assert torch.allclose(path["x_0"], figures["x_0"]) and torch.allclose(path["log_ratio"], figures["log_ratio"])
    assert torch.allclose(path["kl_nats"].sum(0), figures["kl_nats"])
    start = Toy()
    start.load_state_dict(PRE.state_dict())
    found, path = gradient(start, noise, 2.0)
    assert path["kl_nats"].abs().max() == 0 and path["log_ratio"].abs().max() == 0 and found.abs().max() > 0


def test_advantage_by_hand():
    """Two steps, labels 0, 0, 1: the first two are each other's baseline, the third is compared with all."""
    reward, kl = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[9.0, 9.0, 9.0], [1.0, 2.0, 3.0]])
    found = advantages(reward, kl, torch.tensor([0, 0, 1]), gamma=10.0)
    assert found[0].tolist() == [9 + 2, -2 - 9, 7 - (9 - 2) / 2], "the later KL is paid for, a step's own is not"
    assert found[1].tolist() == [10, -10, 5]


def test_a_batch_that_is_all_right_or_all_wrong_teaches_nothing_but_the_kl():
    noise = torch.randn(4, 6, 2).double()
    ones, zeros = (gradient(Toy(), noise, 5.0, reward=lambda x, r=r: torch.full((len(x),), r).double())[0] for r in (1.0, 0.0))
    assert torch.allclose(ones, zeros)


def test_the_clip_takes_the_gradient_of_what_went_far_enough():
    """Moved far from the policy that drew them, with no KL: positive advantages with a large ratio, negative with a small one."""
    noise, psi = torch.randn(4, 200, 2, generator=torch.Generator().manual_seed(1)).double(), Toy()
    path = rollout(PROCESS, psi, PRE, noise)
    with torch.no_grad():
        psi.weight += 0.5
    eps = psi(noise[0], 0)
    ratio = (-PROCESS.log_ratio(0, path["eps"][0], eps, noise[1])).exp()
    mean = PROCESS.mean(0, noise[0], path["eps"][0])
    x_s = mean + PROCESS.sigma(0) * noise[1]
    new, old = (PROCESS.log_prob(0, x_s, noise[0], e) for e in (eps, path["eps"][0]))
    assert torch.allclose(ratio.log(), new - old), "the ratio of one step's densities, summed over dimensions"
    for sign, far in ((1.0, ratio > 1.2), (-1.0, ratio < 0.8)):
        assert 0 < far.sum() < 200
        psi.weight.grad = None
        advantage = torch.zeros(3, 200).double()
        advantage[0] = sign * far
        found = policy_gradient(PROCESS, psi, path, advantage, 0.2, kl_weight=0.0)
        assert not psi.weight.grad.any() and found["clipped"].tolist() == pytest.approx((far.double() / 3).tolist())


def test_updates_raise_the_objective():
    """From a reward that has no gradient at all: in steps of one nat. The gain is most of what back-propagation gains on the smooth one."""
    held_out, gains = torch.randn(4, 4000, 2, generator=torch.Generator().manual_seed(5)).double(), []

    def objective(psi):
        path = rollout(PROCESS, psi, PRE, held_out)
        return (log_prob(path["x_0"]) - path["kl_nats"].sum(0)).mean().item()

    def by_backprop(psi, noise):
        psi.weight.grad = None
        backprop(PROCESS, psi, PRE, log_prob, noise, 1.0, share=1 / noise.shape[1])

    for trainer in (by_backprop, lambda psi, noise: gradient(psi, noise, 1.0, reward=lambda x: log_prob(x).round())):
        psi, generator = Toy(), torch.Generator().manual_seed(6)
        psi.load_state_dict(PRE.state_dict())
        optimizer = torch.optim.Adam(psi.parameters(), 0.03)
        for _ in range(40):
            trainer(psi, torch.randn(4, 512, 2, generator=generator).double())
            optimizer.step()
        gains.append(objective(psi) - objective(PRE))
    assert gains[0] > 1 and gains[1] > 0.7 * gains[0]
