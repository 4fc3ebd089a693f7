"""CLIP from open_clip, frozen: its weights come from safetensors files alone."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrl.errors import UserError, first_line, is_out_of_memory


def fetch(model: str, pretrained: str | None) -> str | None:
    """The file of open_clip's weights on this machine, downloaded unless it is there; for the arguments see `load_clip`.

    UserError where it cannot be had, or is a pickle. None: random weights.
    """
    import open_clip

    what, instead = f"CLIP {model} with weights {pretrained!r}", "give the path of a local safetensors file"
    if ":" in model:
        raise UserError(f"{what}: give open_clip's own name of the model, such as ViT-B-32")
    if open_clip.get_model_config(model) is None:
        raise UserError(f"{what} cannot be loaded: open_clip knows no model of this name; give one such as ViT-B-32")
    tag = pretrained and open_clip.get_pretrained_cfg(model, pretrained)
    try:
        file = open_clip.download_pretrained(tag) if tag else pretrained
    except Exception as error:  # the hub, the network and open_clip each raise their own
        raise UserError(
            f"{what} cannot be fetched ({first_line(error)}): run `python -m scripts.check_base "
            f"--config FILE` on a machine with a network, and copy its cache here (HF_HOME names the place), or {instead}"
        ) from error
    if file and Path(file).suffix != ".safetensors" and (Path(file).suffix or Path(file).exists()):
        raise UserError(f"{what}: {file} is a pickle, which may carry code: give CLIP's weights as .safetensors")
    if file and not tag and not Path(file).is_file():
        raise UserError(f"{what} cannot be loaded (open_clip has none of this name, and there is no such file): {instead}")
    return file


def load_clip(model: str, pretrained: str | None) -> nn.Module:
    """A frozen open_clip model in evaluation mode; UserError where its weights cannot be had. Random weights are those of seed 0.

    `pretrained` is a tag that open_clip downloads, a safetensors file, or None for random weights. A pickle is refused before it is read.
    """
    import open_clip

    fetch(model, pretrained)
    try:
        tag = pretrained and open_clip.get_pretrained_cfg(model, pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # Towers of their own would be fetched as whatever their makers keep them in.
            towers = {"pretrained_image": False, "pretrained_text": False}
            gelu = bool(tag and tag.get("quick_gelu"))  # OpenAI's weights were trained with it; open_clip warns, and goes on without
            clip = open_clip.create_model(
                model, pretrained=pretrained, require_pretrained=pretrained is not None, force_quick_gelu=gelu, **towers
            )
    except Exception as error:  # the file and open_clip each raise their own
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"CLIP {model} with weights {pretrained!r} cannot be loaded ({error}): give the path of a local safetensors file"
        ) from error
    return clip.eval().requires_grad_(False)


def embed(clip: nn.Module, images: Tensor) -> Tensor:
    """Embeddings (B, D), not normalised, of images in [-1, 1] with shape (B, 3, H, W), resized to what `clip` sees; differentiable."""
    size, mean, sd = clip.visual.image_size, clip.visual.image_mean or (0.5,) * 3, clip.visual.image_std or (0.5,) * 3
    size = (size, size) if isinstance(size, int) else tuple(size)
    images = F.interpolate((images + 1) / 2, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, sd = (torch.tensor(values, device=images.device, dtype=images.dtype).view(3, 1, 1) for values in (mean, sd))
    return clip.encode_image((images - mean) / sd)
