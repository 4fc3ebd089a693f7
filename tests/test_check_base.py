"""The first rule: what it says of the base, and what of all that a run needs it fetches, or tells the user to fetch."""

import json
import sys

import pytest

from ctrl import io
from ctrl.errors import UserError
from scripts import check_base
from tests import kinds
from tests.hub import COMMIT, NAME, put


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["check_base.py", *map(str, words)])
    check_base.main()


def test_the_first_rule_says_what_the_base_is(tmp_path, cache, monkeypatch, capsys):
    put(kinds.sdxl(tmp_path / "xl"), cache)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"base": {"path": NAME}, "dataset": {"image_size": 16}}))
    run(monkeypatch, "--config", config, "--output", tmp_path / "base.json")
    assert io.read_json(tmp_path / "base.json") == {
        "base": NAME, "revision": COMMIT, "kind": "StableDiffusionXLPipeline", "prediction_type": "epsilon", "image_size": 16
    }  # fmt: skip
    said = capsys.readouterr().out
    assert f"{NAME} is now at {COMMIT}" in said and f"{NAME}: StableDiffusionXLPipeline, epsilon, 16 pixels" in said
    config.write_text(json.dumps({"base": {"path": NAME}, "dataset": {"image_size": 32}}))
    with pytest.raises(UserError, match="dataset.image_size is 32, but owner/tiny-sd draws 16 pixels"):
        run(monkeypatch, "--config", config)
    strange = {"base": {"path": NAME}, "dataset": {"image_size": 16}, "prompts": {"subjects": ["coat", "cat"]}}
    config.write_text(json.dumps(strange))
    with pytest.raises(UserError, match="evaluation.features is resources/garments, which does not know 'cat' of prompts; set it to clip"):
        run(monkeypatch, "--config", config)
    config.write_text(json.dumps({"base": {"path": "owner/other"}}))
    with pytest.raises(UserError, match="owner/other is not in the cache"):
        run(monkeypatch, "--config", config, "--output", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def config_of(tiny_sd, tmp_path, **given) -> dict:
    """A complete configuration of a tiny base, as the first rule gets it."""
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"base": {"path": str(tiny_sd)}, "dataset": {"image_size": 16}, **given}))
    return file


AESTHETIC = {"oracle": "aesthetic", "edges": [5.7], "descending": False}
FACTORS = {"label": {"factors": [{**AESTHETIC, "network": "clip"}, {"oracle": "jpeg_size", "edges": [70]}]}}
OPENAI, LAION = ("ViT-L-14", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")
ASKED = {
    "none": ({}, []),
    "the classifier's": ({"classifier": {"network": "clip"}}, [OPENAI]),
    "a factor's and the aesthetic oracle's, the same": (FACTORS, [OPENAI]),
    "the judge's": (
        {"label": {"oracle": "column:quality", "judge": {"network": "clip"}},
         "dataset": {"kind": "folder", "path": "images", "image_size": 16}},
        [OPENAI],
    ),
    "the score's": ({"evaluation": {"clip_score": "clip"}}, [LAION]),
    "all": (FACTORS | {"classifier": {"clip": {"model": "ViT-B-16"}}, "evaluation": {"clip_score": "clip:ViT-L-14:openai"}},
            [OPENAI, ("ViT-B-16", "openai")]),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_the_first_rule_fetches_every_clip_that_the_run_needs(name, tiny_sd, tmp_path, monkeypatch):
    given, expected = ASKED[name]
    fetched = []
    monkeypatch.setattr(check_base, "check_weights", lambda config: None)
    monkeypatch.setattr(check_base.clip, "fetch", lambda *clip: fetched.append(clip))
    run(monkeypatch, "--config", config_of(tiny_sd, tmp_path, **given))
    assert sorted(fetched) == sorted(expected)


def test_the_first_rule_tells_a_clip_that_cannot_be_had(tiny_sd, tmp_path, cache, monkeypatch):
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    for clip, says in (
        ({"model": "ViT-L-14", "pretrained": "openai"}, "CLIP ViT-L-14 with weights 'openai' cannot be fetched .*check_base --config FILE"),
        ({"model": "ViT-L-14", "pretrained": "gone.safetensors"}, "there is no such file.*: give the path of a local safetensors file"),
        ({"model": "ViT-L-14", "pretrained": str(tmp_path / "cut.safetensors")}, "cut.safetensors is corrupt"),
        ({"model": "ViT-Q", "pretrained": "openai"}, "open_clip knows no model of this name"),
    ):
        config = config_of(tiny_sd, tmp_path, classifier={"network": "clip", "clip": clip})
        with pytest.raises(UserError, match=f"^classifier.clip: .*{says}") as caught:
            run(monkeypatch, "--config", config)
        assert "\n" not in str(caught.value)


def test_the_first_rule_tells_weights_that_only_the_user_can_fetch(tiny_sd, tmp_path, monkeypatch):
    gone = {"weights": str(tmp_path / "gone.safetensors"), "sha256": None}
    label = {"label": {"oracle": "aesthetic", "aesthetic": gone}}
    for given, says in ((label, "the aesthetic oracle needs"), ({"evaluation": {"brisque": gone}}, "evaluation.brisque needs")):
        with pytest.raises(UserError, match=f"{says} the weights .*gone.safetensors: get them from .*convert_weights") as caught:
            run(monkeypatch, "--config", config_of(tiny_sd, tmp_path, **given))
        assert "\n" not in str(caught.value)
