"""Draw images by one method of config/methods.tsv: a folder of PNGs with a table of prompts, labels, seeds and costs."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from ctrl import errors
from ctrl.base import Base
from ctrl.generate import denoised, generate, reject
from ctrl.image_folder import forget_parts, write_images
from ctrl.io import atomic_folder, read_json, write_json
from ctrl.pairs import SEED_OFFSETS, stream_of, table_of_subjects
from ctrl.tracking import run
from scripts.adapter_figures import figures_of_adapter
from scripts.cells import load_requests
from scripts.common import add_config_argument, contents, digest, load_config
from scripts.guided import method_denoiser, particle_draw, resampled_draw
from scripts.loading import load_base, load_method, load_oracle, strength_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--method", required=True, help="a row of --methods")
    parser.add_argument("--methods", type=Path, default=Path("config/methods.tsv"), help="table of methods (default: %(default)s)")
    parser.add_argument("--split", choices=list(SEED_OFFSETS), required=True, help="whose prompt templates and seeds")
    parser.add_argument("--per-subject", type=int, metavar="N", help="N images of each subject, without a label")
    parser.add_argument("--held-out", action="store_true", help="with --per-subject: of the subjects in prompts.held_out, too")
    parser.add_argument("--cells", type=Path, help="cells.json: ask for the (subject, label) pairs that it lists")
    parser.add_argument("--per-label", type=int, metavar="N", help="with --cells: N images a label")
    parser.add_argument("--adapter", type=Path, help="folder of the trained adapter, for a fine-tuned method")
    parser.add_argument("--strength", type=float, help="eps_pre + strength * (eps_psi - eps_pre) (default: the method's)")
    parser.add_argument("--classifier", type=Path, help="folder of the classifier, for a guided method")
    parser.add_argument("--tuning", type=Path, help="JSON of scripts/tune.py with the guidance scale, for a guided method")
    parser.add_argument("--dataset", type=Path, help="folder with report.json, whose bins the oracle uses, for rejection")
    parser.add_argument("--seed-offset", type=int, default=0, help="added to every seed: another offset, an independent set")
    parser.add_argument("--output", type=Path, required=True, help="folder to write: images/*.png, samples.parquet, samples.json")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    if (args.per_subject is None) == (args.cells is None) or (args.cells is None) != (args.per_label is None):
        parser.error("give either --per-subject, or --cells and --per-label")
    return args


NEEDS = {  # of a method's family, the arguments that it takes besides
    "finetune": ["adapter"],
    "cfg": ["adapter", "tuning"],
    "guidance": ["classifier", "tuning"],
    "particles": ["classifier"],
    "resampled": ["adapter", "classifier"],
    "rejection": ["dataset", "cells"],
}


def check_needs(method: pd.Series, args: argparse.Namespace) -> None:
    """UserError where an argument is missing that the method needs."""
    if missing := [f"--{name}" for name in NEEDS.get(method["family"], []) if getattr(args, name) is None]:
        raise errors.UserError(f"method {args.method} also needs {' and '.join(missing)}")


def table_of_rows(config: dict, args: argparse.Namespace, method: pd.Series, first_seed: int) -> pd.DataFrame:
    """The images to draw: columns prompt, subject, label, seed."""
    templates = config["prompts"]["templates"][args.split]
    if args.cells:
        beyond = args.split == "test" and method["family"] != "rejection"  # the pretrained model hardly draws what lies beyond
        return load_requests(args.cells, templates, args.per_label, first_seed, beyond, held_out=args.split == "test")
    subjects = config["prompts"]["subjects"] + (config["prompts"]["held_out"] if args.held_out else [])
    return table_of_subjects(subjects, templates, args.per_subject, first_seed)


def identity_of(config: dict, args: argparse.Namespace, method: pd.Series, rows: pd.DataFrame, base: Base) -> str:
    """What the images depend on, the device and the library's code too: a run that was cut off is gone on with where this is the same."""
    given = [path for path in (args.adapter, args.classifier, args.tuning, args.dataset and args.dataset / "report.json") if path]
    files = [file for path in given for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    read = contents([file for file in files if file.suffix in (".json", ".safetensors")])
    settings = {key: config[key] for key in ("seed", "base", "sampler", "particles", "candidates")} | {"gamma": config["finetune"]["gamma"]}
    code = contents(sorted(Path(errors.__file__).parent.rglob("*.py")))
    return digest(settings, method.to_dict(), args.strength, rows.to_json(), base.fingerprint(), base.device_name, read, code)


def main() -> None:
    args = parse()
    config, method = load_config(args), load_method(args.method, args.methods)
    check_needs(method, args)
    args.strength = strength_of(args.strength, method)
    base, process = load_base(config, args.num_threads)
    batch_size, first_seed = config["sampler"]["batch_size"], 100_000_000 * config["seed"] + SEED_OFFSETS[args.split] + args.seed_offset
    rows = table_of_rows(config, args, method, first_seed)
    make_denoiser, control = method_denoiser(method, base, process, config, args)
    draw = denoised(base, process, make_denoiser)
    if method["family"] == "particles":
        draw = particle_draw(base, process, config, args.classifier, method["guidance"])
    if method["family"] == "resampled":
        draw = resampled_draw(base, process, config, args)
    if method["family"] == "rejection":
        tolerance = read_json(args.dataset / "report.json").get("tolerance", 0.0)
        oracle, parts = load_oracle(args.dataset), [part for _, part in rows.groupby("prompt", sort=False)]

        def drawn(k: int) -> Iterable[tuple[Tensor, pd.DataFrame]]:
            return reject(base, parts[k], draw, batch_size, oracle, stream_of(first_seed, k), tolerance)
    else:
        parts = [rows.iloc[start : start + batch_size] for start in range(0, len(rows), batch_size)]

        def drawn(k: int) -> Iterable[tuple[Tensor, pd.DataFrame]]:
            return generate(base, parts[k], draw, batch_size)

    name = f"sample {args.output.name}" + (" (validation)" if args.split == "val" else "")
    with run(config, config["experiment"], name, {"method": args.method, "split": args.split}, config["mlflow"]["tracking_uri"]) as tracker:
        bar = tqdm(total=len(rows), desc=f"sampling {args.method}", unit="image")
        with atomic_folder(args.output, identity_of(config, args, method, rows, base)) as folder, bar:
            samples, peak = write_images(parts, drawn, folder, bar, base.peak_memory_mb)
            info = {"method": args.method, "n": len(samples), "peak_memory_mb": round(peak, 1), "device": base.device_name}
            if "effective_sample_size" in samples:  # of the particles, after each step
                info["effective_sample_size"] = np.mean(samples["effective_sample_size"].tolist(), axis=0).tolist()
            if control:
                info |= {"strength": args.strength} | figures_of_adapter(control, process, config, args, make_denoiser, samples)
            write_json(folder / "samples.json", info)
            forget_parts(folder)
        for step, size in enumerate(info.get("effective_sample_size", [])):
            tracker.log_metrics({"effective_sample_size": size}, step)
        tracker.log_metrics({name: samples[name].mean() for name in ("nfe_forward", "nfe_backward", "seconds")}, 0)
        tracker.log_artifact(args.output / "samples.parquet")


if __name__ == "__main__":
    errors.main(main, lower="sampler.batch_size (of methods with many particles an image also particles and candidates)")
