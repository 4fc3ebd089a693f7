"""Write a folder for the Hugging Face Hub: an adapter, or with --merge a copy of its base with the adapter in it, and a model card.

The label embedding stays a file of its own, and with it `label` and `strength`.
"""

import argparse
from pathlib import Path

from ctrl import base as bases
from ctrl import errors
from ctrl.adapter_files import read_described
from ctrl.export import export
from ctrl.hub import check_repository


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the trained adapter, such as results/.../adapters/ctrl")
    parser.add_argument("--repository", required=True, help="what it will be on the hub, owner/name: the card's example says so")
    parser.add_argument("--results", type=Path, help="folder of the finished experiment: its table and pictures go into the card")
    parser.add_argument("--merge", action="store_true", help="copy the base, with the LoRA added to its weights")
    parser.add_argument("--base", help="for --merge: the base's folder or name on the hub (default: the one in adapter.json)")
    parser.add_argument("--revision", help="for --merge: the commit of the base's repository")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="for --merge: of the copy")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    check_repository(args.repository)
    base = None
    if args.merge:
        described = read_described(args.adapter)
        if not args.base and not {"base", "base_files"} <= set(described):
            raise errors.UserError(f"{args.adapter / 'adapter.json'} does not say which base it is for: name it by --base")
        found = described.get("base_files", {})
        found = {key: found[key] for key in found if key == "t5" or not args.base}
        if args.revision:
            found = found | {"revision": args.revision}
        base = bases.load(args.base or described["base"], dtype=args.dtype, **found)
    export(args.adapter, args.output, args.repository, base, args.results)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file()) / 1e6
    print(f"{args.output}: {size:.1f} MB; python -m scripts.upload {args.output} --repository {args.repository}")


if __name__ == "__main__":
    errors.main(main)
