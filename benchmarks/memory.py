"""The largest micro-batch for a GPU of 12, 24, 40 or 80 GB, the largest batch of reconstruction guidance, and what an update takes beside
the published step: computed by ctrl/activations.py and not measured on any such card.

Stable Diffusion 1.5 at 512x512, SDXL and Stable Diffusion 3.5 medium without T5 at 1024x1024, with `base: {dtype: bfloat16}`, prompt
guidance, checkpointing by whole passes or by blocks, `speed: {decode_size: 1}`, the LoRA of config/config.yaml, 50 steps, and beside them
what the largest of the tasks in config/stable_diffusion takes: CLIP ViT-L/14 as a classifier, and once more as the probe's oracle.
`--check` compares the formula with the growth of a process on this machine's CPU, for the networks of Stable Diffusion 1.5 in float32.
"""

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, or as a module

from ctrl import errors
from ctrl.activations import MARGIN, guidance_mb, kept_by_blocks_mb, kept_mb, trained_mb, training_mb, weights_mb
from ctrl.costs import PUBLISHED
from ctrl.measure import alone, status_mb
from scripts.common import DEFAULTS, read_yaml

CARDS, NUM_STEPS, SHARE = (12, 24, 40, 80), 50, 0.85  # GB; of the card, to be filled
KEPT = 6  # float32 tensors of a latent's shape that a step keeps: x_t, its noise, eps of psi and pre, and what the KL needs of them
CONFIG = read_yaml(DEFAULTS)
BATCHES = [b for b in (1, 2, 4, 8, 16, 32, 64) if CONFIG["finetune"]["batch_size"] % b == 0]  # a micro-batch is a part of a batch
LORA, PUBLISHED_LORA = CONFIG["finetune"]["lora"], CONFIG["adapters"][PUBLISHED]["lora"]
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24,
    "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
MODELS = {
    "Stable Diffusion 1.5": {"sample_size": 64, "in_channels": 4, "cross_attention_dim": 768},
    "SDXL": SDXL | {"in_channels": 4},
    "Stable Diffusion 3.5 medium": SD35,
}
TEXT_MILLIONS = dict(zip(MODELS, (123, 123 + 695, 123 + 695), strict=True))  # parameters of the text encoders
CHECKED = [("UNet", 32, 1), ("UNet", 32, 4), ("UNet", 64, 1), ("VAE", 32, 1)]  # network, size of the latents, images


def network_pass(config: dict, device: str, dtype: torch.dtype, batch_size: int = 1, lora: dict = LORA) -> tuple[ModelMixin, int, object]:
    """A network with LoRA, how many values are trained, and a function that makes one pass of it."""
    flow = "joint_attention_dim" in config
    with torch.device(device):
        network = (SD3Transformer2DModel if flow else UNet2DConditionModel)(**config).requires_grad_(False)
        network.add_adapter(LoraConfig(r=lora["rank"], lora_alpha=lora["rank"], target_modules=lora["target_modules"]))
        network.to(dtype)
        zeros = partial(torch.zeros, batch_size, dtype=dtype)
        x, t = zeros(*shape_of(config)).requires_grad_(), torch.ones(batch_size, dtype=torch.long)
        if flow:
            told = {"encoder_hidden_states": zeros(77 + 256, config["joint_attention_dim"]), "pooled_projections": zeros(2048)}
        else:
            told = {"encoder_hidden_states": zeros(77, config["cross_attention_dim"])}
            told |= {"added_cond_kwargs": {"text_embeds": zeros(1280), "time_ids": zeros(6)}} if "addition_embed_type" in config else {}
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return network, trained, lambda: network(x, timestep=t, **told).sample


def shape_of(config: dict) -> tuple[int, int, int]:
    """Of the latents, (C, h, w)."""
    return config["in_channels"], config["sample_size"], config["sample_size"]


def decoding(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple[AutoencoderKL, object]:
    """The VAE of these models, and a function that decodes a latent of `shape`."""
    with torch.device(device):
        vae = AutoencoderKL(
            **VAE, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=8 * shape[1],
            latent_channels=shape[0],
        )  # fmt: skip
        vae.requires_grad_(False).to(dtype)
        x_0 = torch.zeros(1, *shape, dtype=dtype).requires_grad_()
    return vae, lambda: vae.decode(x_0).sample


def clip_mb() -> tuple[float, float]:
    """MB of CLIP ViT-L/14's weights, as ctrl/clip.py keeps them, and of what autograd keeps of an image."""
    with torch.device("meta"):
        clip, image = open_clip.create_model("ViT-L-14", device="meta").requires_grad_(False), torch.zeros(1, 3, 224, 224).requires_grad_()
    return weights_mb(clip), kept_mb(clip, lambda: clip.encode_image(image))


def fixed_mb(name: str, trained: int, *networks: torch.nn.Module) -> float:
    """MB of the weights of `networks` and of the model's text encoders, and of what is trained."""
    return weights_mb(*networks) + TEXT_MILLIONS[name] * 1e6 * networks[0].dtype.itemsize / 2**20 + trained_mb(trained)


def latents_mb(shape: tuple[int, int, int]) -> float:
    """MB that a trajectory keeps besides its passes."""
    return NUM_STEPS * KEPT * math.prod(shape) * 4 / 2**20


def computed(name: str, config: dict) -> dict:
    """What each part takes, in MB, and the largest micro-batch of each card."""
    shape, (clip, image) = shape_of(config), clip_mb()
    (network, trained, run), (vae, decode) = network_pass(config, "meta", torch.bfloat16), decoding(shape, "meta", torch.bfloat16)
    fixed = fixed_mb(name, trained, network, vae)
    pass_mb = {"whole passes": kept_mb(network, run), "blocks": kept_by_blocks_mb(network, run)}
    decode_mb = {"whole passes": kept_mb(vae, decode), "blocks": kept_by_blocks_mb(vae, decode)}
    row = {
        "model": name,
        "weights_and_optimizer_mb": fixed,
        "pass_mb": pass_mb,
        "decode_mb": decode_mb,
        "latents_mb": latents_mb(shape),
    }
    row |= {"clip_mb": clip, "clip_image_mb": image}
    for how, kept in pass_mb.items():
        needed = {b: training_mb(fixed + 2 * clip, kept, decode_mb[how] + image, row["latents_mb"], b, 2) for b in BATCHES}
        row[how] = fitting(needed, "micro_batch_size")
    frozen, whole, decoded = fixed - trained_mb(trained), pass_mb["whole passes"], decode_mb["whole passes"]
    needed = {b: guidance_mb(frozen + clip, whole, decoded + image, b, 2) for b in BATCHES}
    return row | {"reconstruction guidance": fitting(needed, "batch_size")}


def fitting(needed: dict[int, float], name: str) -> dict[str, dict]:
    """Of each card the largest batch, as `name`, whose MB are within SHARE of it (0: none), and what that one, or 1, takes."""
    found = {}
    for card in CARDS:
        largest = max((b for b, mb in needed.items() if mb <= SHARE * card * 1e9 / 2**20), default=0)
        found[f"{card} GB"] = {name: largest, "memory_mb": needed[largest or 1]}
    return found


def beside_published(batch_size: int) -> dict:
    """What an update of Stable Diffusion 1.5 takes, `batch_size` trajectories at a time: ours by blocks, and the published step.

    That one has a second UNet, plain attention, whole passes that are made one after the other, and decodes all images at once.
    """
    name, found = "Stable Diffusion 1.5", {}
    config, shape = MODELS[name], shape_of(MODELS[name])
    for dtype in (torch.float32, torch.bfloat16):
        (unet, trained, run), (vae, decode) = network_pass(config, "meta", dtype), decoding(shape, "meta", dtype)
        fixed, kept = fixed_mb(name, trained, unet, vae), (kept_by_blocks_mb(unet, run), kept_by_blocks_mb(vae, decode))
        found[f"ours, {str(dtype).removeprefix('torch.')} weights"] = training_mb(fixed, *kept, latents_mb(shape), batch_size, 2)
    unet, trained, run = network_pass(config, "meta", torch.float32, 1, PUBLISHED_LORA)
    vae, decode = decoding(shape, "meta", torch.float32)
    fixed = fixed_mb(name, trained, unet, unet, vae)
    unet.set_attn_processor(AttnProcessor())
    published = training_mb(fixed, kept_mb(unet, run), batch_size * kept_mb(vae, decode), latents_mb(shape), batch_size, 1)
    ratios = {f"{what}, ratio": mb / published for what, mb in found.items()}
    return {"model": name, "batch_size": batch_size, "memory_mb": found | {PUBLISHED: published}, "ratios": ratios}


def checked(what: str, size: int, images: int, device: str) -> tuple[torch.nn.Module, int, object]:
    """A network that is measured, how many values of it are trained, and a function that makes one pass of it."""
    if what == "UNet":
        return network_pass(MODELS["Stable Diffusion 1.5"] | {"sample_size": size}, device, torch.float32, images)
    vae, decode = decoding((4, size, size), device, torch.float32)
    return vae, 0, decode


def growth(what: str, size: int, images: int, by_blocks: bool) -> float:
    """MB by which this process grows, at its peak, for one pass and the way back, in a process of its own."""
    torch.set_num_threads(1)
    network, _, run = checked(what, size, images, "cpu")
    with torch.no_grad():
        run()
    if by_blocks:
        network.enable_gradient_checkpointing()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status_mb("VmRSS")
    run().sum().backward()
    return status_mb("VmHWM") - before


def check(what: str, size: int, images: int, by_blocks: bool) -> dict:
    """What is counted, with the gradients of what is trained, beside what is measured."""
    network, trained, run = checked(what, size, images, "meta")
    kept, gradients_mb = (kept_by_blocks_mb if by_blocks else kept_mb)(network, run), trained * 4 / 2**20
    row = {"network": what, "pixels": 8 * size, "images": images, "by_blocks": by_blocks, "kept_mb": kept}
    measured = alone(growth, what, size, images, by_blocks)
    return row | {"formula_mb": MARGIN * kept + gradients_mb, "measured_mb": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with this machine's CPU instead")
    args = parser.parse_args()
    if args.check:
        # Large tensors outside of the heap: glibc's holes between them took two thirds of a pass again, which a GPU's allocator has not.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        rows = [check(*what, by_blocks) for what in CHECKED for by_blocks in (False, True)]
    else:
        rows = [*(computed(name, config) for name, config in MODELS.items()), beside_published(4)]
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    errors.main(main)
