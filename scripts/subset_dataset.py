"""Cut an offline dataset to fewer labelled images: with the bins of the whole, and each subset part of every larger one."""

import argparse
from pathlib import Path

from ctrl import errors, io
from ctrl.subset import digests_of, subset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with metadata.parquet and report.json")
    parser.add_argument("--size", type=int, required=True, metavar="N", help="images of the training split; the others keep the same share")
    parser.add_argument("--output", type=Path, required=True, help="folder for metadata.parquet and report.json")
    args = parser.parse_args()
    table, report = io.read_parquet(args.dataset / "metadata.parquet"), io.read_json(args.dataset / "report.json")
    chosen, described = subset(table, report, args.size, digests_of(table))
    with io.atomic_folder(args.output) as folder:
        io.write_parquet(folder / "metadata.parquet", chosen)
        io.write_json(folder / "report.json", described)
    counts = {split: sum(numbers) for split, numbers in described["counts"].items()}
    print(f"{args.output}: " + ", ".join(f"{n} {split}" for split, n in counts.items()))


if __name__ == "__main__":
    errors.main(main)
