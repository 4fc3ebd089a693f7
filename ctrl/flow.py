"""Flow matching (Lipman et al. 2023; Stable Diffusion 3): where it differs from diffusion, and a label for a transformer that has no slot.

A flow mixes x_s = (1 − s) x_0 + s · noise and predicts v = E[noise − x_0 | x_s], with the timestep 1000 s. Divided by its norm, x_s is the
x_t of a diffusion with sqrt(ᾱ) = (1 − s) / |(1 − s, s)|, whose chain at eta = 1 is the memoryless SDE of Adjoint Matching
(Domingo-Enrich et al., ICLR 2025, arXiv 2409.08861). Where pure noise is left, s = 1, a signal of FIRST is taken for none: the chain has
to be a Gaussian given x_0 there as well.

Plain diffusers runs this file with an adapter, behind pipeline.py.
"""

import json
import warnings
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

FIRST = 1e-3  # of the data in x_s where the model's own schedule has none


def scales(s):
    """(1 − s) as above, and the norm of (1 − s, s): x_s = norm · x_t; tensors of the shape of `s`."""
    a = (1 - s).clamp(min=FIRST)
    return a, torch.hypot(a, s)


def noise_in(x_s, v, s):
    """The noise in x_s that the velocity `v` tells, eps in the words of diffusion: x_s = a x̂_0 + s eps with x̂_0 = x_s − s v."""
    a, _ = scales(s)
    return ((1 - a) * x_s + a * s * v) / s


def open_slot(transformer):
    """Gives `transformer` a UNet's slot: its `class_embedding` of what its `class_labels` are is added to the embedding of the time.

    Its forward is left alone, since whatever moves weights to and fro (accelerate) puts it back as it was.
    """
    if hasattr(transformer, "class_embedding"):
        return
    transformer.class_embedding = transformer.class_labels = None

    def add_label(module, inputs, embedded):
        if transformer.class_embedding is None:
            return embedded
        return embedded + transformer.class_embedding(transformer.class_labels).to(embedded.dtype)

    transformer.time_text_embed.register_forward_hook(add_label)


class MemorylessScheduler(FlowMatchEulerDiscreteScheduler):
    """The memoryless chain at diffusers' own noise levels; `eta` scales its noise, and each image has a generator of its own."""

    eta, generator = 1.0, None

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, **kwargs):
        """`sigmas` are taken as they are: diffusers would shift them once more."""
        if sigmas is not None:
            sigmas = [float(s) for s in sigmas if s > 0]  # to no noise the last step goes in any case
        super().set_timesteps(None if sigmas else num_inference_steps, device, sigmas, **kwargs)
        if sigmas is not None:
            self.timesteps = torch.tensor([s * self.config.num_train_timesteps for s in sigmas], dtype=torch.float32, device=device)
        levels = self.timesteps.cpu().double() / self.config.num_train_timesteps
        self.sigmas = torch.cat([levels, levels.new_zeros(1)])

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        """(x_s at the next noise level,) from the velocity and `sample`, x_s at this one, all with shape (B, C, h, w)."""
        if self.step_index is None:
            self._init_step_index(timestep)
        s, to = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self._step_index += 1
        (a, norm), (b, norm_to) = scales(s), scales(to)
        x, v = sample.float(), model_output.float()
        sigma = self.eta * (to / norm_to) / (s / norm) * (1 - (a / norm) ** 2 / (b / norm_to) ** 2).sqrt()
        noise = randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
        sd = norm_to * sigma  # in x, where sigma is that of x_t
        x = b * (x - s * v) + (to**2 - sd**2).clamp(min=0).sqrt() * noise_in(x, v, s) + sd * noise
        return (x.to(sample.dtype),)


class FlowMatching:
    """What a pipeline with labels does otherwise where its model is a transformer of flow matching."""

    PREFIX = "transformer"

    def load_control(self, folder):
        """The same; ValueError where the adapter was made for the base with T5 and it is not there, or the other way round."""
        open_slot(self.transformer)
        without = json.loads((Path(folder) / "adapter.json").read_text()).get("base_files", {}).get("t5") is False
        if without != (self.text_encoder_3 is None):
            how = "with text_encoder_3=None, tokenizer_3=None" if without else "with its third text encoder"
            raise ValueError(f"{folder}: the adapter was made for its base {'without' if without else 'with'} T5: load the base {how}")
        return super().load_control(folder)

    def labelled_by(self, labels):
        """No keyword: the slot takes them from the transformer."""
        self.transformer.class_labels = labels
        return {}

    def scheduler_of(self, sampler):
        return MemorylessScheduler.from_config(self.scheduler.config)

    def sampler_settings(self, given):
        """The same, with the adapter's noise levels as `sigmas`; diffusers would tell the scheduler neither eta nor the generators."""
        settings = super().sampler_settings(given)
        self.scheduler.eta, self.scheduler.generator = settings.pop("eta"), settings.get("generator")
        if given.get("sigmas") is not None:
            warnings.warn("the images are of another law than the adapter was trained for: sigmas are given", stacklevel=3)
        elif given.get("num_inference_steps") in (None, self.control["sampler"]["num_steps"]):
            settings["sigmas"] = [t / self.scheduler.config.num_train_timesteps for t in self.control["sampler"]["timesteps"]]
        settings.pop("timesteps", None)  # of a quadratic spacing, which are these sigmas
        if given.get("timesteps") is not None:
            raise ValueError("timesteps are given: of a flow give sigmas, timesteps / 1000")
        return settings
