"""What goes to a hub: an adapter, or a merged pipeline, with its card."""

import re
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ctrl
from ctrl import base as bases
from ctrl import control as controls
from ctrl import export
from ctrl.adapter import TOLERANCE, write_adapter
from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.io import read_json, write_json
from tests.single_file import one_file
from tests.trained import TRAINED

SAMPLER = {"num_steps": 4, "spacing": "scheduler", "eta": 1.0, "guidance_scale": 2.0}
PROMPTS = ["coat", "bag"]


@pytest.fixture
def adapter(tiny_sd, control, tmp_path):
    """A scrambled control in its folder; it does not act below timestep 260."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.1 * torch.randn_like(p))
        control.base.network.class_embedding.weight[-1] = 0
    sampler = SAMPLER | {"timesteps": control.base.process(4).timesteps.tolist()}
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(control, folder, controls.describe(control, str(tiny_sd), sampler, ["a", "b", "c"], TRAINED), "coat")
    return folder


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    (folder / "tables").mkdir(parents=True)
    (folder / "figures").mkdir()
    (folder / "tables" / "results.md").write_text("| method | accuracy |\n| --- | ---: |\n| ctrl | 0.934 |\n")
    Image.new("RGB", (4, 4)).save(folder / "figures" / "teaser.png")
    return folder


def drawn(pipe, **keywords) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe(PROMPTS, seed=0, **keywords).images]).astype(int)


def test_merged_and_unmerged_draw_the_same_images(tiny_sd, adapter, results, tmp_path):
    from diffusers import DiffusionPipeline

    export.export(adapter, tmp_path / "merged", "me/coats", bases.load(tiny_sd), results)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control(tmp_path / "merged")
    ours = ctrl.load(tiny_sd, adapter)
    asked = [{"label": [0, 2]}, {"label": None}, {"label": [1, None], "strength": 1.5}, {"label": [0, 2], "strength": 0}]
    images = [(drawn(ours, **keywords), drawn(pipe, **keywords)) for keywords in asked]
    for mine, merged in images:
        assert np.abs(mine - merged).max() <= TOLERANCE
    assert np.abs(images[0][0] - images[1][0]).max() > 10 * TOLERANCE, "with a label there is something to agree on"
    with pytest.raises(UserError, match="LabelStableDiffusionPipeline.*; a base is "):
        ctrl.load(tmp_path / "merged", adapter)  # it would be added twice
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)" in card and 'snapshot_download("me/coats")' in card
    assert str(adapter) not in card and "load_lora_weights" not in card and "whose licence applies" in card and "license:" not in card


def test_a_merged_adapter_is_refused_on_the_base_that_it_was_made_for(tiny_sd, adapter, tmp_path):
    from diffusers import DiffusionPipeline

    merged = tmp_path / "merged"
    export.export(adapter, merged, "me/coats", bases.load(tiny_sd))
    with pytest.raises(UserError, match="merged into its own copy of the base .*: load the whole folder by plain diffusers"):
        ctrl.load(tiny_sd, merged)
    with pytest.raises(UserError, match="merged into its own copy of the base"):
        export.export(merged, tmp_path / "again", "me/coats")
    for dtype in (torch.float32, torch.bfloat16):
        pipe = DiffusionPipeline.from_pretrained(tiny_sd, custom_pipeline=str(merged), trust_remote_code=True, dtype=dtype)
        with pytest.raises(ValueError, match="merged into the weights in this folder, and this pipeline has others") as caught:
            pipe.load_control(merged)
        assert pipe.control is None and "\n" not in str(caught.value)
        pipe = DiffusionPipeline.from_pretrained(merged, trust_remote_code=True, dtype=dtype)
        with pytest.raises(ValueError, match="the LoRA is in this pipeline's weights already, and would count twice"):
            pipe.load_control(adapter)
        pipe.load_control(merged)


@pytest.mark.parametrize("merge", [False, True])
def test_the_card_of_an_adapter_of_one_file_is_run_as_it_is(tiny_sd, base, tmp_path, monkeypatch, merge):
    file = one_file(tiny_sd, tmp_path / "model.safetensors")
    base.source = bases.find(file, config=str(tiny_sd))
    folder = adapter.__wrapped__(file, Control(base, 3, 4, ["to_q", "to_v", "conv1"], seed=0), tmp_path)
    export.export(folder, tmp_path / "out", "me/coats", bases.load(file, config=str(tiny_sd)) if merge else None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert merge or f'from_single_file("{file}", config="{tiny_sd}")' in card
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: {"me/coats": str(tmp_path / "out")}[name])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "pipeline", raising=False)
    exec(code, said := {})
    sys.modules.pop("pipeline", None)
    expected = ctrl.load(file, folder, config=str(tiny_sd))("coat", label=0, seed=0).images
    assert np.abs(np.asarray(said["images"][0]).astype(int) - np.asarray(expected[0])).max() <= TOLERANCE


def test_the_exported_card_loads_the_commit_that_the_adapter_was_made_for(adapter, tmp_path):
    described = read_json(adapter / "adapter.json")
    files = {"revision": "0123abc", "variant": "fp16"}
    write_json(adapter / "adapter.json", described | {"base": "owner/sd1", "base_files": files})
    card = (adapter / "README.md").read_text()
    (adapter / "README.md").write_text(card.replace("---\n", "---\nbase_model: /data/sd1\nlicense: mit\n", 1))  # as it once was
    export.export(adapter, tmp_path / "out", "me/coats")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("owner/sd1", custom_pipeline=folder, trust_remote_code=True, revision="0123abc", variant="fp16"' in card
    said = yaml.safe_load(card.split("---\n")[1])
    assert set(said) == {"base_model", "library_name", "tags"} and said["base_model"] == "owner/sd1"


def test_an_adapter_alone_with_its_results_in_the_card(tiny_sd, adapter, results, tmp_path):
    export.export(adapter, tmp_path / "out", "me/coats", results=results)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| ctrl | 0.934 |" in card and "](figures/teaser.png)" in card and (tmp_path / "out" / "figures" / "teaser.png").is_file()
    assert card.index("## Results") < card.index("## Training") < card.index("## Limits") and str(adapter) not in card
    assert f'from_pretrained("{tiny_sd}", custom_pipeline=folder' in card and "label=0" in card
    assert not (tmp_path / "out" / "unet").exists() and not read_json(tmp_path / "out" / "adapter.json").get("merged")
    ctrl.load(tiny_sd, tmp_path / "out")


def test_what_is_incomplete_is_one_line_and_leaves_nothing(adapter, results, tmp_path):
    (results / "tables" / "results.md").unlink()
    with pytest.raises(UserError, match=r"results has no tables/results.md"):
        export.export(adapter, tmp_path / "out", "me/coats", results=results)
    (adapter / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is not the card that the training wrote"):
        export.export(adapter, tmp_path / "out", "me/coats")
    described = read_json(adapter / "adapter.json")
    write_json(adapter / "adapter.json", described | {"base_kind": "os; import os"})
    with pytest.raises(UserError, match="base_kind is 'os; import os', none of StableDiffusionPipeline"):
        export.export(adapter, tmp_path / "out", "me/coats")
    write_json(adapter / "adapter.json", described)
    (adapter / "label_embedding.safetensors").unlink()
    with pytest.raises(UserError, match="no trained adapter: it has no label_embedding.safetensors"):
        export.export(adapter, tmp_path / "out", "me/coats")
    assert not (tmp_path / "out").exists()
