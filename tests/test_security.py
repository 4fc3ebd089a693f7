"""Folders and prompts of strangers: no code in them is run, no name leads out of them, and what they say is shown as text."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

import ctrl
from ctrl import base as bases
from ctrl import data
from ctrl.errors import UserError
from ctrl.folders import is_inside
from tests.repository import snakemake
from tests.strangers import copy_of, edit_json, new_adapter, one_line

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_code_in_an_adapters_folder_is_not_run(tiny_sd, adapter, tmp_path, monkeypatch):
    def add_code(folder: Path) -> None:
        for name in ("pipeline.py", "__init__.py", "sitecustomize.py", "conftest.py", "ctrl.py", "unet.py"):
            (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    folder = copy_of(adapter, tmp_path / "adapter", add_code)
    pipe = ctrl.load(tiny_sd, folder)
    monkeypatch.chdir(folder)
    assert len(ctrl.load(tiny_sd, ".")(["coat"], label=[0], seed=0).images) == 1
    assert type(pipe).__module__ == "ctrl.pipeline" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("declared", [["evil", "Unet"], ["os", "system"], ["subprocess", "Popen"]])
def test_code_in_a_bases_folder_is_not_run(tiny_sd, tmp_path, declared):
    def add_code(folder: Path) -> None:
        for name in ("unet/evil.py", "evil.py", "pipeline.py"):
            (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Unet: pass\n")
        edit_json("model_index.json", unet=declared)(folder)

    with pytest.raises(UserError, match=r"base.path: .* cannot be loaded") as caught:
        bases.load(copy_of(tiny_sd, tmp_path / "base", add_code))
    one_line(caught)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link/secret.png", "nul\0", "circle"])
def test_names_that_lead_out_of_a_folder(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    assert not is_inside(folder, name) and is_inside(folder, "a/../b.png") and is_inside(folder, "..a")
    table = data.pd.DataFrame({"file_name": [name], "prompt": ["x"]})
    kept, refused = data.examine(folder, table, 8, lambda images: [0.0] * len(images))
    assert kept.empty and refused[0]["reason"] == "outside of the folder"


def test_a_base_with_a_link_out_of_it_is_refused(tiny_sd, tmp_path):
    folder = copy_of(tiny_sd, tmp_path / "base", lambda f: ((f / UNET).unlink(), (f / UNET).symlink_to("/etc/passwd")))
    with pytest.raises(UserError, match="outside of"):
        bases.load(folder)


HOSTILE = "</script><script>alert(1)</script> [x](javascript:alert(1)) `` ``` | $x$ \\ \" ' \n## head"


def test_the_model_card_shows_what_it_is_told_and_no_more(tiny_sd, tmp_path):
    """As HTML, and as the code that it offers: a prompt stays within its string."""
    folder = new_adapter(tiny_sd, tmp_path / "adapter", HOSTILE, (HOSTILE, "b", "c"))
    card = (folder / "README.md").read_text()
    prose = re.sub(r"```python\n.*?\n```", "", card, flags=re.DOTALL)
    assert (
        "<script" not in prose and "\n## head" not in prose and not re.search(r"(?<!\\)\]\(javascript", prose) and "&lt;script&gt;" in prose
    )
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    import ast

    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert HOSTILE in texts and card.count("```") == 2
    assert set(yaml.safe_load(card.split("---\n")[1])) == {"library_name", "tags"}


class Scripts(HTMLParser):
    """The content of every script of a page."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [""] if tag == "script" else []

    def handle_data(self, text):
        if self.cdata_elem == "script":
            self.found[-1] += text


@pytest.mark.slow
def test_the_report_shows_prompts_as_text(finished_smoke, tmp_path):
    """A report on finished results by a configuration whose prompts would end a script and begin another."""
    repository = tmp_path / "repository"
    shutil.copytree(finished_smoke, repository, symlinks=True, ignore=shutil.ignore_patterns("images", "pool"))
    template = "</script><script>alert('here')</script><img src=x onerror=alert(1)> {}"
    (repository / "config" / "hostile.yaml").write_text(json.dumps({"prompts": {"templates": {"test": [template]}}}))
    arguments = ("all", "--cores", "1", "--configfile", "config/smoke.yaml", "config/hostile.yaml", "--report", "report.html")
    done = snakemake(repository, *arguments)
    assert done.returncode == 0, done.stdout[-3000:]
    page = Scripts()
    page.feed((repository / "report.html").read_text())
    assert len(page.found) > 3 and [text for text in page.found if text.strip().startswith("alert('here')")] == []


def test_figures_take_prompts_as_they_are(tmp_path):
    import matplotlib
    from matplotlib.figure import Figure

    from ctrl.figures.style import STYLE, save

    with matplotlib.rc_context(STYLE):
        figure = Figure()
        figure.add_axes((0, 0, 1, 1)).set_title("a $100 bill, $\\frac{")
        save(figure, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 100
