"""CTRL: add a new control to a pretrained diffusion model, from labels alone."""

from pathlib import Path


def load(base: str | Path, adapter: str | Path, device: str = "cpu"):
    """A Stable Diffusion pipeline with a trained control: `load(base, adapter)(["sneaker"], label=[3], strength=1.0, seed=0).images`.

    Raises ctrl.errors.UserError where a file is missing or corrupt, or the adapter was made for another base. No code in the adapter's
    folder is run: the pipeline is this package's own.
    """
    from ctrl import base as bases
    from ctrl.adapter_files import check_adapter
    from ctrl.pipeline import LabelStableDiffusionPipeline

    loaded = bases.load(base, device=device)
    check_adapter(loaded, Path(adapter))
    pipe = LabelStableDiffusionPipeline(**loaded.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.load_control(adapter)
