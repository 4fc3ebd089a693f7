"""An adapter's folder: weights, adapter.json, model card and the pipeline's code; and the check that plain diffusers agrees with us."""

import html
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ctrl import flow, judged, pipeline
from ctrl.adapter_files import LORA_FILE
from ctrl.base_files import FLOW, T5
from ctrl.control import Control
from ctrl.device import full_precision
from ctrl.errors import UserError
from ctrl.io import load_tensors, write_json, write_text
from ctrl.labels import Continuous
from ctrl.oracles import to_pil
from ctrl.process import Process
from ctrl.sampling import noise_of, sample

TOLERANCE = 3  # grey levels of 255: rounding, which a wild adapter magnifies; another adapter's images differ by tens
CHECKED_STEPS, CHECKED_LATENTS = 10, 4 * 64**2  # of what is drawn to check that: see `check_in_plain_diffusers`
CARD = """{head}
# {name}: a label for {base}

LoRA and label embedding trained by {trained}.

| label | meaning |
|---|---|
{labels}

```python
{loading}
pipe.load_control({folder_code})
images = pipe([{prompt_code}], label={example}, strength=1.0, seed=0).images
```

`label=None` is the pretrained model; `strength` goes from 0 (pretrained) over 1 (trained) to more. The LoRA alone loads with
`load_lora_weights` in a `{base_kind}` of diffusers.

## Training
{updates} updates of {batch_size} images in {train_seconds:.0f} s ({device}){outcome}.
Accuracy by the oracle on a fixed probe of {probe} images: {accuracy:.3f}.{trust}
Every update is in history.jsonl, all settings in adapter.json.

## Limits
Made for the base with the fingerprint {base_fingerprint}, and for the sampler in adapter.json: {sampler}.
"""

# How plain diffusers loads a base with an adapter's pipeline: by a folder or a name, or from one file of weights.
FROM_PRETRAINED = """from diffusers import DiffusionPipeline{fetched}

pipe = DiffusionPipeline.from_pretrained({base}, custom_pipeline={folder}, trust_remote_code=True{how})"""
FROM_SINGLE_FILE = """import sys

from diffusers import {kind}{fetched}

sys.path.insert(0, {folder})
from pipeline import with_labels

pipe = with_labels({kind}.from_single_file({base}{how}))"""

TAGS = {  # by which the hub knows an adapter for a base of a kind
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusion3Pipeline": "sd3",
}
UNCHECKED = ", safety_checker=None, feature_extractor=None"  # as in training: these are not fetched with a base

# Diffusers runs the pipeline.py of every adapter in one and the same module, where it looks for a single pipeline.
ALONE = """for _name in [name for name in globals() if name.startswith("LabelStable")]:
    del globals()[_name]"""

# What a user would write, in a process that has never heard of this package.
PLAIN_DIFFUSERS = """
import json, sys
import numpy as np
import torch
folder, dtype, prompts, labels, steps, output = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
{loading}
pipe.watermark = None
pipe.set_progress_bar_config(disable=True)
if dtype != torch.float32:
    pipe.to(torch.float32)
pipe.load_control(folder)
assert "ctrl" not in sys.modules, "ctrl was imported"
np.save(output, np.stack([np.asarray(image) for image in pipe(prompts, label=labels, seed=0, **steps).images]))
"""


def escaped(text: str) -> str:
    """`text` for Markdown: shown as it is, whatever it holds of HTML, tables, links and lines."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def literal(text: str) -> str:
    """`text` as a Python string inside a fenced block, which no backtick in it can end."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")


def is_single_file(described: dict) -> bool:
    return described["base"].endswith(".safetensors")


def head(described: dict) -> str:
    """The card's metadata. The hub refuses a `base_model` that is no name of its own; and nobody has said what licence the adapter has."""
    on_hub = "revision" in described.get("base_files", {}) and not is_single_file(described)
    base = f"base_model: {literal(described['base'])}\n" if on_hub else ""
    tag = TAGS[described["base_kind"]]
    return f"---\n{base}library_name: diffusers\ntags: [{tag}, {tag}-diffusers, text-to-image, diffusers, lora, ctrl]\n---"


def without_t5(described: dict) -> str:
    """The keywords by which diffusers does without T5, if the adapter was made so."""
    return "" if described.get("base_files", {}).get("t5", True) else "".join(f", {name}=None" for name in T5)


def loading(described: dict, folder: str, fetched: str = "", options: str = "") -> str:
    """Python that loads the base that adapter.json describes as `pipe`, by plain diffusers, with the pipeline in `folder`.

    That is an expression, whose value `fetched` may bring. The base is the very one that the adapter was made for: same commit, same files.
    """
    files = {key: value for key, value in described.get("base_files", {}).items() if key != "t5"}
    how = "".join(f", {key}={literal(value)}" for key, value in files.items()) + without_t5(described)
    single, kind = is_single_file(described), described["base_kind"]
    unchecked = UNCHECKED if kind == "StableDiffusionPipeline" and not single else ""
    code = FROM_SINGLE_FILE if single else FROM_PRETRAINED
    return code.format(base=literal(described["base"]), folder=folder, kind=kind, fetched=fetched, how=how + unchecked + options)


def write_adapter(control: Control, folder: Path, described: dict, prompt: str) -> None:
    """Writes weights, adapter.json, README.md with `prompt` as its example, and pipeline.py; for `described` see `control.describe`."""
    control.save(folder)
    described = described | {"base_overlap": pipeline.overlap(control.base.network, load_tensors(folder / LORA_FILE))[0]}
    last, settings = described["last"], described["finetune"]
    if isinstance(space := control.space, Continuous):
        example = f"{(space.low + space.high) / 2:.4g}"
        labels = f"| a number | {space.oracle.replace('_', ' ')}: {space.describe()} |"
    else:
        example = space.label(0)
        named = zip(range(control.null), described["label_names"], strict=True)
        labels = "\n".join(f"| {space.label(y)} | {escaped(name)} |" for y, name in named)
    if settings["trainer"] == "supervised":
        trained, outcome = "denoising labelled images, some without their label, for classifier-free guidance (Ho & Salimans 2022)", ""
    else:
        gamma = described["effective_gamma"]  # what the weights and the reduction of the KL amount to
        trained = f"CTRL (Zhao et al., ICLR 2025): samples of p(x | c) p(y | x)^gamma with gamma = {gamma:g}"
        if gamma == math.inf:
            trained = "back-propagation of the reward alone, without a KL: it draws from no conditional law"
        if settings["trainer"] == "policy_gradient":
            trained = f"policy gradients (Black et al. 2023): samples of p(x | c) exp(gamma · [the oracle says y]) with gamma = {gamma:g}"
            outcome = f"; at the end the reward = {last['reward']:.3f}, KL = {last['kl_nats']:.3f} nats"
        else:
            kl = f", KL = {last['kl_nats']:.3f} nats" if "kl_nats" in last else ""  # not every trainer measures it
            outcome = f"; at the end log p = {last['log_prob']:.3f} nats{kl}"
    texts = {key: escaped(described[key]) for key in ("base", "name", "device", "base_fingerprint")}
    codes = {"folder_code": literal(str(folder)), "prompt_code": literal(prompt)}
    card = CARD.format(
        **described | texts | codes | {"labels": labels, "example": example, "head": head(described)},
        loading=loading(described, codes["folder_code"]),
        updates=settings["num_updates"], batch_size=settings["batch_size"], trained=trained, outcome=outcome,
        probe=settings["probe"]["num_images"], accuracy=last["oracle_accuracy"],
        trust="".join(f" {escaped(sentence)}" for sentence in judged.words(described.get("judges", {}))),
    )  # fmt: skip
    write_text(folder / "README.md", card)
    write_text(folder / "pipeline.py", pipeline_code(type(control.base.pipe).__name__))
    write_json(folder / "adapter.json", described)


def pipeline_code(kind: str) -> str:
    """What plain diffusers runs: ctrl/pipeline.py, ctrl/flow.py where it takes that, and the one class for a base of this kind."""
    modules, laid_over = ([pipeline, flow], f"{kind}, FlowMatching") if kind in FLOW else ([pipeline], kind)
    code = "\n\n".join([*(Path(module.__file__).read_text() for module in modules), ALONE])
    return f"{code}\n\nfrom diffusers import {kind}  # noqa: E402 (the kind of the adapter's base)\n\nLabel{kind} = labelled({laid_over})\n"


def check_in_plain_diffusers(
    control: Control, process: Process, folder: Path, described: dict, cells: Sequence[tuple[str, float]], templates: Sequence[str]
) -> None:
    """Draws some images here and in a process that imports diffusers alone; raises UserError unless they agree to TOLERANCE.

    There it is on the CPU: so that a large model does not take hours, with at most CHECKED_STEPS (where the spacing is the scheduler's)
    and no more than four images of 512x512 pixels. Weights of a lower precision are the same numbers in float32, to which `control` and
    its base go for good: rounding in between differs from device to device.
    """
    base, sampler = control.base.to_float32(), described["sampler"]
    if fewer := sampler["spacing"] == "scheduler" and process.num_steps > CHECKED_STEPS:
        process = base.process(CHECKED_STEPS, process.eta)
    num = min(4, max(1, CHECKED_LATENTS // math.prod(base.latent_shape[1:])))
    chosen = list(cells)[:: max(1, len(cells) // num)][:num]
    prompts, labels = [templates[0].format(subject) for subject, _ in chosen], [label for _, label in chosen]
    written = [control.space.label(y) for y in labels]
    noise = noise_of(range(len(chosen)), base.latent_shape, process.num_steps, base.device)
    psi = control.denoiser(process, prompts, torch.tensor(labels), sampler["guidance_scale"])
    with torch.no_grad(), full_precision():  # plain diffusers draws on the CPU, to which a GPU comes as near as it takes no other way
        here = np.stack([np.asarray(image) for image in to_pil(base.decode(sample(process, psi, noise)))])
    output = folder / "plain_diffusers.npy"
    steps = {"num_inference_steps": CHECKED_STEPS} if fewer else {}
    arguments = json.dumps([str(folder), described["dtype"], prompts, written, steps, str(output)])
    code = PLAIN_DIFFUSERS.replace("{loading}", loading(described, "folder", options=", torch_dtype=dtype"))
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{folder}: plain diffusers cannot load the adapter: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    there = np.load(output, allow_pickle=False)
    output.unlink()
    if (worst := int(np.abs(here.astype(int) - there).max())) > TOLERANCE:
        raise UserError(f"{folder}: plain diffusers draws other images with the adapter than the trainer (by {worst} of 255 grey levels)")
