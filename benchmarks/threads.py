"""What CPU threads are worth: one training with all of them, against two side by side with half of them each.

Each is an update of the embedded default by `ctrl` on the embedded base, in a process of its own; an untrained classifier costs as much as
a trained one. `throughput` is how many times as many updates a second two jobs do together. Start it on a machine that does nothing else.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, or as a module

from ctrl import classifier as classifiers
from ctrl import errors
from ctrl.finetune.task import Task
from ctrl.labels import Factors
from ctrl.measure import update_seconds
from scripts.common import add_config_argument, cores_of, load_config
from scripts.loading import load_base, log_prob_of_latents, new_control

UNTRAINED = {"network": "dct", "head": "density", "num_classes": 4, "descending": True, "edges": [0.9, 1.1, 1.3]}


def measure(config: dict, num_threads: int, repeats: int) -> float:
    """Seconds an update with so many threads."""
    torch.set_num_threads(num_threads)
    base, process = load_base(config, num_threads)
    control = new_control(base, process, Factors.of(4), config)
    cells = [(subject, y) for subject in config["prompts"]["subjects"] for y in range(4)]
    task = Task(control, process, cells, config["prompts"]["templates"]["train"], config["sampler"]["guidance_scale"], config["seed"])
    log_prob = log_prob_of_latents(base, classifiers.new(UNTRAINED).eval().requires_grad_(False))
    return update_seconds(task, log_prob, config["finetune"], config["finetune"]["micro_batch_size"], repeats)


def at_once(number: int, *arguments: object) -> list[float]:
    """`measure` in so many processes side by side."""
    with ProcessPoolExecutor(number, multiprocessing.get_context("spawn")) as pool:
        return [job.result() for job in [pool.submit(measure, *arguments) for _ in range(number)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_argument(parser)
    parser.add_argument("--cores", type=cores_of, default="all", help="CPU threads in all (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="updates timed, long and short ones each (default: %(default)s)")
    args = parser.parse_args()
    if args.cores < 2 or args.repeats < 1:
        raise errors.UserError("--cores must be 2 or more, to be shared by two; --repeats 1 or more")
    config = load_config(args)
    (alone,), pair = at_once(1, config, args.cores, args.repeats), at_once(2, config, args.cores // 2, args.repeats)
    both = sum(pair) / len(pair)
    print(f"{'jobs':>4} {'threads each':>12} {'s / update':>10} {'updates / s':>11}")
    print(f"{1:>4} {args.cores:>12} {alone:>10.3f} {1 / alone:>11.3f}")
    print(f"{2:>4} {args.cores // 2:>12} {both:>10.3f} {2 / both:>11.3f}")
    print(f"throughput {2 * alone / both:.2f}, n = {args.repeats} updates of each kind")


if __name__ == "__main__":
    errors.main(main)
