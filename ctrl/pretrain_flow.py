"""Pretraining of the embedded transformer: a Stable Diffusion 3 in miniature, on the latents and the text encoder of the embedded base.

Flow matching (Lipman et al. 2023) with Stable Diffusion 3's times, logit-normal (Esser et al., ICML 2024, arXiv 2403.03206).
"""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from ctrl.base import Base
from ctrl.pretrain import run_averaged

NO_T5 = 256  # tokens of zeros that diffusers gives a Stable Diffusion 3 without T5


def build_transformer(config: dict, text_width: int, latent_channels: int, latent_size: int) -> SD3Transformer2DModel:
    """`config` holds width, layers, heads and patch."""
    return SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=config["patch"],
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config["layers"],
        num_attention_heads=config["heads"],
        attention_head_dim=config["width"] // config["heads"],
        joint_attention_dim=2 * text_width,
        caption_projection_dim=config["width"],
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=latent_size,
        qk_norm="rms_norm",
    )


def with_projection(encoder: nn.Module) -> CLIPTextModelWithProjection:
    """The CLIP text encoder `encoder`, with a projection that changes nothing."""
    projected = CLIPTextModelWithProjection(encoder.config)
    projected.text_model.load_state_dict(encoder.state_dict() if hasattr(encoder, "embeddings") else encoder.text_model.state_dict())
    with torch.no_grad():
        projected.text_projection.weight.copy_(torch.eye(encoder.config.hidden_size))
    return projected


def build_pipeline(base: Base, config: dict) -> StableDiffusion3Pipeline:
    """An untrained Stable Diffusion 3 with the VAE of `base`, and twice its text encoder; T5 it does without."""
    encoder, size = base.pipe.text_encoder, base.latent_shape[-1]
    base.pipe.vae.register_to_config(shift_factor=0.0)  # which diffusers adds without asking whether there is one
    transformer = build_transformer(config["transformer"], encoder.config.hidden_size, base.latent_shape[0], size)
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=config["scheduler"]["shift"]), vae=base.pipe.vae,
        text_encoder=with_projection(encoder), tokenizer=base.pipe.tokenizer, text_encoder_2=with_projection(encoder),
        tokenizer_2=base.pipe.tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


@torch.no_grad()
def encode_prompts(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Text embeddings with shape (P, L + NO_T5, D) and pooled ones (P, D) of P prompts."""
    text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return text, pooled


def train_transformer(
    transformer: SD3Transformer2DModel, latents: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], labels: Tensor, config: dict,
    folder: Path, seed: int, stage: str, log=None,
) -> None:  # fmt: skip
    """Trains `transformer` in place to predict the velocity, and leaves its exponential moving average in it.

    `latents` are mean and std with shape (N, C, h, w), scaled; `text` what `encode_prompts` gives of the prompts of all labels one after
    the other, each label's last one empty; `labels` (N,). Of the zeros that stand for T5, all alike, `no_t5` are seen, which saves time.
    """
    (mean, std), (embeddings, pooled) = latents, text
    generator, per_label = torch.Generator().manual_seed(seed), len(embeddings) // (int(labels.max()) + 1)
    embeddings = embeddings[:, : embeddings.shape[1] - NO_T5 + config["no_t5"]]

    def loss_at(step: int) -> Tensor:
        i = torch.randint(len(mean), (config["batch_size"],), generator=generator)
        which = torch.randint(per_label - 1, i.shape, generator=generator)
        which[torch.rand(i.shape, generator=generator) < config["prompt_dropout"]] = per_label - 1
        prompt = labels[i] * per_label + which
        spread, noise = torch.randn((2, len(i), *mean.shape[1:]), generator=generator).to(mean.device)
        s = torch.randn(i.shape, generator=generator).sigmoid().to(mean.device)
        x_0 = mean[i] + std[i] * spread
        x_s = torch.lerp(x_0, noise, s.view(-1, 1, 1, 1))
        v = transformer(x_s, embeddings[prompt], pooled[prompt], 1000 * s, return_dict=False)[0]
        return (v - (noise - x_0)).square().mean()

    run_averaged(nn.ModuleDict({"transformer": transformer}), loss_at, generator, config, folder, stage, log)
