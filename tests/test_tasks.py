"""The experiments of the paper, every script in turn, on a tiny Stable Diffusion and tiny open_clip towers of random weights."""

import json
import sys
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
import yaml

from ctrl import aesthetic, errors, io, own, tracking
from scripts import build_dataset, estimate_cells, evaluate, finetune, sample, train_classifier
from tests.repository import ROOT

pytestmark = pytest.mark.slow
WIDTHS = {0: (1024, 16), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}  # of the public file, for an embedding of 16


class Nobody:
    """An MLflow run that nobody looks at."""

    def __getattr__(self, name):
        return lambda *arguments, **keywords: None


@contextmanager
def untracked(*arguments, **keywords):
    yield Nobody()


@pytest.fixture
def towers(tmp_path) -> str:
    """A CLIP with the real tokenizer, known to open_clip by its name; and weights of all that is public, as it is published."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-task.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-task.json")
    torch.manual_seed(0)
    io.save_tensors(tmp_path / "clip.safetensors", dict(open_clip.create_model("tiny-task").state_dict()))
    head = {f"layers.{k}.weight": torch.randn(*shape) / shape[1] ** 0.5 for k, shape in WIDTHS.items()}
    torch.save(head | {f"layers.{k}.bias": torch.zeros(shape[0]) for k, shape in WIDTHS.items()}, tmp_path / "aesthetic.pth")
    torch.save((torch.randn(20, 1), torch.rand(20, 36)), tmp_path / "brisque.pt")
    for name in ("aesthetic.pth", "brisque.pt"):
        aesthetic.convert(tmp_path / name, (tmp_path / name).with_suffix(".safetensors"), None)
    return "tiny-task"


def changes(task: str, folder, base, clip: str) -> dict:
    """What is laid over config/stable_diffusion/{task}.yaml."""
    weights = str(folder / "clip.safetensors")
    label = yaml.safe_load((ROOT / f"config/stable_diffusion/{task}.yaml").read_text())["label"]
    if "tolerance" in label:
        label["tolerance"] = 0.001  # kB: pictures of 16 pixels that a network of random weights draws are nearly of one size
    for factor in label.get("factors", [label] if "edges" in label else []):
        factor |= {"edges": "quantiles", "num_classes": 2}
    tower, sha256 = {"model": clip, "pretrained": weights}, own.digest(folder / "aesthetic.pth")
    predictor = {"clip": tower, "weights": str(folder / "aesthetic.safetensors"), "sha256": sha256}
    settings = {
        "num_updates": 2, "batch_size": 8, "micro_batch_size": 4, "warmup_updates": 0, "checkpoint_every": 2, "truncation": [1, 2],
        "coarse": {"end": 0}, "gradient_checkpointing": False, "lora": {"rank": 2},
        "factor_weights": [1.0, 2.0] if "factors" in label else None,
        "probe": {"every": 2, "num_images": 4},
    }  # fmt: skip
    return {
        "base": {"path": str(base)},
        "sampler": {"num_steps": 2, "guidance_scale": 2.0, "batch_size": 32},
        "prompts": {"subjects": ["coat"], "held_out": ["bag"], "templates": {"train": ["{}"], "val": ["{}"], "test": ["a {}"]}},
        "dataset": {"image_size": 16},
        "label": {**label, "aesthetic": predictor},
        "classifier": {"clip": tower, "num_epochs": 2},
        "cells": {"min_probability": 0.01},
        "finetune": settings,
        "evaluation": {
            "images_per_label": 4, "num_bootstrap": 5, "num_neighbours": 1, "features": f"clip:{clip}:{weights}",
            "brisque": {"weights": str(folder / "brisque.safetensors"), "sha256": None},
        },
    }  # fmt: skip


FIGURES = {  # of each task, beside those of all
    "compressibility": {"accuracy", "kid_rejection"},
    "multitask": {"accuracy", "accuracy_aesthetic", "accuracy_jpeg_size", "kid_rejection"},
    "continuous": {"within_tolerance", "mae", "r2", "kid_rejection"},
}


@pytest.mark.parametrize("task", FIGURES)
def test_a_task_on_tiny_towers(task, tiny_sd, tmp_path, monkeypatch, towers):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "changes.json").write_text(json.dumps(changes(task, tmp_path, tiny_sd, towers)))
    monkeypatch.setattr(tracking, "run", untracked)
    for script in (sample, evaluate, finetune):
        monkeypatch.setattr(script, "run", untracked)
    monkeypatch.setattr(finetune, "check_in_plain_diffusers", lambda *arguments: None)  # another process: see test_adapter.py

    def call(script, *arguments: object) -> None:
        configs = [str(ROOT / f"config/stable_diffusion/{task}.yaml"), "changes.json"]
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments), "--config", *configs])
        errors.main(script.main)

    methods = ("--methods", ROOT / "config/methods.tsv")
    subjects = ("--method", "pretrained", "--split", "train", "--per-subject")
    cells = ("--cells", "cells.json", "--per-label", 4)
    call(sample, *methods, *subjects, 160, "--seed-offset", 500_000, "--output", "generated")
    call(sample, *methods, *subjects, 40, "--held-out", "--output", "pool")
    call(build_dataset, "--images", "generated", "--output", "dataset")
    report, table = io.read_json(tmp_path / "dataset/report.json"), io.read_parquet(tmp_path / "dataset/metadata.parquet")
    if task == "multitask":
        assert [f["oracle"] for f in report["factors"]] == ["aesthetic", "jpeg_size"] and table["score_aesthetic"].std() > 0
    assert report["num_images"] > 120 and set(table["subject"]) == {"coat"}
    call(train_classifier, "--dataset", "dataset", "--generated", "pool", "--output", "classifier")
    call(estimate_cells, "--pool", "pool", "--classifier", "classifier", "--dataset", "dataset", "--output", "cells.json")
    assert io.read_json(tmp_path / "cells.json")["subjects"] == ["coat", "bag"]
    given = ("--dataset", "dataset", "--classifier", "classifier", "--cells", "cells.json")
    call(finetune, "--name", "ctrl", *given, "--output", "adapter")
    drawn = ("--split", "test", *cells)
    call(sample, *methods, "--method", "ctrl", *drawn, "--adapter", "adapter", "--output", "samples")
    call(sample, *methods, "--method", "rejection", *drawn, "--dataset", "dataset", "--seed-offset", 500_000, "--output", "reference")
    images = pd.read_parquet(tmp_path / "samples/samples.parquet")
    assert set(images["subject"]) == {"bag"}, "what is held out is all that the table asks for"
    compared = ("--samples", "samples", "--reference", "reference", "--dataset", "dataset", "--adapter", "adapter")
    call(evaluate, "--method", "ctrl", *compared, "--output", "ctrl.json")
    figures = io.read_json(tmp_path / "ctrl.json")["metrics"]
    assert FIGURES[task] | {"clip_score", "brisque"} <= figures.keys()
    assert -1 <= figures["clip_score"]["value"] <= 1 and 0 < figures["brisque"]["n"] <= len(images)
