"""A Stable Diffusion pipeline whose images also obey a label. This file is all that plain diffusers needs beside an adapter's weights:

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=ADAPTER_FOLDER, trust_remote_code=True)
pipe.load_control(ADAPTER_FOLDER)
pipe(["sneaker", "coat"], label=[3, 0], strength=1.0, seed=0).images
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file


class LabelEmbedding(torch.nn.Embedding):
    """The sum over the factors of a label: from rows of the table with shape (B, factors) to (B, width)."""

    def forward(self, rows):
        return super().forward(rows).sum(1)


class FourierEmbedding(torch.nn.Module):
    """Of continuous labels with shape (B,), NaN for no label, to (B, width): an MLP on sin and cos of pi/4 · 2^k · (y − mean) / sd."""

    def __init__(self, weights, mean, sd):
        super().__init__()
        self.mean, self.sd = mean, sd
        self.hidden = torch.nn.Linear(*weights["hidden.weight"].T.shape)
        self.out = torch.nn.Linear(*weights["out.weight"].T.shape, bias=False)
        self.load_state_dict(weights)

    def forward(self, y):
        weight, null = self.out.weight, y.isnan()
        z = (y.float().masked_fill(null, self.mean) - self.mean) / self.sd
        angles = math.pi / 4 * 2.0 ** torch.arange(self.hidden.in_features // 2, device=y.device) * z[:, None]
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(weight.dtype)
        return self.out(torch.nn.functional.silu(self.hidden(features))).masked_fill(null[:, None], 0)


class LabelStableDiffusionPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline with `label` (an integer, or one for each prompt; None: no label), `strength` and `seed`.

    An adapter of several factors takes a tuple of integers, or one for each prompt, with None for a factor that is left free; or a dict
    from the factors' names. One of a continuous label takes a number in the unit of adapter.json, or one for each prompt.

    eps = eps_pre + strength · (eps_psi − eps_pre): 0 is the pretrained model, 1 the trained one. `seed` gives image k the seed
    `seed + k`. Steps, eta and prompt guidance are the adapter's unless given.
    """

    control = null = None

    def load_control(self, folder):
        """Loads the LoRA and the label embedding in `folder`."""
        folder = Path(folder)
        control = json.loads((folder / "adapter.json").read_text())
        weights = load_file(folder / "label_embedding.safetensors")
        self.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", adapter_name="ctrl")
        if "continuous" in control:
            self.null, embedding = math.nan, FourierEmbedding(weights, control["continuous"]["mean"], control["continuous"]["sd"])
        else:
            self.null = len(weights["weight"]) - 1
            embedding = LabelEmbedding(*weights["weight"].shape, padding_idx=self.null)
            embedding.load_state_dict(weights)
        self.unet.class_embedding = embedding.to(self.unet.device, self.unet.dtype).requires_grad_(False)
        # DDPM is DDIM with eta 1, and the one of the two that diffusers runs on any timesteps.
        quadratic = control["sampler"]["spacing"] == "quadratic"
        spaced = {"variance_type": "fixed_small"} if quadratic else {}
        self.scheduler = (DDPMScheduler if quadratic else DDIMScheduler).from_config(self.scheduler.config, **spaced)
        self.control = control
        return self

    def check_labels(self, label, num_prompts):
        """`label` as rows of the embedding, (num_prompts, factors), or numbers, NaN for none. ValueError where it is wrong."""
        if "continuous" in self.control:
            return self.check_numbers(label, num_prompts)
        if "factors" in self.control:
            return self.check_factors(label, num_prompts)
        null = self.control["null_label"]
        labels = torch.as_tensor(null if label is None else label)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"label is {label!r}: labels are integers from 0 to {null - 1}")
        labels = labels.expand(num_prompts) if labels.ndim == 0 else labels
        if labels.shape != (num_prompts,):
            raise ValueError(f"label has shape {tuple(labels.shape)}: give one label, or one for each of the {num_prompts} prompts")
        if label is not None and not ((labels >= 0) & (labels < null)).all():
            raise ValueError(f"label is {label!r}: this adapter has the labels 0 to {null - 1} ({', '.join(self.control['label_names'])})")
        return labels[:, None]

    def check_numbers(self, label, num_prompts):
        """The same for an adapter of a continuous label."""
        space = self.control["continuous"]
        margin = space["extrapolation"] * (space["high"] - space["low"])
        slack = 1e-6 * (space["high"] - space["low"])  # of float32
        low, high = space["low"] - margin - slack, space["high"] + margin + slack
        labels = label.tolist() if hasattr(label, "tolist") else label
        labels = list(labels) if isinstance(labels, list | tuple) else [labels] * num_prompts
        if len(labels) != num_prompts:
            raise ValueError(f"label is {label!r}: give one label, or one for each of the {num_prompts} prompts")
        for y in labels:
            if y is not None and (not isinstance(y, int | float) or isinstance(y, bool) or not low <= y <= high):
                raise ValueError(f"label is {y!r}: this adapter's labels are numbers from {low:.4g} to {high:.4g} {space['unit']}".rstrip())
        return torch.tensor([math.nan if y is None else float(y) for y in labels])

    def check_factors(self, label, num_prompts):
        """The same for an adapter of several factors, whose labels stand one factor after the other, the null behind all."""
        factors = self.control["factors"]
        null = sum(map(len, factors.values()))

        def is_one(y):
            flat = isinstance(y, list | tuple) and all(part is None or isinstance(part, int | float) for part in y)
            return flat or y is None or isinstance(y, dict)

        if isinstance(label, int | float | str):
            raise ValueError(f"label is {label!r}: give an entry for each of {', '.join(factors)}, None where it is free")
        label = label.tolist() if hasattr(label, "tolist") else label
        labels = [label] * num_prompts if is_one(label) else list(label)
        if len(labels) != num_prompts or not all(is_one(y) for y in labels):
            raise ValueError(f"label is {label!r}: give one label, or one for each of the {num_prompts} prompts")
        rows = []
        for y in labels:
            if isinstance(y, dict):
                if unknown := [key for key in y if key not in factors]:
                    raise ValueError(f"label is {y!r}: there is no factor {unknown[0]!r}, only {', '.join(factors)}")
                y = [y.get(key) for key in factors]
            y = [None] * len(factors) if y is None else list(y)
            if len(y) != len(factors):
                raise ValueError(f"label is {y!r}: give an entry for each of {', '.join(factors)}, None where it is free")
            first, row = 0, []
            for part, (key, names) in zip(y, factors.items(), strict=True):
                if part is not None and (not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < len(names)):
                    raise ValueError(f"label is {y!r}: {key} has the labels 0 to {len(names) - 1} ({', '.join(names)})")
                row.append(null if part is None else first + part)
                first += len(names)
            rows.append(row)
        return torch.tensor(rows)

    @contextmanager
    def conditioned(self, labels, strength):
        """Inside, every UNet pass gets the labels (the null label in its unguided half) and the strength."""
        unet = self.unet
        null = self.null
        forward = unet.forward

        def with_labels(sample, timestep, *args, **kwargs):
            y = labels.to(sample.device)
            if len(sample) == 2 * len(y):
                y = torch.cat([torch.full_like(y, null), y])
            kwargs.pop("return_dict", None)

            def eps_of(y, enabled):
                unet.enable_adapters() if enabled else unet.disable_adapters()
                return forward(sample, timestep, *args, class_labels=y, return_dict=False, **kwargs)[0]

            active = int(timestep) >= self.control["min_timestep"] and strength != 0
            if active and strength == 1:
                return (eps_of(y, True),)
            eps_pre = eps_of(torch.full_like(y, null), False)
            return (eps_pre if not active else eps_pre + strength * (eps_of(y, True) - eps_pre),)

        unet.forward = with_labels
        try:
            yield
        finally:
            unet.forward = forward
            unet.enable_adapters()

    def __call__(self, prompt, label=None, strength=1.0, seed=None, num_images_per_prompt=1, **kwargs):
        if self.control is None:
            raise ValueError("no control is loaded: call load_control(folder) first")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        labels = self.check_labels(label, len(prompts)).repeat_interleave(num_images_per_prompt, dim=0)
        strength = 0.0 if bool(((labels == self.null) | (labels != labels)).all()) else strength  # NaN is not itself
        if seed is not None:
            kwargs["generator"] = [torch.Generator().manual_seed(seed + k) for k in range(len(labels))]
        sampler = self.control["sampler"]
        settings = {"eta": sampler["eta"], "guidance_scale": sampler["guidance_scale"]}
        if sampler["spacing"] == "quadratic" and "num_inference_steps" not in kwargs:
            settings["timesteps"] = sampler["timesteps"]
        else:
            settings["num_inference_steps"] = sampler["num_steps"]
        with self.conditioned(labels, strength):
            return super().__call__(prompts, num_images_per_prompt=num_images_per_prompt, **settings | kwargs)
