"""Check, before anything expensive runs, that the base and every other network that the configuration needs are there.

What is on the hub is fetched. Of the base's weights nothing is read, of CLIP's the headers alone but for that behind the distances, which
must know what will be drawn.
"""

import argparse
from pathlib import Path

from ctrl import aesthetic, brisque, clip, errors, features
from ctrl.base_files import find
from ctrl.io import shapes, write_json
from ctrl.names import COLUMN
from scripts.common import add_config_argument, load_config


def check_weights(config: dict) -> None:
    """UserError where weights that nobody but the user can fetch are missing, damaged or others: the aesthetic oracle's and BRISQUE's."""
    label, settings = config["label"], config["evaluation"]["brisque"]
    if "aesthetic" in oracles(label):
        weights = label["aesthetic"]
        aesthetic.load_converted(Path(weights["weights"]), weights["sha256"], "the aesthetic oracle", aesthetic.WHERE)
    if settings:
        brisque.load(settings)


def oracles(label: dict) -> list[str]:
    return [factor["oracle"] for factor in label["factors"] or [label]]


def clips(config: dict) -> dict[tuple[str, str | None], str]:
    """Each CLIP (model, pretrained) that the run takes beside evaluation.features, and the key of the configuration that asks for it."""
    label, classifier, score = config["label"], config["classifier"], config["evaluation"]["clip_score"]
    networks = [factor.get("network") or classifier["network"] for factor in label["factors"] or [label]]
    if any(name.startswith(COLUMN) for name in oracles(label)):
        networks.append(label["judge"]["network"])
    asked = [("label.aesthetic.clip", label["aesthetic"]["clip"])] if "aesthetic" in oracles(label) else []
    asked += [("classifier.clip", classifier["clip"])] if "clip" in networks else []
    found = {(one["model"], one["pretrained"]): key for key, one in asked}
    return found | ({features.clip_of(score): "evaluation.clip_score"} if score else {})


def fetch_clips(config: dict) -> None:
    """Fetches them into the cache, each once; of a file of weights the header is read. UserError where one cannot be had."""
    for (model, pretrained), key in clips(config).items():
        try:
            if file := clip.fetch(model, pretrained):
                shapes(file)
            if key == "evaluation.clip_score":
                features.tokenizer(model)
        except errors.UserError as error:
            raise errors.UserError(f"{key}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--output", type=Path, help="JSON file for what was found (default: it is printed alone)")
    args = parser.parse_args()
    config = load_config(args)
    check_weights(config)
    asked, size = config["base"], config["dataset"]["image_size"]
    source = find(asked["path"], asked["revision"], asked["variant"], asked["config"], asked["t5"])
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
    fetch_clips(config)
    if source.revision and source.revision != asked["revision"]:
        print(f"{source.name} is now at {source.revision}: give that as base.revision, and it stays the same model")
    if args.output:
        write_json(args.output, found)
    print(f"{source.name}: {found['kind']}, {found['prediction_type']}, {found['image_size']} pixels")


if __name__ == "__main__":
    errors.main(main)
