"""CTRL: add a new control to a pretrained diffusion model, from labels alone."""

from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def load(base: str | Path, adapter: str | Path, device: str = "cpu", dtype="float32", adapter_revision: str | None = None, **where):
    """A pipeline with a trained control: `load(base, adapter)(["sneaker"], label=[3], strength=1.0, seed=0).images`.

    `base` is a diffusers folder of Stable Diffusion 1.x, 2.x, 3.x or XL, a name on the hub, or one file of weights; `revision`, `variant`,
    `config` and `t5` say which one, as in the configuration. `adapter` is a folder, or a name on the hub, at `adapter_revision`. `dtype`
    is one of DTYPES, or torch's own. Raises ctrl.errors.UserError where a file is missing or corrupt, or the adapter was made for another
    base. No code in the adapter's folder is run: the pipeline is this package's own.
    """
    import torch

    from ctrl.adapter_files import check_adapter, read_described
    from ctrl.base import Base
    from ctrl.base_files import FLOW, find, load_pipeline
    from ctrl.errors import UserError
    from ctrl.flow import FlowMatching
    from ctrl.folders import check_links
    from ctrl.hub import find_adapter
    from ctrl.pipeline import with_labels

    if (name := str(dtype).removeprefix("torch.")) not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    folder = find_adapter(adapter, adapter_revision)
    check_links(folder)
    made_for = read_described(folder).get("base_files", {})
    source = find(base, **{key: value for key, value in made_for.items() if key == "t5"} | where)
    plain = load_pipeline(source, getattr(torch, name)).to(device)
    check_adapter(Base(plain, source), folder)
    return with_labels(plain, *[FlowMatching] * (source.kind in FLOW)).load_control(folder)
