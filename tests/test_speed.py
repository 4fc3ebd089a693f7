"""Faster or in less memory, and still the same update: each switch alone against the plain computation."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from ctrl.control import Control
from ctrl.device import full_precision, set_tf32
from ctrl.errors import UserError
from ctrl.finetune.gradients import gradient_function
from ctrl.finetune.recipe import optimizer_of
from ctrl.finetune.speed import compile_for_fixed_shapes, in_slices, prepare, wanted
from ctrl.finetune.task import Task
from scripts.common import DEFAULTS, SCHEMA, read_yaml
from tests.conftest import SUBJECTS, TEMPLATES

CONFIG = read_yaml(DEFAULTS)["finetune"] | {"batch_size": 4, "micro_batch_size": 2, "coarse": {"stride": 1, "end": 0}, "gamma": 1.0}
OFF = {"autocast": False, "tf32": False, "channels_last": False, "compile": False, "fused_adamw": False, "decode_size": None}


def updates(control, number: int = 1, settings: dict | None = None, **speed) -> dict[str, torch.Tensor]:
    """The gradients of the last of some updates; the adapter has a say, since its weights are not those it begins with."""
    settings = CONFIG | (settings or {}) | {"speed": OFF | speed}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in control.parameters().values():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
            parameter.grad = None
    task = Task(control, control.base.process(3), [(s, y) for s in SUBJECTS for y in range(3)], TEMPLATES, 2.0, 0)
    gradient = gradient_function(task, log_prob_of(control.base), settings)
    for update in range(number):
        for parameter in control.parameters().values():
            parameter.grad = None
        gradient(update)
    return {name: p.grad.clone() for name, p in control.parameters().items()}


def log_prob_of(base):
    return lambda x_0, y, temperature: -(base.decode(x_0).mean(dim=(1, 2, 3)) - y).square() / temperature


def distance(one: dict, other: dict) -> float:
    """Relative, of all gradients as one vector."""
    a, b = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (one, other))
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def fresh(tiny_sd):
    """Makes controls, each in a network of its own."""
    from ctrl import base

    return lambda: Control(base.load(tiny_sd), 3, 4, ["to_q", "to_v", "conv1"], seed=0, min_timestep=260)


def test_gpu_means_where_there_is_one():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [wanted(switch, device) for switch in ("gpu", True, False) for device in (cpu, cuda)] == [False, True, True, True, False, False]


def test_autocast_computes_in_bfloat16_and_trains_in_float32(fresh):
    plain, cast = updates(fresh()), updates(fresh(), autocast=True)
    assert all(g.dtype == torch.float32 for g in cast.values())
    assert 1e-5 < distance(cast, plain) < 0.1, "rounding, and no more"


@pytest.mark.parametrize(("trainer", "most"), [("adjoint", 0.2), ("policy_gradient", 0.5)])
def test_autocast_reaches_every_trainer(fresh, trainer, most):
    """A policy gradient has more rounding in it, of the rewards of few trajectories, and on some CPUs more than on others."""
    settings = {"trainer": trainer}
    assert 0 < distance(updates(fresh(), settings=settings, autocast=True), updates(fresh(), settings=settings)) < most


def test_unguided_jacobian_takes_no_way_back_through_the_empty_prompt(fresh):
    """And no pass more. So small a network hardly heeds the prompt: the gradient is nearly the same here."""
    found, passes = {}, {}
    for unguided in (False, True):
        control = fresh()
        found[unguided] = updates(control, settings={"trainer": "adjoint", "unguided_jacobian": unguided})
        passes[unguided] = control.base.passes
    assert passes[False].backward - passes[True].backward == 2 * CONFIG["batch_size"], "a row a trajectory at each step but the first"
    assert passes[True].forward == passes[False].forward
    assert 0 < distance(found[True], found[False]) < 1e-4


def test_tf32_is_of_products_and_convolutions_and_off_for_the_check_of_an_adapter(fresh):
    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    try:
        for on in (True, False):
            prepare(fresh(), CONFIG | {"speed": OFF | {"tf32": on}})
            assert flags() == (on, on)
        set_tf32(False, True)
        with full_precision():
            assert flags() == (False, False)
        assert flags() == (False, True)
    finally:
        set_tf32(*before)


def test_channels_last_is_a_layout_of_frozen_weights_alone(fresh):
    control = fresh()
    prepare(control, CONFIG | {"speed": OFF | {"channels_last": True}})
    trained = control.parameters()
    wide = [(name in trained, p) for name, p in control.base.network.named_parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert {t for t, _ in wide} == {True, False}
    assert all(p.is_contiguous(memory_format=torch.channels_last) != is_trained for is_trained, p in wide)
    assert distance(updates(control), updates(fresh())) < 1e-4


def test_decoding_in_slices_keeps_the_gradient_and_less_memory(fresh):
    assert distance(updates(fresh(), decode_size=1), updates(fresh())) < 1e-5
    base, kept = fresh().base, []
    x_0 = torch.randn(4, *base.latent_shape, requires_grad=True)
    for size in (None, 2):
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=tensors: k.setdefault(t.data_ptr(), t), lambda t: t):
            in_slices(log_prob_of(base), size)(x_0, torch.zeros(4), 1.0)
        kept.append(sum(t.numel() for t in tensors.values()))
    assert kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize(
    "settings",
    [{"truncation": None}, {"truncation": None, "control_variate": True}, {"truncation": [1, 2], "num_terms": 1},
     {"trainer": "adjoint", "control_variate": True}, {"trainer": "policy_gradient"}],
    ids=["backprop", "held", "truncated", "adjoint", "policy_gradient"],
)  # fmt: skip
def test_blocks_are_computed_again_as_they_were(fresh, settings):
    """The way back finds the LoRA on and trained, whatever it was in the pass: forgetting that would change the gradient."""
    control, calls = fresh(), []
    prepare(control, CONFIG | {"speed": OFF, "gradient_checkpointing": "blocks"})
    assert control.base.pipe.vae.is_gradient_checkpointing
    control.base.network.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(control._lora.on))
    found = updates(control, settings=settings | {"gradient_checkpointing": "blocks"})
    assert distance(found, updates(fresh(), settings=settings)) < 1e-4
    assert {"all", "none"} == set(calls) and control._lora.on == "all" and all(p.requires_grad for p in control.parameters().values())


def test_blocks_keep_less_than_a_pass(fresh):
    def kept(control) -> int:
        tensors = {}
        psi = control.denoiser(control.base.process(2), ["coat"] * 4, torch.zeros(4, dtype=torch.long))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
            psi(torch.randn(4, *control.base.latent_shape), 0)
        return sum(t.numel() for t in tensors.values())

    control, plain = fresh(), fresh()
    control.recompute_blocks()
    assert kept(control) < 0.5 * kept(plain)


def test_fused_adamw_takes_the_same_step(fresh):
    weights = []
    for fused in (False, True):
        control = fresh()
        optimizer = optimizer_of(control, CONFIG | {"speed": OFF | {"fused_adamw": fused}})
        assert bool(optimizer.defaults["fused"]) == fused
        updates(control)
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in control.parameters().values()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_attention_with_lora_is_torchs_own(control, monkeypatch):
    calls, own = [], F.scaled_dot_product_attention
    control.base.encode(["coat"])
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or own(*a, **k))
    psi = control.denoiser(control.base.process(2), ["coat"], torch.tensor([0]))
    psi(torch.randn(1, *control.base.latent_shape), 0)
    assert len(calls) == sum(isinstance(m, Attention) for m in control.base.network.modules()) > 0


def test_a_prompt_is_encoded_once(control):
    texts = []
    control.base.pipe.text_encoder.register_forward_hook(lambda module, inputs, output: texts.append(len(inputs[0])))
    updates(control, number=3)
    assert sum(texts) <= 1 + len(SUBJECTS) * len(TEMPLATES)


@pytest.mark.parametrize("key", ["autocats", "decode_size"])
def test_a_wrong_key_or_value_is_one_line(key):
    import json

    from ctrl.config import merge, resolve

    config = merge(read_yaml(DEFAULTS), {"finetune": {"speed": {key: "often"}}})
    with pytest.raises(UserError, match=f"finetune.speed.*{key}"):
        resolve(config, json.loads(SCHEMA.read_text()))


@pytest.mark.slow
def test_nothing_is_compiled_twice(fresh):
    check_compiled_once(fresh(), fresh())


def check_compiled_once(control, plain) -> None:
    """Psi, pre and psi with its parameters held, with guidance; the second update of each kind finds all its graphs."""
    from torch._dynamo.utils import counters

    compile_for_fixed_shapes(control.base.network, backend="aot_eager")
    settings, compiled, found = {"control_variate": True, "batch_size": 2}, [], {}
    counters.clear()
    for _ in range(2):
        found = updates(control, number=1, settings=settings)
        compiled.append(counters["stats"]["unique_graphs"])
        reference = updates(plain, number=1, settings=settings)
    assert 0 < compiled[0] == compiled[1]
    assert not counters["graph_break"]
    assert distance(found, reference) < 1e-4
