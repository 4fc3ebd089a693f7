"""The augmented model: at the start it is the base, afterwards the base is still in it, and it survives a trip through its files."""

import json

import pytest
import torch

from ctrl import base as bases
from ctrl import control as controls
from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.io import write_json
from ctrl.labels import Categorical, Factors
from ctrl.sampling import noise_of, sample
from tests.test_labels import WRONG_CODES

PROMPTS = ["coat", "a bag", "bag"]
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture
def process(base):
    return base.process(4)


@pytest.fixture
def noise(base, process):
    return noise_of([1, 2, 3], base.latent_shape, process.num_steps)


def test_a_base_of_half_precision_stays_one_beside_parameters_of_single_precision(tiny_sd):
    base = bases.load(tiny_sd, dtype="bfloat16")
    control = Control(base, 3, 4, ["conv_in", "to_q"], seed=0)
    assert {p.dtype for p in control.parameters().values()} == {torch.float32}
    assert base.dtype == base.network.dtype == torch.bfloat16 and base.device == base.network.device


def scramble(control, size=0.1):
    """Moves every trained weight, and leaves the null label alone, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(size * torch.randn_like(p))
        control.base.network.class_embedding.weight[-1] = 0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_at_the_start_it_is_the_base_bit_for_bit(tiny_sd, base, process, noise, guidance_scale):
    before = sample(process, base.denoiser(process, PROMPTS, guidance_scale), noise)
    control = Control(base, 3, 4, ["to_q", "to_v", "conv1", "ff.net.2"])
    assert torch.equal(sample(process, control.denoiser(process, PROMPTS, LABELS, guidance_scale), noise), before)
    assert torch.equal(sample(process, control.base_denoiser(process, PROMPTS, guidance_scale), noise), before)


def test_the_base_is_still_there_after_training(base, process, noise):
    before = sample(process, base.denoiser(process, PROMPTS, 2.0), noise)
    control = Control(base, 3, 4, ["to_q", "to_v", "conv1"])
    scramble(control)
    assert torch.equal(sample(process, control.base_denoiser(process, PROMPTS, 2.0), noise), before)
    assert not torch.allclose(sample(process, control.denoiser(process, PROMPTS, LABELS, 2.0), noise), before, atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_both_models_in_one_batch_say_what_each_says_alone(base, process, noise, guidance_scale):
    """And have the same gradients, while neither counts a pass less."""
    control = Control(base, 3, 4, ["to_q", "to_v", "conv1", "ff.net.2", "time_emb_proj"])
    scramble(control)
    psi, pre = control.denoiser(process, PROMPTS, LABELS, guidance_scale), control.base_denoiser(process, PROMPTS, guidance_scale)

    def found(pair):
        x, before = noise[0].clone().requires_grad_(), (base.passes.forward, base.passes.backward)
        eps_psi, eps_pre = pair(x, 1)
        gradients = torch.autograd.grad((eps_psi * noise[1] + eps_pre * noise[2]).sum(), [x, *control.parameters().values()])
        return [eps_psi, eps_pre, *gradients], (base.passes.forward - before[0], base.passes.backward - before[1])

    together, passes = found(control.both(process, PROMPTS, LABELS, guidance_scale))
    apart, passes_apart = found(lambda x, i: (psi(x, i), pre(x, i)))
    assert all(torch.allclose(a, b, atol=1e-5 * float(b.detach().abs().max())) for a, b in zip(together, apart, strict=True))
    assert passes == passes_apart == (6 * (1 + (guidance_scale != 1)),) * 2
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    assert torch.equal(psi(noise[0], 1), apart[0].detach()), "LoRA is on all rows again"


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_merged_it_draws_the_same_and_the_base_is_still_there(base, process, noise, strength):
    before = sample(process, base.denoiser(process, PROMPTS), noise)
    control = Control(base, 3, 4, ["to_q", "to_v", "conv1", "ff.net.2"], min_timestep=300)
    scramble(control)
    unmerged = sample(process, control.denoiser(process, PROMPTS, LABELS, strength=strength), noise)
    assert control.merge() is control
    merged = sample(process, control.denoiser(process, PROMPTS, LABELS, strength=strength), noise)
    assert torch.allclose(merged, unmerged, atol=1e-4) and not torch.allclose(merged, before, atol=1e-2)
    assert torch.equal(sample(process, control.base_denoiser(process, PROMPTS), noise), before)
    assert torch.equal(sample(process, control.denoiser(process, PROMPTS, LABELS, strength=strength), noise), merged)


def test_null_row_gets_no_gradient_and_all_else_does(control, process, noise):
    scramble(control)
    labels = torch.tensor([0, control.null, 1])
    pre = control.base_denoiser(process, PROMPTS)(noise[0], 0)
    eps = control.denoiser(process, PROMPTS, labels)(noise[0], 0)
    (eps - pre).square().sum().backward()
    gradient = control.base.network.class_embedding.weight.grad
    assert gradient[control.null].abs().max() == 0 and gradient[0].abs().max() > 0
    assert gradient[2].abs().max() == 0, "label 2 was not asked for"
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in control.parameters().values()), "switching off froze a weight"


def test_only_lora_and_embedding_are_trained(control):
    assert all("lora_" in name or name == "class_embedding.weight" for name in control.parameters())
    groups = control.groups(1e-3, 1e-2)
    assert sum(len(g["params"]) for g in groups) == len(control.parameters())
    assert groups[1]["params"][0] is control.base.network.class_embedding.weight and groups[1]["lr"] == 1e-2


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_strength_is_linear_in_eps(control, process, noise, strength):
    scramble(control)
    with torch.no_grad():
        pre = control.base_denoiser(process, PROMPTS)(noise[0], 1)
        psi = control.denoiser(process, PROMPTS, LABELS)(noise[0], 1)
        eps = control.denoiser(process, PROMPTS, LABELS, strength=strength)(noise[0], 1)
    assert torch.allclose(eps, pre + strength * (psi - pre), atol=1e-6)


def test_prompt_guidance_by_hand(control, process, noise):
    scramble(control)
    nobody, null = [""] * 3, torch.full((3,), control.null)
    with torch.no_grad():
        empty = control.denoiser(process, nobody, null)(noise[0], 1)
        prompted = control.denoiser(process, PROMPTS, LABELS)(noise[0], 1)
        guided = control.denoiser(process, PROMPTS, LABELS, guidance_scale=3.0)(noise[0], 1)
    assert torch.allclose(guided, empty + 3 * (prompted - empty), atol=1e-5)


def test_below_its_last_timestep_the_pretrained_model_finishes_alone(control, process, noise):
    scramble(control)
    assert control.active(process) == [True, True, True, False], "timesteps 999, 749, 499, 249"
    with torch.no_grad():
        eps, pre = (d(noise[0], 3) for d in (control.denoiser(process, PROMPTS, LABELS), control.base_denoiser(process, PROMPTS)))
    assert torch.equal(eps, pre)


def test_passes_are_counted(control, process, noise):
    scramble(control)
    passes = control.base.passes
    control.denoiser(process, PROMPTS, LABELS)(noise[0], 0).sum().backward()
    assert (passes.forward, passes.backward) == (3, 3)
    with torch.no_grad():
        control.denoiser(process, PROMPTS, LABELS, guidance_scale=2.0)(noise[0], 0)
    assert (passes.forward, passes.backward) == (9, 3)


def save(control, folder, **changes):
    folder.mkdir(exist_ok=True)
    sampler = {"num_steps": 4, "eta": 1.0, "guidance_scale": 1.0, "spacing": "scheduler", "timesteps": [999, 749, 499, 249]}
    control.save(folder)
    described = controls.describe(control, "tiny", sampler, ["a", "b", "c"], {"gamma": 1.0}) | changes
    write_json(folder / "adapter.json", described)


def test_saved_and_loaded_it_is_the_same(tiny_sd, control, process, noise, tmp_path):
    scramble(control)
    before = sample(process, control.denoiser(process, PROMPTS, LABELS), noise)
    save(control, tmp_path / "a")
    loaded = controls.load(bases.load(tiny_sd), tmp_path / "a")
    assert torch.equal(sample(process, loaded.denoiser(process, PROMPTS, LABELS), noise), before)


def test_fingerprint_knows_the_base_and_not_the_adapter_or_precision(tiny_sd, base):
    before = base.fingerprint()
    scramble(Control(base, 3, 4, ["to_q"]))
    assert base.fingerprint() == before == bases.load(tiny_sd, dtype="float16").fingerprint()
    assert base.fingerprint(torch.bfloat16) == bases.load(tiny_sd, dtype="bfloat16").fingerprint(torch.bfloat16) != before
    with torch.no_grad():
        base.network.conv_in.weight.view(-1)[0] += 1
    assert base.fingerprint() != before


def test_adapter_for_another_base_is_refused(tiny_sd, control, tmp_path):
    save(control, tmp_path / "a", base_fingerprint="0123456789abcdef")
    with pytest.raises(UserError, match="made for the base tiny"):
        controls.load(bases.load(tiny_sd), tmp_path / "a")


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "label_embedding.safetensors", "adapter.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_adapter_is_refused(tiny_sd, control, tmp_path, file, damage):
    save(control, tmp_path / "a")
    path = tmp_path / "a" / file
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=file):
        controls.load(bases.load(tiny_sd), tmp_path / "a")


def test_adapter_with_other_layers_is_refused(tiny_sd, control, tmp_path):
    scramble(control)
    save(control, tmp_path / "a")
    described = json.loads((tmp_path / "a" / "adapter.json").read_text())
    write_json(tmp_path / "a" / "adapter.json", described | {"target_modules": ["to_q"]})
    with pytest.raises(UserError, match="layers"):
        controls.load(bases.load(tiny_sd), tmp_path / "a")


@pytest.mark.parametrize(("row", "says"), [(None, "label 0"), (1, "label 1 .b. changes no image: its embedding is that of no label")])
def test_adapter_whose_label_changes_nothing_is_refused(tiny_sd, control, tmp_path, row, says):
    scramble(control)
    with torch.no_grad():
        control.base.network.class_embedding.weight[slice(None) if row is None else row] = 0
    save(control, tmp_path / "a")
    with pytest.raises(UserError, match=says):
        controls.load(bases.load(tiny_sd), tmp_path / "a")


@pytest.mark.parametrize(("labels", "says"), WRONG_CODES)
def test_wrong_labels_are_one_line(base, control, process, labels, says):
    says = says.replace("label 3: the labels' codes are 0 to 2", "label 4: the labels' codes are 0 to 3")
    labels = labels + (labels == 3) if torch.is_tensor(labels) and labels.tolist() == [0, 3] else labels  # 3 is the null label
    with pytest.raises(UserError, match=says):
        control.denoiser(process, PROMPTS[:2], labels)
    with pytest.raises(UserError, match=says):
        control.guided_denoiser(process, PROMPTS[:2], labels, 2.0)


def test_unknown_target_modules_are_refused(base):
    with pytest.raises(UserError, match="target_modules"):
        Control(base, 3, 4, ["no_such_layer"])


@pytest.mark.parametrize("path", ["./nowhere", "resources/nowhere", "nowhere"])
def test_missing_base_is_refused(path):
    with pytest.raises(UserError, match="base.path"):
        bases.load(path)


def test_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match="model_index"):
        bases.load(tmp_path)


def test_corrupt_base_is_refused(tiny_sd, tmp_path):
    import shutil

    shutil.copytree(tiny_sd, tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        bases.load(tmp_path / "sd")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_label_guidance_goes_from_no_label_to_the_label_and_beyond(base, process, noise, guidance_scale):
    control = Control(base, 3, 4, ["to_q", "to_v", "conv1"])
    scramble(control)
    null = torch.full_like(LABELS, control.null)
    with torch.no_grad():
        free, labelled = (control.denoiser(process, PROMPTS, y, guidance_scale)(noise[0], 0) for y in (null, LABELS))
        for scale in (0.0, 1.0, 2.5):
            guided = control.guided_denoiser(process, PROMPTS, LABELS, scale, guidance_scale)(noise[0], 0)
            assert torch.allclose(guided, free + scale * (labelled - free), atol=1e-4)
    assert not torch.allclose(free, labelled, atol=1e-2)


PAIR = Factors((Categorical(2, ("large", "small")), Categorical(3, ("dark", "grey", "light"))), ("size", "shade"))


def test_several_factors_start_as_the_base_and_a_free_one_has_no_say(tiny_sd, base, process, noise, tmp_path):
    before = sample(process, base.denoiser(process, PROMPTS), noise)
    control = Control(base, PAIR, 4, ["to_q", "to_v", "conv1"])
    labels = PAIR.check([(1, 2), (1, None), None])
    assert torch.equal(sample(process, control.denoiser(process, PROMPTS, labels), noise), before)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn_like(p))
        base.network.class_embedding.weight[-1] = 0
        drawn = sample(process, control.denoiser(process, PROMPTS, labels), noise)
        base.network.class_embedding.weight[2:5] += 1  # the other factor's
        changed = sample(process, control.denoiser(process, PROMPTS, labels), noise)
        base.network.class_embedding.weight[2:5] -= 1
    assert not torch.allclose(changed[0], drawn[0], atol=1e-3)
    assert torch.allclose(changed[1:], drawn[1:], atol=1e-5), "the factor was free there"
    save(control, tmp_path / "a")
    loaded = controls.load(bases.load(tiny_sd), tmp_path / "a")
    assert loaded.space == PAIR and loaded.null == 6
    drawn = sample(process, control.denoiser(process, PROMPTS, labels), noise)
    assert torch.equal(sample(process, loaded.denoiser(process, PROMPTS, labels), noise), drawn)


@pytest.mark.parametrize("label", [(1, None), (None, 2), (0, 1)])
def test_label_guidance_takes_a_label_that_leaves_a_factor_free(base, process, noise, label):
    control = Control(base, PAIR, 4, ["to_q", "to_v", "conv1"])
    scramble(control)
    with torch.no_grad():
        codes = PAIR.check([label] * 3)
        free, labelled = (control.denoiser(process, PROMPTS, y)(noise[0], 0) for y in (torch.full((3,), PAIR.null), codes))
        guided = control.guided_denoiser(process, PROMPTS, codes, 2.5)(noise[0], 0)
    assert torch.allclose(guided, free + 2.5 * (labelled - free), atol=1e-4)
    assert not torch.allclose(free, labelled, atol=1e-2)
