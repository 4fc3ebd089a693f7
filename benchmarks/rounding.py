"""What a lower precision puts into the path KL: the KL of an adapter's trajectories, with eps in float32, TF32 and bfloat16.

TF32 and bfloat16 are imitated on any machine: what goes into each convolution and product of the UNet, weights too, is rounded to 10 or 7
bits of mantissa, and for bfloat16 what comes out as well. The trajectories are those of float32. `kl_of_rounding` is the KL that two
policies would have whose only difference is what rounding changed in eps_psi - eps_pre: 0 without rounding, and it grows with the number
of latent dimensions and the square of the prompt's guidance.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, or as a module

from ctrl import base as bases
from ctrl import control as controls
from ctrl import errors
from ctrl.io import read_json
from ctrl.sampling import noise_of

MANTISSA = {"TF32": 10, "bfloat16": 7}  # bits


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """A float32 tensor, to the nearest with so many bits of mantissa."""
    dropped = 23 - bits
    whole = tensor.detach().contiguous().view(torch.int32)
    return ((whole + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)


@contextmanager
def computed_with(unet: nn.Module, bits: int, outputs: bool) -> Iterator[None]:
    """Inside, what goes into the UNet's convolutions and products has so many bits of mantissa, and with `outputs` what comes out."""
    hooks, weights = [], {}
    for module in unet.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            weights[module] = module.weight.data
            module.weight.data = rounded(module.weight.data, bits)
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], bits), *inputs[1:])))
            if outputs:
                hooks.append(module.register_forward_hook(lambda _, inputs, output: rounded(output, bits)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in weights.items():
            module.weight.data = weight


@torch.no_grad()
def measure(base: bases.Base, control: controls.Control, prompts: list[str], guidance_scale: float, num_steps: int) -> list[dict]:
    """A row for each precision: KLs in nats, the mean over a trajectory of each of the prompts, which take the labels in turn."""
    process, labels = base.process(num_steps), torch.arange(len(prompts)) % control.null
    psi, pre = control.denoiser(process, prompts, labels, guidance_scale), control.base_denoiser(process, prompts, guidance_scale)
    noise, path, active = noise_of(range(len(prompts)), base.latent_shape, num_steps), [], control.active(process)
    x, common = noise[0], {"guidance_scale": guidance_scale, "num_steps": num_steps, "n": len(prompts)}
    common |= {"num_dimensions": x[0].numel(), "kl_nats": 0.0, "kl_of_rounding": 0.0}
    rows = [{"precision": "float32", **common}]
    for i in range(num_steps):
        eps = eps_pre = pre(x, i)
        if active[i]:
            eps = psi(x, i)
            path.append((i, x, eps - eps_pre))
            rows[0]["kl_nats"] += process.kl(i, eps, eps_pre).mean().item()
        x = process.step(i, x, eps, noise[i + 1])
    for name, bits in MANTISSA.items():
        row = {"precision": name, **common}
        with computed_with(base.network, bits, name == "bfloat16"):
            for i, x_t, shift in path:
                eps, eps_pre = psi(x_t, i), pre(x_t, i)
                row["kl_nats"] += process.kl(i, eps, eps_pre).mean().item()
                row["kl_of_rounding"] += process.kl(i, eps - eps_pre, shift).mean().item()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a trained adapter, of labels that are classes of one factor")
    parser.add_argument("--prompts", nargs="+", default=["a coat", "a sneaker", "a bag", "a dress"], help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=16, help="trajectories of each prompt (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0, 7.5], help="of the prompt (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[10, 50], help="(default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    base = bases.load(read_json(args.adapter / "adapter.json")["base"])
    control = controls.load(base, args.adapter)
    if not isinstance(control.null, int):
        raise errors.UserError(f"--adapter {args.adapter}: its labels are not the classes of one factor")
    settings = [(scale, number) for scale in args.guidance_scale for number in args.num_steps]
    rows = [row for setting in settings for row in measure(base, control, args.prompts * args.repeats, *setting)]
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    errors.main(main)
