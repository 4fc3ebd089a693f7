"""Adapters by their name on the hub: fetched without their code, checked as a folder is, or one line."""

import pytest
from huggingface_hub import errors

import ctrl
from ctrl import hub
from ctrl.adapter import loading
from ctrl.errors import UserError
from ctrl.io import read_json
from tests.hub import COMMIT
from tests.strangers import copy_of, edit_json, one_line


def put(folder, cache, name: str, left_out: str = "*.py") -> None:
    """A folder in the cache, laid out as the hub's library does."""
    model = cache / f"models--{name.replace('/', '--')}"
    copy_of(folder, model / "blobs", lambda _: None)
    for file in [path for path in folder.rglob("*") if path.is_file() and not path.match(left_out)]:
        link = model / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(model / "blobs" / file.relative_to(folder))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)


def test_an_adapter_is_loaded_by_its_name_and_checked_as_a_folder_is(tiny_sd, adapter, cache, tmp_path):
    put(adapter, cache, "me/coats")
    assert ctrl.load(tiny_sd, "me/coats").control["rank"] == 4
    assert ctrl.load(tiny_sd, "me/coats", adapter_revision=COMMIT).control["rank"] == 4
    put(copy_of(adapter, tmp_path / "bad", edit_json("adapter.json", rank=5)), cache, "me/bad")
    with pytest.raises(UserError, match="has the shape"):
        ctrl.load(tiny_sd, "me/bad")


def test_no_code_is_fetched(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **asked: "|".join(asked["allow_patterns"]))
    assert str(hub.find_adapter("me/coats")) == "adapter.json|pytorch_lora_weights.safetensors|label_embedding.safetensors"


def test_what_is_not_there_is_one_line(tiny_sd, cache, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no folder me/coats; .* is not in the cache .*HF_HUB_OFFLINE .*`hf download me/coats`") as caught:
        ctrl.load(tiny_sd, "me/coats")
    one_line(caught)
    with pytest.raises(UserError, match="adapter_revision is main, but the adapter, .* is no name on the hub"):
        ctrl.load(tiny_sd, tmp_path, adapter_revision="main")
    with pytest.raises(UserError, match="adapter.json is missing"):
        ctrl.load(tiny_sd, tmp_path / "nowhere" / "else")
    answers = {errors.RepositoryNotFoundError: "is not on the hub, or private", errors.RevisionNotFoundError: "at v2 is no revision"}
    for kind, says in answers.items():

        def refuse(name, kind=kind, **asked):
            raise kind.__new__(kind)

        monkeypatch.setattr(hub, "snapshot_download", refuse)
        with pytest.raises(UserError, match=says) as caught:
            hub.find_adapter("me/coats", "v2")
        one_line(caught)


def test_the_cards_lines_load_a_base_of_which_the_safety_checker_was_never_fetched(tiny_sd, adapter, cache, tmp_path):
    """As the project fetches it: Stable Diffusion 1.x names a safety checker that is larger than its text encoder."""
    named = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }  # fmt: skip
    put(copy_of(tiny_sd, tmp_path / "named", edit_json("model_index.json", **named)), cache, "owner/sd1")
    described = read_json(adapter / "adapter.json") | {"base": "owner/sd1", "base_files": {"revision": COMMIT}}
    exec(loading(described, repr(str(adapter))), said := {})
    pipe = said["pipe"].load_control(adapter)
    assert pipe.safety_checker is None and len(pipe("coat", label=0, seed=0).images) == 1
