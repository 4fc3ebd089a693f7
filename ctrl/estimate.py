"""How long the long run will take: what the configuration asks for, times what one image and one update cost here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctrl.config import for_adapter
from ctrl.names import dial_of, split_strength, sweep_of

LEFT_OUT = (
    "Left out: the dataset, the classifier's training and cost, the evaluations, probes, figures; and labels rarer than one in as many as "
    "there are and continuous ones, for which rejection draws longer. Costs grow in proportion to the batch here; a GPU is faster."
)


@dataclass(frozen=True)
class Job:
    """A job of the long run, the file (in results/{experiment}) that it leaves, and its seconds."""

    name: str
    output: str
    seconds: float


def image_cost(method: Mapping, config: Mapping) -> tuple[str, float]:
    """What an image of a row of methods.tsv costs, and how many of these.

    `plain`, `guided` (with a gradient) or `weighed` (with a look of the classifier at every step).
    """
    particles, labels = config["particles"], config["label"]["num_classes"]
    factor = {"rejection": labels, "particles": particles, "resampled": 2 * config["candidates"], "cfg": 2}.get(method["family"], 1)
    return {"guidance": "guided", "particles": "weighed"}.get(method["family"], "plain"), factor


def jobs(config: dict, methods: Sequence[Mapping], image: Mapping[str, float], update: Mapping[str, float], start: float) -> list[Job]:
    """All jobs of the long run that draw images or train.

    `image` has the seconds of each kind of image (see `image_cost`), `update` those of an update of every adapter in `adapters_of`, `start`
    what starting a job takes.
    """
    by_name = {m["method"]: m for m in methods}
    subjects, labels = len(config["prompts"]["subjects"]), config["label"]["num_classes"]
    num_images = config["evaluation"]["images_per_label"] * labels
    num_test = config["evaluation"]["images_per_label"] * (labels + 2 * (config["label"]["kind"] == "continuous"))  # also beyond the range

    def draw(name: str, output: str, num: int, method: Mapping) -> Job:
        kind, factor = image_cost(method, config)
        return Job(name, output, start + num * factor * image[kind])

    plain = {"family": "pretrained"}
    found = [
        draw(
            "images of the pretrained model",
            "pool/samples.parquet",
            config["pool"]["images_per_subject"] * (subjects + len(config["prompts"]["held_out"])),
            plain,
        )
    ]
    if config["dataset"]["kind"] == "generated":
        found.append(draw("the dataset's images", "generated/samples.parquet", config["dataset"]["num_generated"], plain))
    for adapter in adapters_of(config, methods):
        seconds = for_adapter(config, adapter)["finetune"]["num_updates"] * update[adapter]
        found.append(Job(f"train {adapter}", f"adapters/{adapter}/adapter.json", start + seconds))
    for name, method in by_name.items():
        if scales := config["tuning"].get(method["guidance"], {}):
            num = config["tuning"]["num_images"] * len(scales["scale"])
            found.append(draw(f"tune {name}", f"tuning/{method['guidance']}.json", num, method))
        num = num_images if method["family"] == "rejection" else num_test
        found.append(draw(f"sample {name}", f"samples/{name}/samples.parquet", num, method))
    rejection = {"family": "rejection"}
    for folder in ("samples/rejection_reference", "samples_val/rejection"):
        found.append(draw(f"sample {folder}", f"{folder}/samples.parquet", num_images, rejection))
    for adapter in sweep_of(config):
        found.append(draw(f"sample samples_val/{adapter}", f"samples_val/{adapter}/samples.parquet", num_images, plain))
    for name in dial_of(config):
        if name not in sweep_of(config):
            strength = float(split_strength(name)[1].get("strength", 1))
            num = num_images * (1 if strength in (0, 1) else 2)  # others take both models
            found.append(draw(f"sample samples_val/{name}", f"samples_val/{name}/samples.parquet", num, plain))
    return found


def adapters_of(config: Mapping, methods: Sequence[Mapping]) -> list[str]:
    """Every adapter that the long run trains."""
    return list(dict.fromkeys([*(m["adapter"] for m in methods if m["adapter"]), *sweep_of(config)]))


def duration(seconds: float) -> str:
    """`1 h 05 min`, `12 min` or `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
