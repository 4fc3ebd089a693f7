"""The embedded base turned into a Stable Diffusion 3 in miniature: its text, and a script that goes on where it was killed."""

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from ctrl import base as bases
from ctrl import pretrain_flow
from ctrl.sampling import noise_of, sample
from tests.repository import ROOT
from tests.test_pretrain import first_images, run_and_resume

SMALL = {"transformer": {"width": 32, "layers": 1, "heads": 2, "patch": 4}, "scheduler": {"shift": 1.0}}
FEW = {"num_steps": 4, "batch_size": 4, "checkpoint_every": 2}


def test_its_text_is_that_of_the_base_twice_and_zeros_for_t5(base):
    pipe = pretrain_flow.build_pipeline(base, SMALL)
    text, pooled = pretrain_flow.encode_prompts(pipe, ["coat", ""])
    width, length = base.pipe.text_encoder.config.hidden_size, base.pipe.tokenizer.model_max_length
    tokens = base.pipe.tokenizer(["coat", ""], padding="max_length", return_tensors="pt").input_ids
    expected = base.pipe.text_encoder(tokens).pooler_output
    torch.testing.assert_close(pooled, torch.cat([expected, expected], 1))
    assert text.shape == (2, length + pretrain_flow.NO_T5, 2 * width) and not text[:, length:].any()
    assert torch.equal(text[..., :width], text[..., width:]) and not torch.equal(text[0], text[1])


def test_the_velocity_of_a_single_image_is_learned(base, tmp_path):
    """Of one image without spread, noise − x_0 follows from x_s and s alone: (x_s − x_0) / s."""
    torch.manual_seed(0)
    pipe = pretrain_flow.build_pipeline(base, SMALL | {"transformer": SMALL["transformer"] | {"width": 64, "patch": 2}})
    x_0 = torch.randn(1, *base.latent_shape)
    text = pretrain_flow.encode_prompts(pipe, ["coat", ""])
    rows, config = [], {"no_t5": 1, "num_steps": 300, "batch_size": 32, "learning_rate": 3e-3, "ema_decay": 0.9, "prompt_dropout": 0.0}
    labels = torch.zeros(1, dtype=torch.long)
    config |= {"checkpoint_every": 1000}
    pretrain_flow.train_transformer(pipe.transformer, (x_0, 0 * x_0), text, labels, config, tmp_path, 0, "first", rows.append)
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]


@pytest.mark.slow
def test_the_script_makes_a_base_and_resumes(tmp_path):
    config = yaml.safe_load((ROOT / "config/pretrain_flow.yaml").read_text()) | SMALL
    for stage in config["stages"].values():
        stage |= FEW
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    first_images(tmp_path / "images", 200)
    run_and_resume(tmp_path, "first")
    one, other = (bases.load(tmp_path / name, t5=False) for name in ("whole", "killed"))
    process = one.process(3, spacing="quadratic")
    noise = noise_of([0], one.latent_shape, 3)
    images = [sample(process, base.denoiser(process, ["a coat"], 1.5), noise) for base in (one, other)]
    assert torch.equal(*images) and images[0].isfinite().all()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "whole", text_encoder_3=None, tokenizer_3=None)
    assert pipe("a coat", num_inference_steps=2).images[0].size == (32, 32)
