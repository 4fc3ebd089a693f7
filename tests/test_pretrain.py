"""Pretraining: the script ends in a folder that diffusers loads, goes on where it was killed, and guidance is distilled exactly."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ctrl import pretrain
from tests import warm_python

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "resources/fashion-mnist"
FEW = {"num_steps": 4, "batch_size": 4, "checkpoint_every": 2}
STAGE = FEW | {"learning_rate": 1e-3, "prompt_dropout": 0.5, "min_snr_gamma": 5.0, "ema_decay": 0.5}


@pytest.fixture
def data(base):
    """Latents, token ids with the empty prompt last, and the scheduler."""
    latents = torch.randn(8, *base.latent_shape), torch.full((8, *base.latent_shape), 0.1)
    rows = [[f"a {s}", s, ""] for s in ("coat", "bag")]
    tokens = [base.pipe.tokenizer(row, padding="max_length", truncation=True, return_tensors="pt").input_ids for row in rows]
    return latents, torch.stack(tokens)[torch.arange(8) % 2], base.pipe.scheduler


def first_loss(base, data, folder, **changes):
    """Of distillation, before the weights have moved."""
    base.network.requires_grad_(True)
    rows, config = [], STAGE | {"num_steps": 1, "learning_rate": 0.0} | changes
    pretrain.distill_guidance(base.network, base.pipe.text_encoder, *data, config, folder, 0, rows.append)
    return rows[0]["loss"]


def test_distillation_aims_at_the_guided_prediction(base, data, tmp_path):
    """What is to be learned is (scale − 1) times the difference that the prompt makes: nothing at 1, nothing for the empty prompt."""
    loss = {scale: first_loss(base, data, tmp_path / str(scale), guidance_scale=scale) for scale in (1.0, 2.0, 4.0)}
    assert loss[1.0] == pytest.approx(0, abs=1e-12) and loss[2.0] > 1e-6
    assert loss[4.0] == pytest.approx(9 * loss[2.0], rel=1e-3)
    assert first_loss(base, data, tmp_path / "empty", guidance_scale=4.0, prompt_dropout=1.0) == pytest.approx(0, abs=1e-12)


def test_distillation_moves_the_unet_alone(base, data, tmp_path):
    modules = {"unet": base.network, "text_encoder": base.pipe.text_encoder}
    before = {name: {k: p.clone() for k, p in m.named_parameters()} for name, m in modules.items()}
    first_loss(base, data, tmp_path, guidance_scale=4.0, num_steps=4, learning_rate=1e-3)
    moved = {name: any(not torch.equal(p, before[name][k]) for k, p in m.named_parameters()) for name, m in modules.items()}
    assert moved == {"unet": True, "text_encoder": False}


def first_images(folder, num):
    """The embedded IDX files, cut after `num` images."""
    folder.mkdir()
    for kind, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
        name = f"t10k-{kind}-ubyte.gz"
        (folder / name).write_bytes(gzip.compress(gzip.decompress((IMAGES / name).read_bytes())[: header + num * size]))
    return folder


def run_and_resume(folder: Path, stage: str) -> None:
    """The script with the config and images in `folder`: to its end, as `whole`; and killed at the checkpoint of `stage`, as `killed`."""

    def start(name: str) -> subprocess.Popen:
        words = ["--config", folder / "config.yaml", "--images", folder / "images", "--split", "t10k"]
        words += ["--output", folder / name, "--checkpoints", folder / f"{name}-checkpoints"]
        words = warm_python.command("scripts/pretrain.py", *map(str, words))
        return subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    assert start("whole").wait() == 0
    killed = start("killed")
    while not (folder / "killed-checkpoints" / f"{stage}.safetensors").exists():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert start("killed").wait() == 0


@pytest.mark.slow
def test_script_makes_a_loadable_folder_and_resumes(tmp_path):
    """Killed between two stages and started again, the script writes the same weights as an undisturbed run."""
    from diffusers import StableDiffusionPipeline

    config = yaml.safe_load((ROOT / "config/pretrain.yaml").read_text())
    config["text_encoder"]["width"], config["vae"]["channels"], config["unet"]["channels"] = 32, [16, 16, 16], [16, 32]
    for stage in ("vae", "decoder", "unet", "guidance"):
        config[stage] |= FEW
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    first_images(tmp_path / "images", 500)
    run_and_resume(tmp_path, "decoder")
    for part in ("vae", "unet"):
        one, other = (load_file(tmp_path / name / part / "diffusion_pytorch_model.safetensors") for name in ("whole", "killed"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a coat", num_inference_steps=2, guidance_scale=1.0, eta=1.0).images[0].size == (32, 32)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "history.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["vae", "decoder", "unet", "guidance"]
