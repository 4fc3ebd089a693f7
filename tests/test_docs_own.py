"""The pages for people who bring their own: every file on them is complete, and every key on them exists."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ctrl import classifier as classifiers
from ctrl import data, own, pictures, scoring
from ctrl.classifier_fit import fit
from ctrl.config import merge, resolve
from scripts.common import DEFAULTS, SCHEMA
from tests.repository import ROOT

PAGES = ["your-own.md", "coming-from-trl.md"]
SHARES = {"train": 0.6, "val": 0.2, "calibration": 0.2}


def files(page: str) -> dict[str, str]:
    """The files that a page shows, by the path in their first line."""
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return dict(blocks)


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    for page in PAGES:
        for name, text in files(page).items():
            (tmp_path / name).write_text(text)
    return tmp_path


def complete(path: str | Path) -> dict:
    """A configuration laid over the default, checked."""
    return resolve(merge(yaml.safe_load(DEFAULTS.read_text()), yaml.safe_load(Path(path).read_text())), json.loads(SCHEMA.read_text()))


def test_every_configuration_is_complete(written):
    paths = sorted((written / "config").glob("*.yaml"))
    assert len(paths) == 7
    for path in paths:
        config = complete(path)
        assert config["experiment"] == path.stem
        own.files_of(config)


def photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for k in range(90):
        grey = rng.integers(0, 256, (40, 48, 1))
        pixels = grey + (np.array([60, 0, -60]) if k % 3 == 0 else np.zeros(3))  # a third is tinted
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.png")


def test_own_images_own_label_and_own_classifier_fit_together(written):
    photos(written / "my_images")
    settings, label = complete("config/my_images.yaml")["dataset"], complete("config/my_label.yaml")["label"]

    def store(name: str, image: Image.Image) -> Path:
        image.save(written / f"cropped_{name}")
        return written / f"cropped_{name}"

    table, report = data.build(
        Path(settings["path"]), settings["image_size"], label, SHARES, settings["captions"], settings["resize"] == "crop", store
    )
    assert report["oracle"] == "my_oracle" and report["file"] == "my_oracle.py" and report["num_images"] == 90
    assert (table["label"] == [int(int(Path(name).stem) % 3 > 0) for name in table["file_name"]]).all(), "label 0 is the most colourful"
    config = complete("config/my_classifier.yaml")["classifier"]
    network = config["network"]
    described = {"network": network, "network_sha256": own.digest(network), "head": config["head"], **report}
    images = pictures.load_images(table["path"])
    quick = config | {"num_epochs": 40, "batch_size": 16, "learning_rate": 1e-2}
    classifier, _ = fit(images, table["score_my_oracle"], table["label"], table["split"], described, quick, seed=0)
    held_out = (table["split"] == "val").to_numpy()
    predicted = classifier.log_probs(images[held_out].float() / 127.5 - 1).argmax(1)
    assert (predicted == torch.tensor(table["label"].to_numpy()[held_out])).float().mean() > 0.8
    classifiers.save(written / "classifier", classifier)
    classifiers.load(written / "classifier")
    assert scoring.scorer(report)([Image.open(table["path"][0])])[0] == table["score_my_oracle"][0]


def test_every_key_on_the_page_exists():
    text, config = (ROOT / "docs" / "coming-from-trl.md").read_text(), complete("config/config.yaml")
    rows = re.findall(r"^\| `[^|]*\| ([^|]*) \|[^|]*\|$", text, re.MULTILINE)
    keys = [key for row in rows for key in re.findall(r"`([a-z_.]+)`", row)]
    assert len(keys) > 20
    for key in keys:
        part = config
        for name in key.split("."):
            assert name in part, key
            part = part[name]


def test_every_argument_of_trl_is_answered():
    """Those that the documentation of TRL's DDPOConfig and AlignPropConfig lists."""
    text = (ROOT / "docs" / "coming-from-trl.md").read_text()
    arguments = """
        exp_name run_name seed log_with log_image_freq tracker_kwargs accelerator_kwargs project_kwargs
        tracker_project_name logdir num_epochs save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from
        sample_num_steps sample_eta sample_guidance_scale sample_batch_size sample_num_batches_per_epoch
        train_use_8bit_adam train_learning_rate train_adam_beta1 train_adam_beta2 train_adam_weight_decay
        train_adam_epsilon train_gradient_accumulation_steps train_max_grad_norm train_num_inner_epochs train_cfg
        train_adv_clip_max train_clip_range train_timestep_fraction per_prompt_stat_tracking async_reward_computation
        max_workers negative_prompts truncated_backprop_rand truncated_backprop_timestep truncated_rand_backprop_minmax
        push_to_hub train_batch_size image_samples_hook
    """
    assert [name for name in arguments.split() if f"`{name}`" not in text] == []
