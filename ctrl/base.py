"""A pretrained model of the Stable Diffusion family: prompts to conditions, noise prediction, latents to images.

Where it is a transformer of flow matching (Stable Diffusion 3), `eps` and `process` speak of it in the words of diffusion (ctrl/flow.py).
"""

import hashlib
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ctrl.base_files import FLOW, Source, find, load_pipeline, part_of
from ctrl.flow import noise_in, open_slot, scales
from ctrl.process import Denoiser, Process, quadratic_timesteps

ENCODED_PIXELS = 2**18  # that go through the VAE at a time: one image of 512 x 512
Condition = dict[str, Tensor | dict[str, Tensor]]  # the network's keyword arguments that say what to draw


@dataclass
class Passes:
    """How many images went through the network, forward and backward."""

    forward: int = 0
    backward: int = 0


@dataclass
class Base:
    """The frozen pipeline, where it came from, and a count of its network's passes. `latent_shape` is (C, h, w)."""

    pipe: DiffusionPipeline
    source: Source
    passes: Passes = field(default_factory=Passes)
    _text: dict[str | None, tuple[Tensor, ...]] = field(default_factory=dict)

    def __post_init__(self):
        if self.flow:
            open_slot(self.network)

    @property
    def flow(self) -> bool:
        """Whether it predicts the velocity of flow matching."""
        return self.source.kind in FLOW

    @property
    def part(self) -> str:
        """What diffusers calls the network that predicts."""
        return part_of(self.source.kind)

    @property
    def network(self) -> torch.nn.Module:
        return getattr(self.pipe, self.part)

    @property
    def time_width(self) -> int:
        """The length of the embedding of the time, to which that of the label is added."""
        return self.network.inner_dim if self.flow else self.network.time_embedding.linear_2.out_features

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parameter.dtype

    @property
    def _parameter(self) -> torch.nn.Parameter:
        """The network's first: it tells device and type at once, where diffusers' own properties walk through all modules at every pass."""
        return next(self.network.parameters())

    def to_float32(self) -> "Base":
        """The same weights in float32, for good; what was encoded of prompts is forgotten. Returns itself."""
        if self.dtype != torch.float32:
            self.pipe.to(torch.float32)
            self._text.clear()
        return self

    @property
    def device_name(self) -> str:
        """What a measured time or memory was measured on."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

    def peak_memory_mb(self) -> float:
        """The most memory that this process held at any time: of the GPU where the model is on one, else of the machine."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.network.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def process(self, num_steps: int, eta: float = 1.0, spacing: str = "scheduler") -> Process:
        """The reverse process on `num_steps` of the training steps, spaced as the folder's scheduler says, or `quadratic`.

        The last quadratic step goes all the way to an image without noise: diffusers' DDPM, which takes any timesteps, does that. So does
        the last one of a flow, whose timesteps are 1000 s and no whole numbers.
        """
        if self.flow:
            return self._flow_process(num_steps, eta, spacing)
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        if spacing == "quadratic":
            timesteps = quadratic_timesteps(num_steps, len(scheduler.alphas_cumprod))
            return Process.from_alphas(scheduler.alphas_cumprod, timesteps, 1.0, eta)
        scheduler.set_timesteps(num_steps)
        alphas, timesteps, final = scheduler.alphas_cumprod, scheduler.timesteps.cpu(), float(scheduler.final_alpha_cumprod)
        return Process.from_alphas(alphas, timesteps, final, eta, stride=len(alphas) // num_steps)

    def _flow_process(self, num_steps: int, eta: float, spacing: str) -> Process:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_steps)
        timesteps, num_train = scheduler.timesteps, scheduler.config.num_train_timesteps
        if spacing == "quadratic":
            timesteps = quadratic_timesteps(num_steps, num_train).float() + 1
        a, norm = scales(timesteps.double() / num_train)
        abar = (a / norm).square()
        return Process(timesteps, abar, torch.cat([abar[1:], abar.new_ones(1)]), eta, flow=True)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str | None]) -> Condition:
        """What the network is told of B prompts: text embeddings (B, L, D), of SDXL and SD3 pooled ones (B, P), and of SDXL the picture's
        measures (B, 6).

        Each distinct prompt is encoded once. None is where prompt guidance starts from: the empty prompt, or zeros if the model's folder
        says `force_zeros_for_empty_prompt`.
        """
        if missing := [p for p in dict.fromkeys(prompts) if p not in self._text]:
            text, _, *pooled = self.pipe.encode_prompt(
                [p or "" for p in missing], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False,
                **({"prompt_2": None, "prompt_3": None} if self.flow else {}),
            )  # fmt: skip
            self._text |= dict(zip(missing, zip(text, *pooled[:1], strict=True), strict=True))
            if None in missing and self.pipe.config.get("force_zeros_for_empty_prompt"):
                self._text[None] = tuple(map(torch.zeros_like, self._text[None]))
        text, *pooled = (torch.stack(part).to(self.dtype) for part in zip(*(self._text[p] for p in prompts), strict=True))
        if not pooled:
            return {"encoder_hidden_states": text}
        if self.flow:
            return {"encoder_hidden_states": text, "pooled_projections": pooled[0]}
        height, width = (size * self.pipe.vae_scale_factor for size in self.latent_shape[1:])
        measures = text.new_tensor([height, width, 0, 0, height, width]).expand(len(text), 6)  # size, corner of the crop, size asked for
        return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": measures}}

    def eps(self, x_t: Tensor, t: Tensor, condition: Condition, class_labels: Tensor | None = None) -> Tensor:
        """One pass of the network: the predicted noise with shape (B, C, h, w), whatever it predicts: eps, v, or a flow's velocity."""
        self.passes.forward += len(x_t)
        scheduler, x, labels = self.pipe.scheduler, x_t, {"class_labels": class_labels}
        if self.flow:
            s = (t.to(x_t) / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
            x, self.network.class_labels, labels = scales(s)[1] * x_t, class_labels, {}
        out = self.network(x.to(self.dtype), timestep=t, **condition, **labels, return_dict=False)[0].to(x_t.dtype)
        if out.requires_grad:
            out.register_hook(self._count_backward)
        if self.flow:
            return noise_in(x, out, s)
        if scheduler.config.prediction_type == "v_prediction":
            abar = scheduler.alphas_cumprod.to(x_t.device)[t].view(-1, 1, 1, 1).to(x_t.dtype)
            return abar.sqrt() * out + (1 - abar).sqrt() * x_t
        return out

    def _count_backward(self, grad: Tensor) -> None:
        self.passes.backward += len(grad)

    def guided(
        self, process: Process, prompts: Sequence[str | None], guidance_scale: float, labels: Tensor | None, null: int | None
    ) -> Denoiser:
        """eps(∅, ∅) + guidance_scale · (eps(c, y) − eps(∅, ∅)), both in one batch; at a scale of 1 only eps(c, y) is computed.

        `labels` go to the network's class embedding, `null` is its row for ∅; both are None for one without. The two rows of an image
        lie side by side, so that a half of the images is a half of the batch.
        """
        if guidance_scale == 1:
            condition = self.encode(prompts)
            return lambda x_t, i: self.eps(x_t, process.timesteps[i].expand(len(x_t)).to(x_t.device), condition, labels)
        condition = self.encode([each for prompt in prompts for each in (None, prompt)])
        labels = None if labels is None else torch.stack([torch.full_like(labels, null), labels], 1).flatten()

        def denoiser(x_t: Tensor, i: int | Tensor) -> Tensor:
            t = process.timesteps[i].expand(len(x_t)).to(x_t.device)
            eps = self.eps(x_t.repeat_interleave(2, 0), t.repeat_interleave(2), condition, labels)
            empty, prompted = eps.unflatten(0, (-1, 2)).unbind(1)
            return empty + guidance_scale * (prompted - empty)

        return denoiser

    def denoiser(self, process: Process, prompts: Sequence[str], guidance_scale: float = 1.0) -> Denoiser:
        """The pretrained model, with its prompt guidance."""
        return self.guided(process, prompts, guidance_scale, None, None)

    def synchronize(self) -> None:
        """Waits until all that was asked of the GPU is done, before a clock is read; nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def decode(self, x_0: Tensor) -> Tensor:
        """Images, nominally in [-1, 1] but not clamped, with shape (B, 3, H, W), from latents; differentiable."""
        vae = self.pipe.vae
        return vae.decode(x_0.to(vae.dtype) / vae.config.scaling_factor + self._shift, return_dict=False)[0].to(x_0.dtype)

    @property
    def _shift(self) -> float:
        """What the VAE's latents have for a mean, where its folder says so."""
        return self.pipe.vae.config.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode_images(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """Latents with shape (N, C, h, w) of uint8 images with shape (N, 3, H, W): the posterior's mean, scaled.

        `batch_size` images go through the VAE at a time; None: as many as have ENCODED_PIXELS together.
        """
        vae, size = self.pipe.vae, batch_size or max(1, ENCODED_PIXELS // (images.shape[-1] * images.shape[-2]))
        parts = [vae.encode((part / 127.5 - 1).to(self.device, vae.dtype)).latent_dist.mean for part in images.split(size)]
        return (torch.cat(parts).float() - self._shift) * vae.config.scaling_factor

    def fingerprint(self, dtype: torch.dtype = torch.float16) -> str:
        """Short hash of the network's weights: of the first values of each tensor, rounded to `dtype`.

        Weights loaded in float32 and in `dtype` have the same one, so that of float16 and that of bfloat16 tell a base in every precision.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            if "lora_" in name or name.startswith("class_embedding."):
                continue
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.flatten()[:256].to(dtype).cpu().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


def load(
    path: str | Path, revision: str | None = None, dtype: str | torch.dtype = "float32", device: str = "cpu", variant: str | None = None,
    config: str | None = None, t5: bool = True,
) -> Base:  # fmt: skip
    """Loads a diffusers folder, a name on the hub, or one file of weights, frozen; for the arguments see `base_files.find`.

    Raises UserError where it is missing, broken, or of another kind than SD 1.x, 2.x, 3.x and SDXL.
    """
    source = find(path, revision, variant, config, t5)
    pipe = load_pipeline(source, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.float()  # it overflows in half precision, as its folder says
    return Base(pipe.to(device), source)
