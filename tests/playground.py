"""Small finished experiments to play with, one for each kind of label: a Stable Diffusion with random weights and a scrambled adapter."""

from pathlib import Path

import torch

import ctrl
from ctrl import base as bases
from ctrl import control as controls
from ctrl.adapter import write_adapter
from ctrl.io import read_json, write_json
from ctrl.labels import space_of
from ctrl.oracles import jpeg_size_kb
from tests.conftest import SUBJECTS, TEMPLATES
from tests.trained import TRAINED

PROMPTS = {"subjects": SUBJECTS, "templates": {"train": TEMPLATES, "val": ["my {}"], "test": ["the {}"]}}
SAMPLER = {"num_steps": 3, "spacing": "scheduler", "timesteps": [999, 666, 333], "eta": 1.0, "guidance_scale": 1.0}


def factor(oracle: str, unit: str, edge: float) -> dict:
    """A label of two bins, the higher one first."""
    names = [f">= {edge:.4g} {unit}".strip(), f"< {edge:.4g} {unit}".strip()]
    return {"oracle": oracle, "unit": unit, "num_classes": 2, "descending": True, "edges": [edge], "label_names": names}


SIZE, LIGHT = factor("jpeg_size", "kB", 0.8), factor("brightness", "", 0.54)
BOTH = {"factors": [SIZE, LIGHT], "num_classes": 4}
NUMBER = {
    "kind": "continuous", "oracle": "jpeg_size", "unit": "kB",
    "low": 0.7, "high": 0.9, "mean": 0.8, "sd": 0.05, "extrapolation": 0.1, "tolerance": 0.01,
}  # fmt: skip


def build(folder: Path, tiny_sd: Path, report: dict, cells: dict) -> Path:
    """`folder` with an adapter, report.json, cells.json and config.json; returns the adapter's folder."""
    space, base = space_of(report), bases.load(tiny_sd)
    control = controls.Control(base, space, 4, ["to_q", "to_v", "conv1"], seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in control.parameters().values():
            p.add_(0.3 * torch.randn_like(p))
        if report.get("kind") != "continuous":
            base.network.class_embedding.weight *= 10
            base.network.class_embedding.weight[-1] = 0
    adapter = folder / "adapters" / "ctrl"
    adapter.mkdir(parents=True)
    write_adapter(control, adapter, controls.describe(control, str(tiny_sd), SAMPLER, space.names, TRAINED), "coat")
    write_json(folder / "dataset" / "report.json", report | {"label_names": list(space.names) or ["-"]})
    write_json(folder / "cells.json", cells)
    write_json(folder / "config.json", {"prompts": PROMPTS})
    return adapter


def classes(folder: Path, tiny_sd: Path) -> tuple[Path, int]:
    """An experiment whose label is the size's bin, and a seed with which the adapter obeys: its edge lies between what the labels draw."""
    adapter = build(folder, tiny_sd, SIZE, {"cells": [["coat", 0], ["coat", 1], ["bag", 1]]})
    pipe = ctrl.load(tiny_sd, adapter)
    large, small = ([jpeg_size_kb(image) for image in pipe(["coat"] * 8, label=[y] * 8, seed=0).images] for y in (0, 1))
    seed = max(range(8), key=lambda s: large[s] - small[s])
    assert large[seed] > small[seed]
    report = factor("jpeg_size", "kB", (large[seed] + small[seed]) / 2)
    write_json(folder / "dataset" / "report.json", report)
    write_json(adapter / "adapter.json", read_json(adapter / "adapter.json") | {"label_names": report["label_names"]})
    return adapter, seed
