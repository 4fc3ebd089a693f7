"""What is particular to a transformer: its blocks, its pipeline's scheduler, T5, and a merged copy of it."""

import re

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import ctrl
from ctrl import base as bases
from ctrl import control as controls
from ctrl.adapter import TOLERANCE, loading, write_adapter
from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.export import export
from ctrl.finetune.speed import prepare
from ctrl.flow import FlowMatching
from ctrl.io import load_tensors, read_json
from ctrl.pipeline import overlap, with_labels
from ctrl.sampling import noise_of, sample
from tests import kinds
from tests.test_speed import CONFIG, OFF, check_compiled_once, distance, updates
from tests.trained import TRAINED

PROMPTS, LAYERS = ["coat", "a bag"], ["to_q", "to_v"]
SAMPLER = {"num_steps": 4, "spacing": "quadratic", "eta": 1.0, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kinds.sd3(tmp_path_factory.mktemp("base") / "sd3")


@pytest.fixture
def fresh(folder):
    """Makes controls, each in a network of its own, that act at all steps but the last, which adds no noise."""

    def make(**where) -> Control:
        base = bases.load(folder, **where)
        return Control(base, 3, 4, LAYERS, min_timestep=base.process(3).lowest_noisy_timestep)

    return make


def written(control: Control, folder, base) -> tuple:
    """The folder of a scrambled adapter, and the trainer's images for labels 0 and 2 from the seeds 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        control.base.network.class_embedding.weight[-1] = 0
    process = control.base.process(4, spacing="quadratic")
    described = controls.describe(control, str(base), SAMPLER | {"timesteps": process.timesteps.tolist()}, ["a", "b", "c"], TRAINED)
    folder.mkdir()
    write_adapter(control, folder, described, "coat")
    psi = control.denoiser(process, PROMPTS, torch.tensor([0, 2]), 2.0)
    x_0 = sample(process, psi, noise_of([0, 1], control.base.latent_shape, 4))
    with torch.no_grad():
        return folder, ((control.base.decode(x_0).permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).numpy()


def drawn(pipe, **given) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.stack([np.asarray(image) for image in pipe(PROMPTS, seed=0, **given).images]).astype(int)


@pytest.mark.parametrize(
    "settings",
    [{"truncation": None}, {"truncation": [1, 2], "num_terms": 1}, {"trainer": "adjoint"}, {"trainer": "policy_gradient"}],
    ids=["backprop", "truncated", "adjoint", "policy_gradient"],
)
def test_blocks_are_computed_again_as_they_were(fresh, settings):
    control, calls = fresh(), []
    prepare(control, CONFIG | {"speed": OFF, "gradient_checkpointing": "blocks"})
    control.base.network.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append(control._lora.on))
    found = updates(control, settings=settings | {"gradient_checkpointing": "blocks"})
    once = len(calls)
    other = fresh()
    other.base.network.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append(other._lora.on))
    assert distance(found, updates(other, settings=settings)) < 1e-4
    assert once > len(calls) - once, "computed again on the way back"


@pytest.mark.slow
def test_nothing_is_compiled_twice(fresh):
    """The slot's hook is a part of the graphs."""
    check_compiled_once(fresh(), fresh())


def test_the_pipeline_draws_the_trainers_images_at_any_spacing(fresh, folder, tmp_path):
    adapter, ours = written(fresh(), tmp_path / "adapter", folder)
    pipe = ctrl.load(folder, adapter)
    assert np.abs(drawn(pipe, label=[0, 2]) - ours).max() <= 1
    half, whole, none = (drawn(pipe, label=[0, 2], strength=s) for s in (0.5, 1.0, 0.0))
    assert 0 < np.abs(half - none).sum() < np.abs(whole - none).sum()
    assert np.array_equal(none, drawn(pipe, label=None)), "no label is the pretrained model"
    with pytest.warns(UserWarning, match="another law.*num_inference_steps is 3, not 4"):
        drawn(pipe, label=0, num_inference_steps=3)
    with pytest.warns(UserWarning, match="another law.*eta is 0.5"):
        assert not np.array_equal(drawn(pipe, label=[0, 2], eta=0.5), whole)
    assert not np.array_equal(drawn(pipe, label=[0, 2], negative_prompt="bag"), whole)


def test_a_merged_copy_draws_the_same_images_in_plain_diffusers(fresh, folder, tmp_path):
    adapter, ours = written(fresh(), tmp_path / "adapter", folder)
    export(adapter, tmp_path / "merged", "me/coats", bases.load(folder))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "merged", trust_remote_code=True).load_control(tmp_path / "merged")
    assert np.abs(drawn(pipe, label=[0, 2]) - ours).max() <= TOLERANCE
    assert np.abs(drawn(pipe, label=None) - drawn(ctrl.load(folder, adapter), label=None)).max() <= TOLERANCE
    merged = controls.load(bases.load(folder), adapter).merge()
    process = merged.base.process(4, spacing="quadratic")
    noise = noise_of([0, 1], merged.base.latent_shape, 4)
    plain = bases.load(folder)
    kept = sample(process, merged.base_denoiser(process, PROMPTS, 2.0), noise)
    assert torch.equal(kept, sample(process, plain.denoiser(process, PROMPTS, 2.0), noise)), "the pretrained weights are still there"


def test_an_adapter_without_t5_says_so(fresh, folder, tmp_path):
    adapter, ours = written(fresh(t5=False), tmp_path / "adapter", folder)
    described = read_json(adapter / "adapter.json")
    assert described["base_files"] == {"t5": False}
    assert "trust_remote_code=True, text_encoder_3=None, tokenizer_3=None)" in (adapter / "README.md").read_text()
    assert "t5" not in loading(described, "folder")
    assert np.abs(drawn(ctrl.load(folder, adapter), label=[0, 2]) - ours).max() <= 1, "it takes the right one by itself"
    with pytest.raises(UserError, match="made for its base without T5: load that with t5=False"):
        ctrl.load(folder, adapter, t5=True)
    plain = with_labels(StableDiffusion3Pipeline.from_pretrained(folder), FlowMatching)
    with pytest.raises(ValueError, match="without T5: load the base with text_encoder_3=None, tokenizer_3=None"):
        plain.load_control(adapter)
    merged = tmp_path / "merged"
    export(adapter, merged, "me/coats", bases.load(folder, t5=False))
    (code,) = re.findall(r"^pipe = (DiffusionPipeline.*)$", (merged / "README.md").read_text(), re.MULTILINE)
    pipe = eval(code, {"DiffusionPipeline": DiffusionPipeline, "folder": merged}).load_control(merged)
    assert np.abs(drawn(pipe, label=[0, 2]) - ours).max() <= TOLERANCE


def test_an_adapter_with_t5_says_so(fresh, folder, tmp_path):
    adapter, _ = written(fresh(), tmp_path / "adapter", folder)
    with pytest.raises(UserError, match="made for its base with T5: load that with t5=True"):
        ctrl.load(folder, adapter, t5=False)


def test_weights_may_be_moved_to_and_fro(fresh, folder, tmp_path):
    """As by `enable_model_cpu_offload`, before the control is loaded or afterwards."""
    adapter, ours = written(fresh(), tmp_path / "adapter", folder)
    for before in (True, False):
        pipe = with_labels(StableDiffusion3Pipeline.from_pretrained(folder), FlowMatching)
        if not before:
            pipe.load_control(adapter)
        pipe.enable_model_cpu_offload = lambda **where: None  # diffusers takes hooks off while it loads, and asks for a GPU to put them on
        _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
        if before:
            pipe.load_control(adapter)
        assert np.abs(drawn(pipe, label=[0, 2]) - ours).max() <= 1
        hook.remove()
        assert np.abs(drawn(pipe, label=[0, 2]) - ours).max() <= 1


def test_noise_levels_of_ones_own_are_taken_and_warned_about(fresh, folder, tmp_path):
    adapter, ours = written(fresh(), tmp_path / "adapter", folder)
    pipe = ctrl.load(folder, adapter)
    with pytest.warns(UserWarning, match="another law .*: sigmas are given"):
        found = drawn(pipe, label=[0, 2], sigmas=[1.0, 0.7, 0.3])
    assert np.abs(found - ours).max() > 1
    with pytest.raises(ValueError, match="timesteps are given: of a flow give sigmas"):
        drawn(pipe, label=[0, 2], timesteps=[1000, 500])


def test_weights_that_cannot_be_compared_are_left_to_diffusers(fresh, folder, tmp_path):
    """Quantised ones are packed, and not of the shape of the LoRA."""
    adapter, _ = written(fresh(), tmp_path / "adapter", folder)
    lora, transformer = load_tensors(adapter / "pytorch_lora_weights.safetensors"), bases.load(folder).network
    assert overlap(transformer, lora)[1] > 0
    layer = transformer.transformer_blocks[0].attn.to_q
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert overlap(transformer, lora) == (0.0, 0.0)
