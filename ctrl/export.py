"""A folder for the Hugging Face Hub: an adapter alone, or merged into a copy of its base, with a card that shows the results."""

import re
import shutil
from pathlib import Path

from ctrl import control as controls
from ctrl.adapter import head, literal, loading, pipeline_code, without_t5
from ctrl.adapter_files import EMBEDDING_FILE, LORA_FILE, read_described
from ctrl.base import Base
from ctrl.base_files import KINDS
from ctrl.errors import UserError
from ctrl.folders import check_links
from ctrl.io import atomic_folder, load_tensors, read_json, write_json, write_text
from ctrl.pipeline import overlap

FIGURES = {  # of a finished experiment, and what they show
    "teaser": "the pretrained model's pictures, and the adapter's for each label",
    "sizes": "what was measured, for each label that was asked for",
    "confusion": "which label was asked for, and which was measured",
    "factors": "accuracy of each factor",
    "training": "the training",
}
FETCHED = """
from huggingface_hub import snapshot_download

folder = snapshot_download({repository})"""
FROM_MERGED = """from diffusers import DiffusionPipeline{fetched}

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True{how})"""
USAGE = """```python
{loading}
pipe.load_control(folder)
images = {call}
```"""
MERGED = """
The LoRA is part of the network's weights here, so that `label` costs nothing. The LoRA's file takes it out again for `label=None`, for
other strengths, and below the timestep where the pretrained model finishes alone: to within rounding. It is not to be loaded on top. These
weights contain those of the base, whose licence applies to them.
"""


def export(adapter: Path, output: Path, repository: str, base: Base | None = None, results: Path | None = None) -> None:
    """Writes the folder `output`, which will be `repository` (owner/name) on the hub: with a `base`, merged into it.

    `results` is the folder of the finished experiment, for the table and the pictures. UserError where the adapter is incomplete, made for
    another base, or where `results` has no table.
    """
    adapter = Path(adapter)
    check_links(adapter)
    described = read_described(adapter)
    if described.get("base_kind") not in KINDS:  # it becomes code
        raise UserError(f"{adapter / 'adapter.json'}: base_kind is {described.get('base_kind')!r}, none of {', '.join(KINDS)}")
    if missing := [name for name in (LORA_FILE, EMBEDDING_FILE, "README.md") if not (adapter / name).is_file()]:
        raise UserError(f"{adapter} is no trained adapter: it has no {missing[0]}")
    card = (adapter / "README.md").read_text()
    with atomic_folder(output) as folder:
        if base is not None:
            described |= {"merged": True, "base_overlap": merge(base, adapter, folder)}
        for name in (LORA_FILE, EMBEDDING_FILE, "history.jsonl"):
            if (adapter / name).is_file():
                shutil.copy(adapter / name, folder / name)
        write_json(folder / "adapter.json", described)
        write_text(folder / "pipeline.py", pipeline_code(described["base_kind"]))
        shown = copy_results(results, folder) if results else ""
        write_text(folder / "README.md", card_of(card, described, repository, shown))


def merge(base: Base, adapter: Path, folder: Path) -> float:
    """Writes the whole pipeline into `folder`, with the adapter's LoRA in the network's weights; plain diffusers finds its class there.

    Returns the LoRA's overlap with the base's own weights, by which the pipeline tells them from the merged ones.
    """
    control = controls.load(base, adapter)
    before, _ = overlap(base.network, load_tensors(adapter / LORA_FILE))
    control.merge()
    base.network.class_embedding = None  # it has its own file: the pipeline puts it into its slot
    base.pipe.save_pretrained(folder)
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"_class_name": ["pipeline", f"Label{base.source.kind}"]})
    return before


def copy_results(results: Path, folder: Path) -> str:
    """Copies the pictures of a finished experiment, and returns the section of the card with them and the table."""
    table = Path(results) / "tables" / "results.md"
    if not table.is_file():
        raise UserError(f"{results} has no tables/results.md: name the folder of a finished experiment")
    lines = ["## Results", "", table.read_text().strip(), ""]
    (folder / "figures").mkdir()
    for name, shows in FIGURES.items():
        if (file := Path(results) / "figures" / f"{name}.png").is_file():
            shutil.copy(file, folder / "figures" / file.name)
            lines += [f"![{shows.capitalize()}](figures/{file.name})", ""]
    return "\n".join(lines)


def card_of(card: str, described: dict, repository: str, shown: str) -> str:
    """The adapter's own card with the hub's address in its example, and with the section `shown` before that on the training.

    Its metadata and how the base is loaded are written anew, from adapter.json: cards of older trainings said them otherwise.
    """
    call = re.search(r"^images = (.*)$", card, re.MULTILINE)
    if not call or not card.startswith("---\n") or "\n## Training\n" not in card:
        raise UserError("the adapter's README.md is not the card that the training wrote: write it again, or take the adapter anew")
    merged = described.get("merged", False)
    fetched = FETCHED.format(repository=literal(repository))
    code = FROM_MERGED.format(fetched=fetched, how=without_t5(described)) if merged else loading(described, "folder", fetched)
    usage = USAGE.format(loading=code, call=call[1])
    card = re.sub(r"\A---\n.*?\n---$", lambda _: head(described), card, count=1, flags=re.DOTALL | re.MULTILINE)
    card = re.sub(r"```python\n.*?\n```", lambda _: usage + ("\n" + MERGED.rstrip() if merged else ""), card, count=1, flags=re.DOTALL)
    if merged:
        card = re.sub(r"The LoRA alone loads with\n`load_lora_weights` in .*\.\n", "", card)
    before, after = card.split("\n## Training\n", 1)
    return f"{before}\n{shown}\n## Training\n{after}" if shown else card
