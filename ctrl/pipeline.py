"""A Stable Diffusion pipeline whose images also obey a label. This file is all that plain diffusers needs beside an adapter's weights:

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=ADAPTER_FOLDER, trust_remote_code=True)
pipe.load_control(ADAPTER_FOLDER)
pipe(["sneaker", "coat"], label=[3, 0], strength=1.0, seed=0).images
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file


class LabelStableDiffusionPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline with `label` (an integer, or one for each prompt; None: no label), `strength` and `seed`.

    eps = eps_pre + strength · (eps_psi − eps_pre): 0 is the pretrained model, 1 the trained one. `seed` gives image k the seed
    `seed + k`. Steps, eta and prompt guidance are the adapter's unless given.
    """

    control = None

    def load_control(self, folder):
        """Loads the LoRA and the label embedding in `folder`."""
        folder = Path(folder)
        control = json.loads((folder / "adapter.json").read_text())
        weight = load_file(folder / "label_embedding.safetensors")["weight"]
        self.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", adapter_name="ctrl")
        embedding = torch.nn.Embedding(*weight.shape, padding_idx=control["null_label"])
        embedding.weight.data.copy_(weight)
        self.unet.class_embedding = embedding.to(self.unet.device, self.unet.dtype).requires_grad_(False)
        # DDPM is DDIM with eta 1, and the one of the two that diffusers runs on any timesteps.
        quadratic = control["sampler"]["spacing"] == "quadratic"
        spaced = {"variance_type": "fixed_small"} if quadratic else {}
        self.scheduler = (DDPMScheduler if quadratic else DDIMScheduler).from_config(self.scheduler.config, **spaced)
        self.control = control
        return self

    def check_labels(self, label, num_prompts):
        """`label` as a tensor with shape (num_prompts,). Raises ValueError where it is not one of the adapter's labels."""
        null = self.control["null_label"]
        labels = torch.as_tensor(null if label is None else label)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"label is {label!r}: labels are integers from 0 to {null - 1}")
        labels = labels.expand(num_prompts) if labels.ndim == 0 else labels
        if labels.shape != (num_prompts,):
            raise ValueError(f"label has shape {tuple(labels.shape)}: give one label, or one for each of the {num_prompts} prompts")
        if label is not None and not ((labels >= 0) & (labels < null)).all():
            raise ValueError(f"label is {label!r}: this adapter has the labels 0 to {null - 1} ({', '.join(self.control['label_names'])})")
        return labels

    @contextmanager
    def conditioned(self, labels, strength):
        """Inside, every UNet pass gets the labels (the null label in its unguided half) and the strength."""
        unet, null = self.unet, self.control["null_label"]
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
        labels = self.check_labels(label, len(prompts)).repeat_interleave(num_images_per_prompt)
        strength = 0.0 if label is None else strength
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
