"""How near any control can come to the exact law with N sampling steps: the optimum itself, by dynamic programming in one dimension."""

import argparse
from pathlib import Path

import torch

from ctrl import base as bases
from ctrl.optimal import best_control, log_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("resources/mini-sd"), help="whose noise schedule; its images play no part")
    parser.add_argument("--interval", type=float, nargs=2, default=[0.3, 0.75], help="where the label holds; x_0 is N(0, 1)")
    parser.add_argument("--scale", type=float, default=0.03, help="of the classifier: score ~ Logistic(x_0, scale)")
    parser.add_argument("--gamma", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--num-steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--min-timestep", type=int, default=0, help="below, the control does not act")
    args = parser.parse_args()
    torch.set_num_threads(2)
    base, (low, high) = bases.load(args.base), args.interval
    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    inside = (grid >= low) & (grid < high)
    print("| steps | spacing | gamma | best accuracy | its KL / nats | exact accuracy | exact KL / nats |\n|" + " ---: |" * 7)
    for gamma in args.gamma:
        for spacing in ("scheduler", "quadratic"):
            for num_steps in args.num_steps:
                process = base.process(num_steps, 1.0, spacing)
                acts = [process.sigma(i) > 0 and t >= args.min_timestep for i, t in enumerate(process.timesteps.tolist())]
                best = best_control(process, lambda x: log_interval(x, low, high, args.scale), gamma, acts, grid)
                accuracy, exact = (best[law][inside].sum().item() for law in ("controlled", "exact"))
                print(
                    f"| {num_steps} | {spacing} | {gamma:g} | {accuracy:.3f} | {best['kl']:.2f} | {exact:.3f} | {best['exact_kl']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
