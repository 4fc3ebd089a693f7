"""Check, before anything expensive runs, that the base is there, and a network behind the distances that knows what will be drawn.

What is on the hub is fetched. The base's weights are not loaded.
"""

import argparse
from pathlib import Path

from ctrl import errors, features
from ctrl.base_files import find
from ctrl.io import write_json
from scripts.common import add_config_argument, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--output", type=Path, help="JSON file for what was found (default: it is printed alone)")
    args = parser.parse_args()
    config = load_config(args)
    asked, size = config["base"], config["dataset"]["image_size"]
    source = find(asked["path"], asked["revision"], asked["variant"], asked["config"])
    found = source.described()
    if (drawn := found["image_size"]) != size:
        raise errors.UserError(f"dataset.image_size is {size}, but {source.name} draws {drawn} pixels: give images of that size")
    subjects = [*config["prompts"]["subjects"], *config["prompts"]["held_out"]]
    known = features.load(config["evaluation"]["features"]).subjects
    if known and (strange := [subject for subject in subjects if subject not in known]):
        raise errors.UserError(
            f"evaluation.features is {config['evaluation']['features']}, which does not know {strange[0]!r} of prompts; set it to clip, "
            "which takes any prompt"
        )
    if source.revision and source.revision != asked["revision"]:
        print(f"{source.name} is now at {source.revision}: give that as base.revision, and it stays the same model")
    if args.output:
        write_json(args.output, found)
    print(f"{source.name}: {found['kind']}, {found['prediction_type']}, {found['image_size']} pixels")


if __name__ == "__main__":
    errors.main(main)
