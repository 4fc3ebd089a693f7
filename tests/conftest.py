"""A Stable Diffusion small enough to be built for every test session, with random weights."""

import pytest
import torch

torch.set_num_threads(2)

SUBJECTS = ["coat", "bag"]
TEMPLATES = ["{}", "a {}"]


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


@pytest.fixture
def base(tiny_sd):
    from ctrl import base

    return base.load(tiny_sd)


@pytest.fixture
def control(base):
    from ctrl.control import Control

    return Control(base, 3, 4, ["to_q", "to_v", "conv1"], seed=0, min_timestep=260)
