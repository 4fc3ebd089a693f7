"""A Stable Diffusion pipeline whose images also obey a label. This file is all that plain diffusers needs beside an adapter's weights:

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=ADAPTER_FOLDER, trust_remote_code=True)
pipe.load_control(ADAPTER_FOLDER)
pipe(["sneaker", "coat"], label=[3, 0], strength=1.0, seed=0).images
"""

import json
import math
import warnings
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file


def plain(label):
    """Lists, numbers and dicts instead of the tensors, arrays and tuples that `label` is or holds."""
    if hasattr(label, "tolist"):
        return label.tolist()
    if isinstance(label, list | tuple):
        return [plain(part) for part in label]
    return {key: plain(part) for key, part in label.items()} if isinstance(label, dict) else label


def factors_of(control):
    """The names of the labels of each factor, by its name; one factor is called `label`."""
    return control.get("factors") or {"label": control["label_names"]}


def check_distinct(weight, control, folder):
    """Raises ValueError where two labels of a factor, or one and its null, have the same row: they would draw the same images."""
    first = 0
    for key, names in factors_of(control).items():
        rows = torch.cat([weight[first : first + len(names)], weight[-1:]])
        equal = (rows[:, None] - rows).norm(dim=-1) <= 1e-3 * weight.norm(dim=1).max()
        for y, other in equal.triu(1).nonzero().tolist():
            same = f"{key} {other} ({names[other]})" if other < len(names) else "no label"
            raise ValueError(f"{folder}: {key} {y} ({names[y]}) changes no image: its embedding is that of {same}; train the adapter again")
        first += len(names)


def overlap(network, lora):
    """The inner product of the network's weights with what the LoRA adds to them, and the latter's squared norm; zeros where they do not
    compare: weights that are quantised, or not in memory, or of another network.

    Merging the LoRA raises the first by the second: so that one tells merged weights from the base's, whatever they were rounded to.
    """
    inner = square = 0.0
    for key in [key for key in lora if key.endswith(".lora_A.weight")]:
        layer = network.get_submodule(key.removesuffix(".lora_A.weight").partition(".")[2])
        added = lora[key.replace(".lora_A.", ".lora_B.")].float().flatten(1) @ lora[key].float().flatten(1)
        weight = layer.weight.detach().flatten(1)
        if not weight.is_floating_point() or weight.is_meta or weight.shape != added.shape:
            return 0.0, 0.0
        inner += (weight.float().cpu() * added).sum().item()
        square += added.square().sum().item()
    return inner, square


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


class LabelControl:
    """What is laid over a pipeline of diffusers: `label` (an integer, or one for each prompt; None: no label), `strength` and `seed`.

    An adapter of several factors takes a tuple of integers, or one for each prompt, with None for a factor that is left free; or a dict
    from the factors' names. One of a continuous label takes a number in the unit of adapter.json, or one for each prompt.

    eps = eps_pre + strength · (eps_psi − eps_pre): 0 is the pretrained model, 1 the trained one. `seed` gives image k the seed
    `seed + k`. Steps, eta and prompt guidance are the adapter's unless given; others draw from a law that it was not trained for, and
    are warned about.
    """

    PREFIX = "unet"  # what the network that predicts is called, in the pipeline and in the LoRA's file
    control = null = None

    @property
    def network(self):
        return getattr(self, self.PREFIX)

    def load_control(self, folder):
        """Loads the LoRA and the label embedding in `folder`."""
        folder = Path(folder)
        control = json.loads((folder / "adapter.json").read_text())
        weights = load_file(folder / "label_embedding.safetensors")
        self.check_weights(folder, control)
        # The network's own loader: the pipeline's would also look for a LoRA of the text encoder, and warn that there is none.
        network, file = self.network, {"weight_name": "pytorch_lora_weights.safetensors", "prefix": self.PREFIX, "use_safetensors": True}
        if "continuous" in control:
            self.null, embedding = math.nan, FourierEmbedding(weights, control["continuous"]["mean"], control["continuous"]["sd"])
        else:
            check_distinct(weights["weight"], control, folder)
            self.null = len(weights["weight"]) - 1
            embedding = LabelEmbedding(*weights["weight"].shape, padding_idx=self.null)
            embedding.load_state_dict(weights)
        network.load_lora_adapter(str(folder), **file, adapter_name="ctrl", _pipeline=self)
        if control.get("merged"):  # the LoRA is in the weights, and -1 times it takes it out again: on and off change places
            network.set_adapters("ctrl", -1.0)
            network.enable_adapters, network.disable_adapters = network.disable_adapters, network.enable_adapters
            network.enable_adapters()
        network.class_embedding = embedding.to(network.device, network.dtype).requires_grad_(False)
        self.scheduler = self.scheduler_of(control["sampler"])
        self.control = control
        return self

    def check_weights(self, folder, control):
        """Raises ValueError where the LoRA is merged into this pipeline's weights and should not be, or the other way round."""
        inner, square = overlap(self.network, load_file(folder / "pytorch_lora_weights.safetensors"))
        if "base_overlap" not in control or square < 1e-4:  # an older adapter; or so little that rounding decides
            return
        inside, merged = inner > control["base_overlap"] + square / 2, control.get("merged", False)
        if merged and not inside:
            others = f"{folder}: the LoRA is merged into the weights in this folder, and this pipeline has others"
            raise ValueError(f"{others}: load the pipeline from here, DiffusionPipeline.from_pretrained({str(folder)!r}, ...)")
        if inside and not merged:
            raise ValueError(f"{folder}: the LoRA is in this pipeline's weights already, and would count twice: load the base's own")

    def scheduler_of(self, sampler):
        """What draws from the law that was trained."""
        # DDPM is DDIM with eta 1, and the one of the two that diffusers runs on any timesteps.
        quadratic = sampler["spacing"] == "quadratic"
        # Neither clips: that would be another law than the one that was trained, wherever latents are large.
        spaced = {"clip_sample": False, "thresholding": False} | ({"variance_type": "fixed_small"} if quadratic else {})
        return (DDPMScheduler if quadratic else DDIMScheduler).from_config(self.scheduler.config, **spaced)

    def labelled_by(self, labels):
        """The keywords that tell the network the labels of its next pass."""
        return {"class_labels": labels}

    def check_labels(self, label, num_prompts):
        """`label` as rows of the embedding, (num_prompts, factors), or numbers, NaN for none. ValueError where it is wrong.

        The factors' labels stand below each other in the table, the null behind all.
        """
        if "continuous" in self.control:
            return self.check_numbers(label, num_prompts)
        factors = factors_of(self.control)
        several, null = "factors" in self.control, sum(map(len, factors.values()))
        needed = f"give an entry for each of {', '.join(factors)}, None where it is free" if several else "give an integer, or None"
        label = plain(label)
        flat = isinstance(label, list) and several and all(part is None or isinstance(part, int | float) for part in label)
        labels = label if isinstance(label, list) and not flat else [label] * num_prompts
        if len(labels) != num_prompts:
            raise ValueError(f"label is {label!r}: give one label, or one for each of the {num_prompts} prompts")

        def rows(y):
            if several and isinstance(y, dict):
                if unknown := [key for key in y if key not in factors]:
                    raise ValueError(f"label is {y!r}: there is no factor {unknown[0]!r}, only {', '.join(factors)}")
                y = [y.get(key) for key in factors]
            parts = [None] * len(factors) if y is None else y if several else [y]
            if not isinstance(parts, list) or len(parts) != len(factors):
                raise ValueError(f"label is {y!r}: {needed}")
            first = 0
            for part, (key, names) in zip(parts, factors.items(), strict=True):
                if part is not None and (not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < len(names)):
                    raise ValueError(f"label is {label!r}: {key} has the labels 0 to {len(names) - 1} ({', '.join(names)}); {needed}")
                yield null if part is None else first + part
                first += len(names)

        return torch.tensor([list(rows(y)) for y in labels])

    def check_numbers(self, label, num_prompts):
        """The same for an adapter of a continuous label."""
        space = self.control["continuous"]
        margin = space["extrapolation"] * (space["high"] - space["low"])
        slack = 1e-6 * (space["high"] - space["low"])  # of float32
        low, high = space["low"] - margin - slack, space["high"] + margin + slack
        label = plain(label)
        labels = label if isinstance(label, list) else [label] * num_prompts
        if len(labels) != num_prompts:
            raise ValueError(f"label is {label!r}: give one label, or one for each of the {num_prompts} prompts")
        for y in labels:
            if y is not None and (not isinstance(y, int | float) or isinstance(y, bool) or not low <= y <= high):
                raise ValueError(f"label is {y!r}: this adapter's labels are numbers from {low:.4g} to {high:.4g} {space['unit']}".rstrip())
        return torch.tensor([math.nan if y is None else float(y) for y in labels])

    def sampler_settings(self, given):
        """`given` keywords over the adapter's own sampler. Another number of steps, eta or prompt guidance is warned about."""
        sampler, num_steps = self.control["sampler"], given.get("num_inference_steps")
        if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 1):
            raise ValueError(f"num_inference_steps is {num_steps!r}: give a whole number above 0, or leave it out for the adapter's")
        own = {"num_inference_steps": sampler["num_steps"], "eta": sampler["eta"], "guidance_scale": sampler["guidance_scale"]}
        given = {name: value for name, value in given.items() if name not in own or value not in (None, own[name])}
        if others := [f"{name} is {given[name]}, not {own[name]}" for name in own if name in given]:
            warnings.warn(f"the images are of another law than the adapter was trained for: {', '.join(others)}", stacklevel=3)
        if sampler["spacing"] == "quadratic" and "num_inference_steps" not in given:
            del own["num_inference_steps"]
            own["timesteps"] = sampler["timesteps"]
        return own | given

    @contextmanager
    def conditioned(self, labels, strength):
        """Inside, every pass gets the labels (the null label in its unguided half) and the strength: 0 where there is no label."""
        network, null = self.network, self.null
        forward = network.forward
        free = labels.isnan() if labels.ndim == 1 else (labels == null).all(1)
        strengths = torch.where(free, 0.0, float(strength))

        def with_labels(sample=None, timestep=None, hidden_states=None, **kwargs):  # a transformer's x_t has the last of these names
            sample = hidden_states if sample is None else sample
            y, s = labels.to(sample.device), strengths
            if len(sample) == 2 * len(y):
                y, s = torch.cat([torch.full_like(y, null), y]), s.repeat(2)
            kwargs.pop("return_dict", None)

            def eps_of(y, enabled):
                network.enable_adapters() if enabled else network.disable_adapters()
                return forward(sample, timestep=timestep, **self.labelled_by(y), return_dict=False, **kwargs)[0]

            active = timestep.max() >= self.control["min_timestep"] and s.any()
            if active and (s == 1).all():
                return (eps_of(y, True),)
            eps_pre = eps_of(torch.full_like(y, null), False)
            if not active:
                return (eps_pre,)
            return (eps_pre + s.view(-1, 1, 1, 1).to(eps_pre) * (eps_of(y, True) - eps_pre),)

        network.forward = with_labels
        try:
            yield
        finally:
            network.forward = forward
            network.enable_adapters()

    def __call__(self, prompt, label=None, strength=1.0, seed=None, num_images_per_prompt=1, **kwargs):
        if self.control is None:
            raise ValueError("no control is loaded: call load_control(folder) first")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        labels = self.check_labels(label, len(prompts)).repeat_interleave(num_images_per_prompt, dim=0)
        if not isinstance(strength, Real) or not 0 <= strength < math.inf:
            raise ValueError(f"strength is {strength!r}: it goes from 0 (the pretrained model) over 1 (the trained one) to more")
        if seed is not None:
            kwargs["generator"] = [torch.Generator().manual_seed(seed + k) for k in range(len(labels))]
        # diffusers takes lists beside a list of prompts
        for name in ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"):
            if isinstance(kwargs.get(name), str):
                kwargs[name] = [kwargs[name]] * len(prompts)
        with self.conditioned(labels, strength):
            return super().__call__(prompts, num_images_per_prompt=num_images_per_prompt, **self.sampler_settings(kwargs))


def labelled(pipeline, *more):
    """The class `pipeline` of diffusers, with labels, and with `more` laid over that."""
    return type(f"Label{pipeline.__name__}", (*more, LabelControl, pipeline), {})


def with_labels(pipe, *more):
    """`pipe` itself, a pipeline of diffusers that is loaded already (from one file of weights, say), with labels."""
    pipe.__class__ = labelled(type(pipe), *more)
    return pipe
