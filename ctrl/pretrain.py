"""Pretraining of a Stable Diffusion in miniature: tokenizer, text encoder, VAE and UNet, saved as a diffusers folder.

Latent diffusion as in Rombach et al., CVPR 2022 (arXiv 2112.10752); min-SNR loss weights of Hang et al., ICCV 2023 (arXiv 2303.09556).
"""

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ctrl.dct import block_dct
from ctrl.errors import UserError

MAX_TOKENS = 16


def build_tokenizer(prompts: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is all bytes and the words of `prompts`, one token a word; its files go to `folder`."""
    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in sorted({word for prompt in prompts for word in prompt.replace("-", " - ").split()}):
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            if (pair := (symbols[0], symbols[1])) not in merges:
                merges.append(pair)
            symbols[:2] = ["".join(pair)]
    tokens = dict.fromkeys([*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)])
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(vocab_size: int, eos_token_id: int, config: dict) -> CLIPTextModel:
    """A small CLIP text encoder; `config` holds width, layers and heads."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=config["width"],
            intermediate_size=4 * config["width"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            max_position_embeddings=MAX_TOKENS,
            projection_dim=config["width"],
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
            bos_token_id=eos_token_id - 1,
        )
    )


def build_vae(config: dict, image_size: int) -> AutoencoderKL:
    """AutoencoderKL with one halving between consecutive `channels`.

    The last convolution starts with equal rows for R, G and B: on grey images their gradients are equal too, so grey stays grey.
    """
    n = len(config["channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=tuple(config["channels"]),
        layers_per_block=1,
        latent_channels=config["latent_channels"],
        norm_num_groups=16,
        sample_size=image_size,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.copy_(vae.decoder.conv_out.weight[:1].expand_as(vae.decoder.conv_out.weight))
        vae.decoder.conv_out.bias.zero_()
    return vae


def build_unet(config: dict, text_width: int, latent_channels: int, latent_size: int) -> UNet2DConditionModel:
    """UNet with text cross-attention everywhere but at full resolution; the time embedding scales and shifts (AdaGN)."""
    n = len(config["channels"])
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(config["channels"]),
        layers_per_block=config["layers_per_block"],
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (n - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (n - 1) + ("UpBlock2D",),
        cross_attention_dim=text_width,
        attention_head_dim=config["heads"],
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
    )


def vae_loss(images: Tensor, decoded: Tensor, kl: Tensor, config: dict) -> Tensor:
    """L1 on pixels, on their finite differences, on log-magnitudes of block DCTs (texture) and on their means over an image's blocks
    (texture statistics: they keep the energy that an L1 loss smooths away), and the latents' KL; a scalar."""
    pixel = F.l1_loss(decoded, images)
    gradient = F.l1_loss(decoded.diff(dim=2), images.diff(dim=2)) + F.l1_loss(decoded.diff(dim=3), images.diff(dim=3))
    log_dct = [torch.log2(1 + block_dct(x).abs()) for x in (decoded, images)]
    texture = F.l1_loss(log_dct[0], log_dct[1])
    statistics = F.l1_loss(log_dct[0].mean(dim=1), log_dct[1].mean(dim=1))
    texture = config["texture_weight"] * texture + config["statistics_weight"] * statistics
    return pixel + config["gradient_weight"] * gradient + texture + config["kl_weight"] * kl.mean()


def cosine(step: int, num_steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


class Checkpoint:
    """All that a loop needs to go on where it stopped, in one safetensors file written atomically."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, generator: torch.Generator):
        self.path, self.modules, self.optimizer, self.generator = path, modules, optimizer, generator

    def save(self, step: int) -> None:
        state = {f"{name}/{k}": v.contiguous() for name, m in self.modules.items() for k, v in m.state_dict().items()}
        for i, s in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{i}/{k}": v for k, v in s.items()}
        state |= {"generator": self.generator.get_state(), "step": torch.tensor(step)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def load(self) -> int:
        """Restores the last saved state, if there is one; returns the number of steps that are done."""
        if not self.path.exists():
            return 0
        state = load_file(self.path)
        for name, module in self.modules.items():
            module.load_state_dict({k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")})
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, i, name = key.split("/")
                optimizer.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": optimizer})
        self.generator.set_state(state["generator"].cpu())
        return int(state["step"])


def run_loop(loss_at: Callable[[int], Tensor], checkpoint: Checkpoint, config: dict, after_step=lambda: None, log=None, label="") -> None:
    """AdamW with warm-up, cosine decay and clipping; resumes from `checkpoint` and saves it every `checkpoint_every` steps."""
    optimizer, num_steps = checkpoint.optimizer, config["num_steps"]
    done, started, losses = checkpoint.load(), time.monotonic(), []
    for step in tqdm(range(done, num_steps), initial=done, total=num_steps, desc=label, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = config["learning_rate"] * cosine(step, num_steps)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        after_step()
        losses.append(loss.detach())
        last = step + 1 == num_steps
        logs, saves = (step + 1) % 100 == 0 or last, (step + 1) % config["checkpoint_every"] == 0 or last
        # Asked for rarely, since the answer waits for the GPU, and before any checkpoint.
        if (logs or saves) and not math.isfinite(mean := torch.stack(losses).mean().item()):
            raise UserError(f"{label}: the loss is {mean} at step {step + 1}; lower learning_rate, now {config['learning_rate']}")
        if logs:
            if log:
                log({"stage": label, "step": step + 1, "loss": mean, "seconds": time.monotonic() - started})
            losses = []
        if saves:
            checkpoint.save(step + 1)


def train_vae(vae: AutoencoderKL, images: Tensor, config: dict, folder: Path, seed: int, log=None, stage: str = "vae") -> None:
    """Trains `vae` in place on `images`, uint8 with shape (N, 3, H, W), and sets its `scaling_factor` to 1 / std of the latents.

    Stage "decoder" leaves the encoder, and so the latents, as they are. It also ties the rows of the last convolution for R, G and B.
    Random numbers are drawn on the CPU, here and below, so that a seed means the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    device = images.device
    if stage == "decoder":
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["learning_rate"], betas=(0.9, 0.99), weight_decay=0.0)

    def loss_at(step: int) -> Tensor:
        batch = images[torch.randint(len(images), (config["batch_size"],), generator=generator).to(device)].float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=config["bf16"]):
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean(dim=(1, 2, 3))
        return vae_loss(batch, decoded.float(), kl, config)

    def tie() -> None:
        last = vae.decoder.conv_out
        with torch.no_grad():
            last.weight.copy_(last.weight.mean(dim=0, keepdim=True).expand_as(last.weight))
            last.bias.copy_(last.bias.mean().expand_as(last.bias))

    checkpoint = Checkpoint(folder / f"{stage}.safetensors", {"vae": vae}, optimizer, generator)
    run_loop(loss_at, checkpoint, config, tie if stage == "decoder" else lambda: None, log, stage)
    mean, std = encode_images(vae, images[:4096])
    vae.register_to_config(scaling_factor=float(1 / (mean.square() + std.square()).mean().sqrt()))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of uint8 `images`, each with shape (N, C, h, w), before scaling."""
    means, stds = [], []
    for batch in images.split(batch_size):
        posterior = vae.encode(batch.float() / 127.5 - 1).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


class Prediction(nn.Module):
    """The UNet from tensors to a tensor: x_t (B, C, h, w), t (B,), text (B, L, D) to the predicted noise (B, C, h, w)."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(x_t, t, text, return_dict=False)[0]


def captured(unet: UNet2DConditionModel, x_t: Tensor, t: Tensor, text: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`unet` for inputs of these shapes; on a GPU its passes forward and back are CUDA graphs.

    A network this small is done with a layer sooner than Python launches the next: without graphs the GPU waits most of the time.
    """
    prediction = Prediction(unet)
    return torch.cuda.make_graphed_callables(prediction, (x_t, t, text)) if unet.device.type == "cuda" else prediction


def example_batch(unet: UNet2DConditionModel, tokens: Tensor, batch_size: int, text_width: int, trains_text: bool) -> tuple[Tensor, ...]:
    """Inputs of the right shapes to capture `unet` with."""
    config, device = unet.config, unet.device
    x_t = torch.zeros(batch_size, config.in_channels, config.sample_size, config.sample_size, device=device)
    text = torch.zeros(batch_size, tokens.shape[-1], text_width, device=device, requires_grad=trains_text)
    return x_t, torch.zeros(batch_size, dtype=torch.long, device=device), text


def train_unet(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, latents: tuple[Tensor, Tensor], tokens: Tensor, scheduler: DDIMScheduler,
    config: dict, folder: Path, seed: int, log=None,
) -> None:  # fmt: skip
    """Trains `unet` and `text_encoder` in place to predict the noise, and leaves their exponential moving average in them.

    `latents` are mean and std with shape (N, C, h, w), scaled; `tokens` the token ids of every prompt of every image with shape
    (N, P, L) where row P-1 is the empty prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    width = text_encoder.config.hidden_size
    predict = captured(unet, *example_batch(unet, tokens, config["batch_size"], width, trains_text=True))

    def loss_at(step: int) -> Tensor:
        x_t, t, noise, prompts, inverse, weight = denoising_batch(generator, latents, tokens, scheduler, config)
        eps = predict(x_t, t, text_encoder(prompts)[0][inverse])
        return (weight * (eps - noise).square().mean(dim=(1, 2, 3))).mean()

    run_averaged(nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}), loss_at, generator, config, folder, "unet", log)


def distill_guidance(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, latents: tuple[Tensor, Tensor], tokens: Tensor, scheduler: DDIMScheduler,
    config: dict, folder: Path, seed: int, log=None,
) -> None:  # fmt: skip
    """Trains `unet` in place to predict in one pass what it predicts now under prompt guidance at `guidance_scale`, which takes two.

    Guidance distillation at one scale (Meng et al., CVPR 2023, arXiv 2210.03142). The empty prompt keeps its meaning. Shapes as in
    `train_unet`.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(unet).requires_grad_(False)
    with torch.no_grad():
        empty = text_encoder(tokens[:1, -1].to(unet.device))[0]
    predict = captured(unet, *example_batch(unet, tokens, config["batch_size"], empty.shape[-1], trains_text=False))

    def loss_at(step: int) -> Tensor:
        x_t, t, _, prompts, inverse, weight = denoising_batch(generator, latents, tokens, scheduler, config)
        with torch.no_grad():
            text = text_encoder(prompts)[0][inverse]
            both = torch.cat([empty.expand_as(text), text])
            unprompted, prompted = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both).sample.chunk(2)
            target = unprompted + config["guidance_scale"] * (prompted - unprompted)
        return (weight * (predict(x_t, t, text) - target).square().mean(dim=(1, 2, 3))).mean()

    run_averaged(nn.ModuleDict({"unet": unet}), loss_at, generator, config, folder, "guidance", log)


def denoising_batch(
    generator: torch.Generator, latents: tuple[Tensor, Tensor], tokens: Tensor, scheduler: DDIMScheduler, config: dict
) -> tuple[Tensor, ...]:
    """x_t (B, C, h, w), t (B,), the noise, the distinct prompts' token ids, each image's row in them, and the loss weights (B,)."""
    (mean, std), abar, size, empty = latents, scheduler.alphas_cumprod, config["batch_size"], tokens.shape[1] - 1
    device = mean.device
    i = torch.randint(len(mean), (size,), generator=generator)
    which = torch.randint(empty, (size,), generator=generator)
    which[torch.rand(size, generator=generator) < config["prompt_dropout"]] = empty
    prompts, inverse = tokens[i, which].unique(dim=0, return_inverse=True)
    t = torch.randint(len(abar), (size,), generator=generator)
    spread, noise = torch.randn((2, size, *mean.shape[1:]), generator=generator).to(device)
    weight = (config["min_snr_gamma"] * (1 - abar[t]) / abar[t]).clamp(max=1)
    a, i = abar[t].view(-1, 1, 1, 1).to(device), i.to(device)
    x_t = a.sqrt() * (mean[i] + std[i] * spread) + (1 - a).sqrt() * noise
    return x_t, t.to(device), noise, prompts.to(device), inverse.to(device), weight.to(device)


def run_averaged(
    modules: nn.ModuleDict, loss_at: Callable[[int], Tensor], generator: torch.Generator, config: dict, folder: Path, stage: str, log=None
) -> None:
    """Trains `modules` in place and leaves their exponential moving average in them."""
    average = torch.optim.swa_utils.AveragedModel(modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config["ema_decay"]))
    fused = next(modules.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(modules.parameters(), lr=config["learning_rate"], betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    checkpoint = Checkpoint(folder / f"{stage}.safetensors", {"both": modules, "average": average}, optimizer, generator)
    run_loop(loss_at, checkpoint, config, lambda: average.update_parameters(modules), log, stage)
    modules.load_state_dict(average.module.state_dict())


def save_pipeline(folder: Path, vae, text_encoder, tokenizer, unet, scheduler) -> None:
    """Writes an ordinary Stable Diffusion folder."""
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
