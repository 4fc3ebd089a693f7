"""Oracles that need more than a picture: a file of the user's own, and the aesthetic predictor on a tiny CLIP of random weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl import aesthetic, errors, own, scoring
from ctrl.clip import embed, load_clip
from ctrl.errors import UserError
from scripts import convert_weights

PICTURES = [Image.new("RGB", (16, 16), (k, 2 * k, 3 * k)) for k in (0, 40, 80)]
OWN = "def score(images):\n    return [image.getpixel((0, 0))[0] for image in images]\n"


def own_file(tmp_path, text: str, name: str = "redness.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_file_of_ones_own_is_an_oracle(tmp_path):
    factor = scoring.described(own_file(tmp_path, OWN), {})
    assert factor["oracle"] == "redness"
    assert scoring.scorer(factor)(PICTURES).tolist() == [0, 40, 80] and scoring.scorer(factor)([]).shape == (0,)


def test_a_file_that_changed_is_refused_until_the_dataset_is_made_again(tmp_path):
    path = own_file(tmp_path, OWN)
    factor = scoring.described(path, {})
    own_file(tmp_path, OWN + "# another\n")
    with pytest.raises(UserError, match="redness.py has changed since"):
        scoring.scorer(factor)
    scoring.scorer(scoring.described(path, {}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def score(images):\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("def score(images)\n", "line 1: SyntaxError"),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError"),
        ("def rate(images):\n    return [0.0]\n", "has no score: see docs/your-own.md"),
        ("def score(images):\n    return [0.0]\n", "returned 1 numbers for 3 images"),
        ("def score(images):\n    return 0.0\n", "returned float: it must return a number for each image"),
        ("def score(images):\n    return [float('nan')] * len(images)\n", "returned nan for an image"),
        ("def score(images):\n    return ['much'] * len(images)\n", "must return a number for each image"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
    ],
)
def test_an_error_in_the_file_is_one_line_that_names_it(tmp_path, monkeypatch, text, message):
    own_file(tmp_path, text)
    monkeypatch.chdir(tmp_path)  # a configuration's path begins where the command is started
    with pytest.raises(UserError, match=message) as caught:
        scoring.scorer(scoring.described("redness.py", {}))(PICTURES)
    assert "redness.py" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_names_that_are_taken(tmp_path):
    with pytest.raises(UserError, match="there is no file nowhere.py"):
        scoring.described("nowhere.py", {})
    with pytest.raises(UserError, match="has the name of an oracle of the project"):
        scoring.described(own_file(tmp_path, OWN, "brightness.py"), {})
    with pytest.raises(UserError, match="no oracle 'beauty'"):
        scoring.described("beauty", {})


def test_what_a_configuration_names_is_looked_for_before_anything_starts(tmp_path, capsys):
    label = {"oracle": "aesthetic", "factors": None, "aesthetic": {"weights": str(tmp_path / "no.safetensors")}}
    config = {"label": label, "classifier": {"network": "clip"}}
    for arguments in ([], ["all", "--cores", "2", "--configfile", "config/n.yaml"]):
        with pytest.raises(UserError, match=r"there is no file .*no.safetensors; docs/your-own.md says"):
            own.files_of(config, arguments)
    for dry in ("-n", "-np", "--dry-run", "--dryrun"):
        assert own.files_of(config, ["all", dry]) == {"oracles": [], "networks": [], "judge": []}
        assert "note: label.aesthetic.weights" in capsys.readouterr().err
    (tmp_path / "no.safetensors").touch()
    assert own.files_of(config)["oracles"] == [str(tmp_path / "no.safetensors")]
    mine = own_file(tmp_path, OWN)
    config = {"label": {"factors": [{"oracle": mine}, {"oracle": "jpeg_size", "network": mine}]}, "classifier": {"network": "cnn"}}
    assert own.files_of(config) == {"oracles": [mine], "networks": [mine], "judge": []}
    with pytest.raises(UserError, match="there is no file gone.py"):
        own.files_of({"label": {"factors": None, "oracle": "gone.py"}, "classifier": {"network": "cnn"}}, ["-n"])


@pytest.fixture
def public_weights(tmp_path):
    """A file as it is published: layers 0, 2, 4, 6, 7 of `layers`, here for a CLIP of 24 dimensions."""
    torch.manual_seed(0)
    widths = {0: (1024, 24), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    state = {f"layers.{k}.weight": torch.randn(*shape) / shape[1] ** 0.5 for k, shape in widths.items()}
    state |= {f"layers.{k}.bias": torch.randn(shape[0]) for k, shape in widths.items()}
    torch.save(state, tmp_path / "public.pth")
    return tmp_path / "public.pth", state


@pytest.fixture
def settings(tmp_path, tiny_clip, public_weights):
    sha256 = own.digest(public_weights[0])
    aesthetic.convert(public_weights[0], tmp_path / "aesthetic.safetensors", sha256)
    return {"clip": {"model": tiny_clip, "pretrained": None}, "weights": str(tmp_path / "aesthetic.safetensors"), "sha256": sha256}


def test_the_aesthetic_score_is_the_published_stack_on_the_unit_embedding(settings, public_weights, tiny_clip):
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in PICTURES]).float() / 127.5 - 1
    h = torch.nn.functional.normalize(embed(load_clip(tiny_clip, None), x), dim=-1)
    for k in (0, 2, 4, 6, 7):
        h = h @ public_weights[1][f"layers.{k}.weight"].T + public_weights[1][f"layers.{k}.bias"]
    factor = scoring.described("aesthetic", {"aesthetic": settings})
    scores = scoring.scorer(factor)(PICTURES)
    np.testing.assert_allclose(scores, h[:, 0].detach().numpy(), rtol=1e-4)
    assert np.ptp(scores) > 1e-3 and np.allclose(scoring.scorer(factor)(PICTURES[1:2]), scores[1:2], atol=1e-5)


def test_weights_are_checked(settings, public_weights, tmp_path):
    with pytest.raises(
        UserError, match=r"aesthetic oracle needs the weights .*none.safetensors: get them from https://github.com/christoph"
    ):
        aesthetic.scorer(settings | {"weights": str(tmp_path / "none.safetensors")})
    with pytest.raises(UserError, match="was made of the file with the SHA-256"):
        aesthetic.scorer(settings | {"sha256": "0" * 64})
    data = bytearray((tmp_path / "aesthetic.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "aesthetic.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        aesthetic.scorer(settings)
    aesthetic.convert(public_weights[0], tmp_path / "short.safetensors", None)
    torch.save({"layers.0.weight": torch.zeros(3, 24)}, tmp_path / "short.pth")
    aesthetic.convert(tmp_path / "short.pth", tmp_path / "short.safetensors", None)
    with pytest.raises(UserError, match="does not hold the aesthetic predictor of a CLIP with 24 dimensions"):
        aesthetic.scorer(settings | {"weights": str(tmp_path / "short.safetensors"), "sha256": None})


class Command:
    def __reduce__(self):
        import os

        return os.system, ("touch ran_code",)


def test_the_script_takes_path_and_checksum_from_the_configuration(public_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["convert_weights", str(public_weights[0])])
    with pytest.raises(SystemExit):
        errors.main(convert_weights.main)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "not 21dd590f3ccdc646" in said and not (tmp_path / "weights").exists()
    monkeypatch.setattr("sys.argv", ["convert_weights", "public.pth", "--output", "other.safetensors"])
    convert_weights.main()
    assert aesthetic.load_converted("other.safetensors", None, "", "").keys() == public_weights[1].keys()
    assert "whose checksum nobody gave" in capsys.readouterr().out


def test_a_public_file_is_checked_before_it_is_opened_and_runs_nothing(tmp_path, monkeypatch, public_weights):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not the file that the configuration means: its SHA-256 is"):
        aesthetic.convert(public_weights[0], tmp_path / "out.safetensors", "0" * 64)
    torch.save({"layers.0.weight": Command()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        aesthetic.convert(tmp_path / "evil.pth", tmp_path / "out.safetensors", None)
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        aesthetic.convert(tmp_path / "other.pth", tmp_path / "out.safetensors", None)
    with pytest.raises(UserError, match="there is no file"):
        aesthetic.convert(tmp_path / "nothing.pth", tmp_path / "out.safetensors", None)
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "ran_code").exists()
