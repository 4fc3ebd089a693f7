"""What many tests need: a Stable Diffusion with random weights, small enough to be built for every test session; real images, labelled."""

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.repository import copy_repository, snakemake

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # workers beside each other share the cores
torch.set_num_threads(THREADS)

LONG = [
    "test_smoke",
    "test_slurm",
    "test_dvc",
    "test_mixture",
    "test_continuous_chain",
    "test_multitask",
    "test_doctor",
    "test_pretrain",
    "test_parallel",
    "test_kills",
    "test_resume",
    "test_tasks",
    "test_mlflow_server",
    "test_speed",
    "test_benchmark_training",
]
SUBJECTS = ["coat", "bag"]
TEMPLATES = ["{}", "a {}"]


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that two workers (pytest-xdist, a file each at a time) end together."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    """Scripts that run in this process set a number of their own: two threads where two workers share two cores wait for each other."""
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda number: set_num_threads(min(number, THREADS)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's, which may not be asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A diffusers folder: 16x16 pixels, latents 4x8x8, two garments."""
    from diffusers import DDIMScheduler

    from ctrl import pretrain

    folder = tmp_path_factory.mktemp("tiny") / "sd"
    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer([t.format(s) for t in TEMPLATES for s in SUBJECTS], folder / "tokenizer")
    text_encoder = pretrain.build_text_encoder(len(tokenizer), tokenizer.eos_token_id, {"width": 16, "layers": 1, "heads": 2})
    vae = pretrain.build_vae({"channels": [16, 16], "latent_channels": 4}, 16)
    unet = pretrain.build_unet({"channels": [16, 32], "layers_per_block": 1, "heads": 2}, 16, 4, 8)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="trailing",
    )  # fmt: skip
    pretrain.save_pipeline(folder, vae, text_encoder, tokenizer, unet, scheduler)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_sd, tmp_path_factory):
    """A scrambled adapter of three labels, as a stranger may send one; a file with its own `adapter` means another."""
    from tests.strangers import new_adapter

    return new_adapter(tiny_sd, tmp_path_factory.mktemp("strangers") / "adapter")


@pytest.fixture(scope="module")
def model(tiny_sd):
    """The tiny base, loaded once a file."""
    from ctrl import base

    return base.load(tiny_sd)


@pytest.fixture
def base(tiny_sd):
    from ctrl import base

    return base.load(tiny_sd)


@pytest.fixture
def control(base):
    from ctrl.control import Control

    return Control(base, 3, 4, ["to_q", "to_v", "conv1"], seed=0, min_timestep=260)


@pytest.fixture(scope="session")
def real():
    """2,400 embedded images (uint8), their JPEG sizes in kB, splits (2/3 train, 1/6 each), and the quartiles of the training split."""
    from ctrl import bins, garments, oracles

    images = garments.read_idx(Path(__file__).resolve().parent.parent / "resources" / "fashion-mnist", "t10k")[0][:2400].contiguous()
    scores = np.array([oracles.jpeg_size_kb(image) for image in oracles.to_pil(images / 127.5 - 1)])
    splits = np.array(["train", "train", "val", "train", "train", "calibration"] * 400)
    return images, scores, splits, bins.bin_edges(scores[splits == "train"], "quantiles", 4)


@pytest.fixture(scope="session")
def trained(real):
    """A classifier of the sizes' quartiles, its history, and the labels."""
    from ctrl import oracles
    from ctrl.classifier_fit import fit

    images, scores, splits, edges = real
    labels = oracles.score_to_label(scores, edges, True)
    description = {"network": "dct", "head": "density", "num_classes": 4, "descending": True, "edges": edges}
    settings = {"num_epochs": 20, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-4}
    return *fit(images, scores, labels, splits, description, settings, seed=0), labels


@pytest.fixture
def tiny_clip(tmp_path) -> str:
    """A CLIP of 32 pixels and one layer, known to open_clip by this name."""
    import open_clip

    tower = {"layers": 1, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    return "tiny-clip"


@pytest.fixture(scope="session")
def finished_smoke(tmp_path_factory):
    """A copy of the repository in which config/smoke.yaml has run, as results/smoke: one for all workers, so no test changes it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    repository = base / "smoke" / "repository"
    with open(base / "smoke.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "smoke" / "done").exists():
            done = snakemake(copy_repository(repository), "all", "--cores", "2", "--configfile", "config/smoke.yaml", timeout=900)
            assert done.returncode == 0, done.stdout[-5000:]
            (base / "smoke" / "done").touch()
    return repository
