"""Every kind of base through the one class: what an untrained control is, what training does, and what diffusers' own pipeline draws."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import ctrl
from ctrl import base as bases
from ctrl import control as controls
from ctrl.adapter import check_in_plain_diffusers, write_adapter
from ctrl.control import Control
from ctrl.finetune.gradients import gradient_function, supervised_gradient
from ctrl.finetune.task import Examples, Task
from ctrl.flow import MemorylessScheduler
from ctrl.oracles import to_pil
from ctrl.sampling import noise_of, sample
from tests import kinds
from tests.trained import TRAINED

PROMPTS, LABELS = ["coat", "a bag"], torch.tensor([0, 2])
LAYERS = ["to_q", "to_v", "conv1"]  # a transformer has no conv1
SAMPLER = {"num_steps": 3, "eta": 1.0, "guidance_scale": 2.5, "spacing": "scheduler"}


@pytest.fixture(scope="module", params=["eps", "v", "xl", "xl_without_zeros", "sd3", "sd35"])
def folder(request, tiny_sd, tmp_path_factory):
    place = tmp_path_factory.mktemp("kinds") / request.param
    if request.param == "eps":
        return tiny_sd
    if "sd3" in request.param:
        return kinds.sd3(place, newer=request.param == "sd35")
    return kinds.sd_v(place, tiny_sd) if request.param == "v" else kinds.sdxl(place, zeros=request.param == "xl")


@pytest.fixture
def model(folder):
    return bases.load(folder)


@pytest.fixture
def noise(model):
    return noise_of([5, 6], model.latent_shape, 3)


def scramble(control: Control) -> Control:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        control.base.network.class_embedding.weight[-1] = 0
    return control


def pictures(model, x_0) -> np.ndarray:
    with torch.no_grad():
        return np.stack([np.asarray(image) for image in to_pil(model.decode(x_0))]).astype(int)


def stack(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def plainly(folder, **given) -> np.ndarray:
    """What diffusers itself draws."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    if hasattr(pipe, "transformer"):
        pipe.scheduler = MemorylessScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.generator = generator
    else:
        pipe.scheduler, given = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False), given | {"eta": 1.0}
    return stack(pipe(PROMPTS, num_inference_steps=3, guidance_scale=2.5, generator=generator, **given).images)


def adapter(control: Control, folder, name: str) -> tuple:
    process = control.base.process(3)
    described = controls.describe(control, name, SAMPLER | {"timesteps": process.timesteps.tolist()}, ["a", "b", "c"], TRAINED)
    folder.mkdir()
    write_adapter(control, folder, described, "coat")
    return folder, described


def test_the_sampler_is_diffusers_own(folder, model, noise):
    x_0 = sample(process := model.process(3), model.denoiser(process, PROMPTS, 2.5), noise)
    assert np.abs(pictures(model, x_0) - plainly(folder)).max() <= 1
    assert np.abs(pictures(model, sample(process, model.denoiser(process, PROMPTS), noise)) - plainly(folder)).max() > 1


def test_untrained_it_is_the_base_bit_for_bit(model, noise):
    process = model.process(3)
    before = sample(process, model.denoiser(process, PROMPTS, 2.5), noise)
    control = Control(model, 3, 4, LAYERS)
    assert torch.equal(sample(process, control.denoiser(process, PROMPTS, LABELS, 2.5), noise), before)
    scramble(control)
    assert torch.equal(sample(process, control.base_denoiser(process, PROMPTS, 2.5), noise), before)
    assert not torch.allclose(sample(process, control.denoiser(process, PROMPTS, LABELS, 2.5), noise), before, atol=1e-3)


def test_the_guided_pair_is_one_batch_and_prompts_are_encoded_once(model, noise, monkeypatch):
    process, passes, encoded = model.process(3), [], []
    encode, forward = model.pipe.encode_prompt, model.network.forward
    monkeypatch.setattr(model.pipe, "encode_prompt", lambda p, **k: encoded.extend(p) or encode(p, **k))
    monkeypatch.setattr(model.network, "forward", lambda x, *a, **k: passes.append(len(x)) or forward(x, *a, **k))
    for _ in range(2):
        sample(process, model.denoiser(process, ["coat", "coat"], 2.5), noise)
    assert passes == [4] * 6 and sorted(encoded) == ["", "coat"]


def config_of(trainer: str) -> dict:
    return {
        "batch_size": 2, "micro_batch_size": 2, "kl_weight": 1.0, "kl_reduction": "sum", "gamma": 5.0, "num_terms": None,
        "truncation": None, "control_variate": False, "unguided_jacobian": False, "trainer": trainer,
        "policy_gradient": {"reuse": 1, "clip": 0.2}, "gradient_checkpointing": False,
        "num_updates": 1, "coarse": {"stride": 1, "end": 0.0}, "temperature": {"start": 1.0, "hold": 0.0, "end": 0.0},
        "max_adjoint_norm": None, "speed": {"autocast": False, "decode_size": None},
    }  # fmt: skip


@pytest.mark.parametrize("trainer", ["backprop", "adjoint", "policy_gradient", "supervised"])
def test_one_step_of_every_trainer_changes_the_images(model, noise, trainer):
    process, control = model.process(3), Control(model, 3, 4, LAYERS, min_timestep=300)
    task = Task(control, process, [("coat", 0), ("bag", 2)], ["{}"], 2.5, 0)
    if trainer == "supervised":
        examples = Examples(torch.randn(4, *model.latent_shape), ["coat"] * 4, torch.tensor([0, 1, 2, 0]))
        gradient = supervised_gradient(task, examples, config_of(trainer) | {"batch_size": 4})
    else:
        gradient = gradient_function(task, lambda x_0, y, t: -(model.decode(x_0).mean(dim=(1, 2, 3)) - y).square() / t, config_of(trainer))
    before = sample(process, control.denoiser(process, PROMPTS, LABELS, 2.5), noise)
    optimizer = torch.optim.SGD(control.parameters().values(), lr=1e-2)
    figures = gradient(0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in control.parameters().values())
    assert any(p.grad.any() for n, p in control.parameters().items() if "class_embedding" in n), figures
    optimizer.step()
    assert not torch.equal(sample(process, control.denoiser(process, PROMPTS, LABELS, 2.5), noise), before)
    pre = sample(process, control.base_denoiser(process, PROMPTS, 2.5), noise)
    assert torch.equal(pre, before), "the base is as it was"


def test_saved_and_loaded_the_pipeline_draws_the_trainers_images(folder, model, noise, tmp_path):
    control = scramble(Control(model, 3, 4, LAYERS))
    place, _ = adapter(control, tmp_path / "adapter", str(folder))
    process = model.process(3)
    ours = pictures(model, sample(process, control.denoiser(process, PROMPTS, LABELS, 2.5), noise))
    pipe = ctrl.load(folder, place)
    labelled = stack(pipe(PROMPTS, label=LABELS, seed=5).images)
    assert np.abs(labelled - ours).max() <= 1
    pretrained = plainly(folder)
    assert np.array_equal(stack(pipe(PROMPTS, label=None, seed=5).images), pretrained) and not np.array_equal(labelled, pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v", "xl", "sd3"])
def test_plain_diffusers_draws_the_same_images_with_an_adapter_of_every_kind(kind, tiny_sd, tmp_path):
    base = {"v": lambda f: kinds.sd_v(f, tiny_sd), "xl": kinds.sdxl, "sd3": kinds.sd3}[kind](tmp_path / "base")
    model = bases.load(base)
    place, described = adapter(scramble(Control(model, 3, 4, LAYERS)), tmp_path / "adapter", str(base))
    control = controls.load(bases.load(base), place)
    check_in_plain_diffusers(control, model.process(3), place, described, [("coat", 0), ("bag", 2)], ["{}"])
    tag = {"v": "stable-diffusion", "xl": "stable-diffusion-xl", "sd3": "sd3"}[kind]
    assert f"tags: [{tag}, {tag}-diffusers," in (place / "README.md").read_text()
