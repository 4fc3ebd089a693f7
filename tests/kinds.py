"""A tiny base of every kind with random weights, as a diffusers folder: 16x16 pixels, latents 4x8x8, two garments."""

import shutil
from pathlib import Path

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from ctrl import pretrain
from tests.strangers import edit_json

WORDS = ["coat", "bag", "a coat", "a bag"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sd_v(folder: Path, tiny_sd: Path) -> Path:
    """SD 2.x at 768 pixels: it predicts v, its attention has linear projections, and its folder a feature extractor, as SD 1.5's has."""
    shutil.copytree(tiny_sd, folder)
    edit_json("scheduler/scheduler_config.json", prediction_type="v_prediction")(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=(2, 4), use_linear_projection=True,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    edit_json("model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])(folder)
    return folder


def sdxl(folder: Path, zeros: bool = True) -> Path:
    """SDXL's architecture: two text encoders, the second one's pooled output and the picture's measures beside the time."""
    torch.manual_seed(0)
    tokenizers = [pretrain.build_tokenizer(WORDS, folder / name) for name in ("tokenizer", "tokenizer_2")]
    last = tokenizers[0].eos_token_id
    first, second = (pretrain.build_text_encoder(len(tokenizers[0]), last, {"width": width, "layers": 2, "heads": 2}) for width in (16, 24))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, cross_attention_dim=16 + 24, attention_head_dim=2,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        pretrain.build_vae({"channels": [16, 16], "latent_channels": 4}, 16), first, CLIPTextModelWithProjection(second.config),
        *tokenizers, unet, EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1), force_zeros_for_empty_prompt=zeros,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def sd3(folder: Path, newer: bool = False) -> Path:
    """Stable Diffusion 3's architecture: two CLIPs and T5, and a transformer of flow matching; a `newer` one is 3.5's."""
    torch.manual_seed(0)
    tokenizers = [pretrain.build_tokenizer(WORDS, folder / name) for name in ("tokenizer", "tokenizer_2")]
    last = tokenizers[0].eos_token_id
    clips = [
        CLIPTextModelWithProjection(pretrain.build_text_encoder(len(tokenizers[0]), last, {"width": width, "layers": 2, "heads": 2}).config)
        for width in (16, 8)
    ]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in ("a", "coat", "bag"))]
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=24, pos_embed_max_size=8,
        **({"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if newer else {}),
    )  # fmt: skip
    vae = pretrain.build_vae({"channels": [16, 16], "latent_channels": 4}, 16)
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=clips[0],
        tokenizer=tokenizers[0], text_encoder_2=clips[1], tokenizer_2=tokenizers[1], text_encoder_3=t5,
        tokenizer_3=T5TokenizerFast(vocab=words, extra_ids=0),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder
