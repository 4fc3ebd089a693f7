"""The adapter's folder in the hands of a user: plain diffusers, the Python API, wrong labels, another base."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

import ctrl
from ctrl import base as bases
from ctrl import control as controls
from ctrl.adapter import check_in_plain_diffusers, head, loading, write_adapter
from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.io import write_json
from ctrl.labels import Categorical, Factors
from ctrl.oracles import to_pil
from ctrl.sampling import noise_of, sample
from tests.test_control import scramble
from tests.trained import TRAINED

CELLS = [("coat", 0), ("bag", 2)]
SAMPLER = {"num_steps": 4, "eta": 1.0, "guidance_scale": 2.0}


@pytest.fixture
def spacing():
    return "scheduler"


both_spacings = pytest.mark.parametrize("spacing", ["scheduler", "quadratic"])


@pytest.fixture
def process(base, spacing):
    return base.process(4, 1.0, spacing)


@pytest.fixture
def adapter(tiny_sd, control, tmp_path, process, spacing):
    """A scrambled control in its folder, and what adapter.json says."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn_like(p))
        control.base.network.class_embedding.weight[-1] = 0
    sampler = SAMPLER | {"spacing": spacing, "timesteps": process.timesteps.tolist()}
    names = control.space.names or ["a", "b", "c"]
    described = controls.describe(control, str(tiny_sd), sampler, names, TRAINED)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(control, folder, described, "coat")
    return folder, described


def ours(control, process, prompts, labels, seed, strength=1.0):
    noise = noise_of(range(seed, seed + len(prompts)), control.base.latent_shape, process.num_steps)
    x_0 = sample(process, control.denoiser(process, prompts, torch.tensor(labels), SAMPLER["guidance_scale"], strength), noise)
    with torch.no_grad():
        return np.stack([np.asarray(i) for i in to_pil(control.base.decode(x_0))]).astype(int)


def stack(images):
    return np.stack([np.asarray(i) for i in images]).astype(int)


@pytest.mark.slow
@both_spacings
def test_plain_diffusers_draws_the_same_images(control, process, adapter):
    before = sorted(adapter[0].iterdir())
    check_in_plain_diffusers(control, process, *adapter, CELLS, ["{}"])  # raises where they differ
    assert sorted(adapter[0].iterdir()) == before, "it leaves nothing behind"


@pytest.mark.slow
def test_weights_of_a_lower_precision_draw_the_same_too(tmp_path):
    """Of the embedded base in bfloat16, whose rounding between two steps alone would be told from float32's; of 30 steps ten are drawn."""
    folder, names = tmp_path / "adapter", ["a", "b", "c"]
    base = bases.load("resources/mini-sd", dtype="bfloat16")
    process, control = base.process(30), Control(base, 3, 4, ["to_q", "to_v"], seed=0, min_timestep=100)
    scramble(control)
    sampler = SAMPLER | {"num_steps": 30, "spacing": "scheduler", "timesteps": process.timesteps.tolist()}
    described = controls.describe(control, "resources/mini-sd", sampler, names, TRAINED)
    folder.mkdir()
    write_adapter(control, folder, described, "coat")
    check_in_plain_diffusers(control, process, folder, described, CELLS, ["{}"])
    assert base.passes.forward == 10 * 2 * len(CELLS) and described["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_difference_is_noticed(control, process, adapter):
    with torch.no_grad():
        control.base.network.class_embedding.weight[:2] += 1.0
    with pytest.raises(UserError, match="other images"):
        check_in_plain_diffusers(control, process, *adapter, CELLS, ["{}"])


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_api_draws_what_the_sampler_draws(tiny_sd, control, process, adapter, strength):
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])
    images = pipe(["coat", "bag"], label=[0, 2], strength=strength, seed=3).images
    assert np.abs(stack(images) - ours(control, process, ["coat", "bag"], [0, 2], 3, strength)).max() <= 1


@both_spacings
def test_no_label_or_no_strength_is_the_pretrained_model(tiny_sd, control, process, adapter, spacing):
    from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline

    plain = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    steps = {"num_inference_steps": 4}
    if spacing == "quadratic":
        plain.scheduler = DDPMScheduler.from_config(plain.scheduler.config, variance_type="fixed_small")
        steps = {"timesteps": process.timesteps.tolist()}
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    expected = plain(["coat", "bag"], **steps, eta=1.0, guidance_scale=2.0, generator=generators).images
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])
    for keywords in ({"label": None}, {"label": [0, 2], "strength": 0}):
        assert np.array_equal(stack(pipe(["coat", "bag"], seed=0, **keywords).images), stack(expected))
    assert not np.array_equal(stack(pipe(["coat", "bag"], label=[0, 2], seed=0).images), stack(expected))


@pytest.mark.parametrize("label", [
    3, -1, [0], [0, 1, 2], [0, 3], 0.5, [True, False], [0.0, 1.0], "a", ["a", "b"], [[0], [1]], [0, -1], {"label": 0}, True,
    torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor([True, False]), np.array([0, 3]), [np.float32(0), 1],
])  # fmt: skip
def test_wrong_labels_are_refused(tiny_sd, adapter, label):
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])
    with pytest.raises(ValueError, match="^label (is|has)") as caught:
        pipe(["coat", "bag"], label=label)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [torch.tensor([0, 2]), np.array([0, 2]), (0, 2), [np.int64(0), torch.tensor(2)]])
def test_labels_of_other_types_are_the_same_labels(tiny_sd, adapter, label):
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])
    assert pipe.check_labels(label, 2).tolist() == [[0], [2]]


def test_no_label_beside_a_label_is_the_pretrained_model(tiny_sd, adapter):
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])
    mixed, labelled, free = (stack(pipe(["coat", "bag"], label=y, seed=0).images) for y in ([0, None], [0, 0], None))
    assert np.array_equal(mixed[1], free[1]) and np.abs(mixed[0] - labelled[0]).max() <= 1 < np.abs(free[0] - labelled[0]).max()


def test_loading_warns_of_nothing(tiny_sd, adapter, caplog):
    import diffusers

    diffusers.utils.logging.enable_propagation()
    ctrl.load(tiny_sd, adapter=adapter[0])
    diffusers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_label_that_changes_nothing_is_refused_by_the_pipeline_alone(tiny_sd, adapter):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file, save_file

    from ctrl.pipeline import with_labels

    pipe = with_labels(StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None))
    file = adapter[0] / "label_embedding.safetensors"
    weight = load_file(file)["weight"]
    for row, source, same in ((2, 1, "label 2"), (1, 3, "no label")):
        save_file({"weight": weight.index_copy(0, torch.tensor([row]), weight[[source]])}, file)
        with pytest.raises(ValueError, match=f"label 1 .b. changes no image: its embedding is that of {same}"):
            pipe.load_control(adapter[0])
        assert pipe.control is None
    with pytest.raises(UserError, match="label 1 .b. changes no image"):
        ctrl.load(tiny_sd, adapter=adapter[0])


@pytest.mark.parametrize("strength", [-1, float("nan"), float("inf"), "1", None])
def test_a_strength_below_nothing_is_refused(tiny_sd, adapter, strength):
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])
    with pytest.raises(ValueError, match="strength is .*it goes from 0") as caught:
        pipe("coat", label=0, strength=strength)
    assert "\n" not in str(caught.value)


@both_spacings
def test_another_sampler_than_the_adapters_is_warned_about(tiny_sd, adapter, recwarn):
    pipe = ctrl.load(tiny_sd, adapter=adapter[0])

    def told(**keywords):
        recwarn.clear()
        images = stack(pipe("coat", label=0, seed=0, **keywords).images)
        return images, [str(w.message) for w in recwarn if "another law" in str(w.message)]

    expected, silent = told()
    assert not silent
    images, silent = told(num_inference_steps=4, eta=1.0, guidance_scale=2.0)
    assert np.array_equal(images, expected) and not silent, "the adapter's own, spelled out"
    images, (line,) = told(num_inference_steps=3)
    assert not np.array_equal(images, expected) and "num_inference_steps is 3, not 4" in line and "\n" not in line
    assert "guidance_scale is 5, not 2.0" in told(guidance_scale=5)[1][0]
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps is .*a whole number above 0"):
            pipe("coat", label=0, num_inference_steps=wrong)


def test_another_base_is_refused(tiny_sd, adapter):
    described = json.loads((adapter[0] / "adapter.json").read_text())
    write_json(adapter[0] / "adapter.json", described | {"base_fingerprint": "0" * 16})
    with pytest.raises(UserError, match="another"):
        ctrl.load(tiny_sd, adapter=adapter[0])


def test_missing_adapter_is_refused(tiny_sd, tmp_path):
    with pytest.raises(UserError, match="adapter.json is missing"):
        ctrl.load(tiny_sd, adapter=tmp_path)


def test_card_speaks_of_every_label(adapter):
    card = (adapter[0] / "README.md").read_text()
    assert all(f"| {y} | {name} |" in card for y, name in enumerate("abc")) and "load_control" in card
    assert card.startswith("---\nlibrary_name: ") and "base_model" not in card and "license" not in card, "a folder is no name on the hub"


def test_card_names_a_base_of_the_hub_with_its_commit_and_variant(adapter):
    on_hub = adapter[1] | {"base": "owner/sd1", "base_files": {"revision": "0123abc", "variant": "fp16"}}
    assert yaml.safe_load(head(on_hub).strip("-"))["base_model"] == "owner/sd1"
    assert 'from_pretrained("owner/sd1", custom_pipeline=folder, trust_remote_code=True, revision="0123abc", variant="fp16"' in loading(
        on_hub, "folder"
    )
    assert "safety_checker=None" in loading(on_hub, "folder")
    assert "safety_checker" not in loading(on_hub | {"base_kind": "StableDiffusionXLPipeline"}, "folder"), "SDXL has none"


@pytest.mark.parametrize("dtype", [torch.float32, "float16", torch.bfloat16])
def test_an_adapter_knows_its_base_in_every_precision(tiny_sd, adapter, dtype):
    assert str(ctrl.load(tiny_sd, adapter[0], dtype=dtype).unet.dtype).endswith(str(dtype).removeprefix("torch."))


def test_an_adapter_that_was_trained_on_bfloat16_knows_its_base_in_float32(tiny_sd, adapter, tmp_path):
    described = json.loads((adapter[0] / "adapter.json").read_text())
    rounded = bases.load(tiny_sd, dtype="bfloat16")
    fingerprints = {"base_fingerprint": rounded.fingerprint(), "base_fingerprint_bfloat16": rounded.fingerprint(torch.bfloat16)}
    assert fingerprints["base_fingerprint"] != described["base_fingerprint"]
    shutil.copytree(adapter[0], tmp_path / "a")
    write_json(tmp_path / "a" / "adapter.json", described | fingerprints | {"dtype": "bfloat16"})
    assert ctrl.load(tiny_sd, tmp_path / "a").unet.dtype == torch.float32
    write_json(tmp_path / "a" / "adapter.json", described | fingerprints | {"dtype": "bfloat16", "base_fingerprint_bfloat16": "0" * 16})
    with pytest.raises(UserError, match="made for the base"):
        ctrl.load(tiny_sd, tmp_path / "a")


@pytest.mark.parametrize("dtype", ["half", "bf16", torch.int8, None])
def test_a_dtype_is_torchs_or_a_name_or_one_line(tiny_sd, adapter, dtype):
    with pytest.raises(UserError, match="dtype is .*: give one of float32, bfloat16, float16"):
        ctrl.load(tiny_sd, adapter[0], dtype=dtype)


def test_a_negative_prompt_goes_for_all_prompts(tiny_sd, adapter):
    pipe = ctrl.load(tiny_sd, adapter[0])
    for prompts in ("coat", ["coat", "bag"]):
        listed = ["bag"] * (1 if prompts == "coat" else 2)
        one, each = (stack(pipe(prompts, label=0, seed=0, negative_prompt=negative).images) for negative in ("bag", listed))
        assert np.array_equal(one, each) and not np.array_equal(one, stack(pipe(prompts, label=0, seed=0).images))


def test_importing_the_package_is_cheap():
    code = "import ctrl, sys; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("amounts_to", "says"), [(2560.0, "gamma = 2560"), (float("inf"), "the reward alone")])
def test_card_says_what_the_recipe_amounts_to(control, adapter, amounts_to, says):
    folder, described = adapter
    write_adapter(control, folder, described | {"effective_gamma": amounts_to}, "coat")
    assert says in (folder / "README.md").read_text()


def test_card_says_how_far_to_trust_a_judge(control, adapter):
    folder, described = adapter
    judges = {"judge_accuracy_mood": {"value": 0.9, "lo": 0.8, "hi": 0.95, "n": 60}}
    write_adapter(control, folder, described | {"judges": judges}, "coat")
    assert "mood is what people said" in (card := (folder / "README.md").read_text()) and r"0.900 \[0.800, 0.950\]." in card


PAIR = Factors((Categorical(2, ("large", "small")), Categorical(3, ("dark", "grey", "light"))), ("size", "shade"))


@pytest.fixture
def pair(base):
    return controls.Control(base, PAIR, 4, ["to_q", "to_v", "conv1"], seed=0, min_timestep=260)


@pytest.mark.slow
def test_plain_diffusers_draws_the_same_images_for_several_factors(pair, process, tiny_sd, tmp_path, spacing):
    folder, described = adapter.__wrapped__(tiny_sd, pair, tmp_path, process, spacing)
    cells = [("coat", PAIR.code((1, 2))), ("bag", PAIR.code((0, None))), ("bag", PAIR.code((None, 1)))]
    check_in_plain_diffusers(pair, process, folder, described, cells, ["{}"])
    assert "| [1, 2] | " in (folder / "README.md").read_text() and "label=[0, 0]" in (folder / "README.md").read_text()


def test_pipeline_takes_labels_of_several_factors(tiny_sd, pair, process, tmp_path, spacing):
    pipe = ctrl.load(tiny_sd, adapter=adapter.__wrapped__(tiny_sd, pair, tmp_path, process, spacing)[0])
    codes = PAIR.check([(1, None), (0, 2)])
    expected = ours(pair, process, ["coat", "bag"], codes.tolist(), 3)
    for label in ([(1, None), (0, 2)], [{"size": 1}, {"shade": 2, "size": 0}]):
        assert np.abs(stack(pipe(["coat", "bag"], label=label, seed=3).images) - expected).max() <= 1
    free = [stack(pipe(["coat", "bag"], label=label, seed=3).images) for label in (None, (None, None), [None, {}])]
    assert np.array_equal(free[0], free[1]) and np.array_equal(free[0], free[2])
    for wrong in (
        1,
        "dark",
        [(0, 1)],
        (2, 0),
        (0,),
        [(0, 1), 1],
        {"colour": 1},
        [(0.5, 1), (0, 1)],
        [(True, 1), (0, 1)],
        [[(0, 1)], [(0, 1)]],
        torch.zeros(2, 2),
        2j,
    ):
        with pytest.raises(ValueError, match="^label is"):
            pipe(["coat", "bag"], label=wrong)
