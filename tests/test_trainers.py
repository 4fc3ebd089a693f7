"""The comparison of trainers, from histories made by hand: curves, means and ranges, who is soonest, the figure, the script."""

import json
import sys

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from ctrl import errors, evaluation, metrics
from ctrl.features import GarmentNet, extract
from ctrl.figures import trainers as figures
from ctrl.finetune import loop
from ctrl.finetune.probe import probe_function
from ctrl.finetune.task import Task
from ctrl.io import write_json, write_text
from ctrl.oracles import pixels
from ctrl.trainers import Run, build, by_recipe, sentences, to_markdown
from scripts import compare_trainers
from tests.conftest import SUBJECTS, TEMPLATES
from tests.test_figures import NoTracking, size_of

UPDATE = {"seconds": 2.0, "unet_forward": 30, "unet_backward": 10}


def run(name, accuracies, seconds=2.0, diversity=0.95, device="a CPU"):
    """A probe every second update; twice as many updates as `accuracies`."""
    history = []
    for k in range(2 * len(accuracies)):
        row = {"update": k + 1, **UPDATE, "seconds": seconds}
        history.append(row | ({"oracle_accuracy": accuracies[k // 2], "kid_rejection": 0.01 * k} if k % 2 else {}))
    adapter = {
        "device": device, "peak_memory_mb": 1000.0, "unet_passes": {"forward": 30 * len(history), "backward": 10 * len(history)},
        "finetune": {"trainer": "backprop", "probe": {"num_images": 64}},
    }  # fmt: skip
    measured = {"accuracy": accuracies[-1], "kid_rejection": 0.002, "diversity": diversity, "kl_nats": 3.0}
    return Run(name, history, adapter, {"method": name, "n": 512, "metrics": {key: {"value": value} for key, value in measured.items()}})


RUNS = [
    run("ctrl", [0.5, 0.96, 0.90]), run("ctrl_seed1", [0.5, 0.5, 0.98]),
    run("published", [0.5, 0.97, 0.99], seconds=10.0, diversity=0.4),
    run("published_seed1", [0.6, 0.97, 0.99], seconds=10.0, diversity=0.6),
    run("ctrl_adjoint", [0.5, 0.5, 0.97]), run("ctrl_adjoint_seed1", [0.5, 0.5, 0.94]),
]  # fmt: skip


def test_a_curve_counts_every_update_up_to_each_probe():
    curve = RUNS[0].curve(0.95)
    assert curve["update"].tolist() == [2, 4, 6] and curve["seconds"].tolist() == [4, 8, 12] and curve["passes"].tolist() == [80, 160, 240]
    assert curve["accuracy"].tolist() == [0.5, 0.96, 0.90] and curve["kid_rejection"].tolist() == pytest.approx([0.01, 0.03, 0.05])
    with pytest.raises(errors.UserError, match="history of ctrl has no probe"):
        Run("ctrl", [{"update": 1, **UPDATE}], {}, {}).curve(0.95)


def test_the_table_has_means_and_ranges_over_seeds_and_when_the_target_was_first_met():
    table = build(RUNS).set_index("recipe")
    assert list(table.index) == ["ctrl", "published", "ctrl_adjoint"] and set(table["seeds"]) == {2}
    ctrl, adjoint = table.loc["ctrl"], table.loc["ctrl_adjoint"]
    assert [ctrl[f"accuracy{end}"] for end in ("", "_min", "_max")] == pytest.approx([0.94, 0.90, 0.98])
    assert [ctrl[f"seconds_to_target{end}"] for end in ("", "_min", "_max")] == [10, 8, 12], "the first probe there, although it fell"
    assert ctrl["passes_to_target"] == 200 and ctrl["seconds"] == 12 and ctrl["unet_forward"] == 180
    assert adjoint["seeds_at_target"] == 1 and pd.isna(adjoint["seconds_to_target"])
    sooner = build(RUNS, 0.55).set_index("recipe")
    assert sooner.loc["published", "seconds_to_target"] == 30, "40 s and 20 s"
    with pytest.raises(errors.UserError, match="trained on a CPU and a GPU"):
        build([RUNS[0], run("ctrl_seed1", [0.5], device="a GPU")])


def test_accurate_but_far_from_the_exact_images_is_not_there():
    near, far = (build([RUNS[0]], 0.95, max_kid).iloc[0] for max_kid in (0.03, 0.02))
    assert near["seconds_to_target"] == 8 and pd.isna(far["seconds_to_target"])
    assert "0.95 accuracy at a KID of 30 (×1000) or less on the probe" in sentences(build([RUNS[0]], 0.95, 0.03))[0]
    assert RUNS[0].curve(0.9, 0.04)["there"].tolist() == [False, True, False]


def test_the_soonest_must_be_diverse_and_is_held_against_the_published_recipe():
    text = " ".join(sentences(build(RUNS)))
    assert "is `ctrl`: after 10 [8, 12] s" in text
    assert "`published` took 4.0 times as many seconds and 0.8 times as many passes" in text and "diversity of 0.500 [0.400, 0.600]" in text
    collapsed = [run("ctrl", [0.96], diversity=0.5), run("published", [0.97], diversity=0.4)]
    assert sentences(build(collapsed))[0].startswith("No recipe reached 0.95")
    never = build([RUNS[0], run("published", [0.5, 0.6])])
    assert "`published` reached that in 0 of 1 seeds, in 8 s of training: 1.0 times as long." in " ".join(sentences(never))
    assert "s to 0.55 (probe)" in to_markdown(build(RUNS, 0.55)) and "to reach 0.55 accuracy" in to_markdown(build(RUNS, 0.55))
    lines = to_markdown(build(RUNS)).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1 and "– (1 of 2 seeds)" in lines[4]
    assert "n = 512" in "".join(lines) and "The probe is 64 images" in "".join(lines)


def test_the_figure_has_a_thin_line_a_seed_a_thick_mean_and_a_mark_where_all_seeds_are_there(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    figures.comparison({recipe: [one.curve(0.95) for one in its] for recipe, its in by_recipe(RUNS).items()}, 0.95, tmp_path / "a.png")
    panels = drawn[0].axes
    assert len(panels) == 4 and figures.written(2e6) == "2M" and figures.written(2e3) == "2,000"
    assert all("$" not in tick.get_text() for axis in (panels[2].xaxis, panels[2].yaxis) for tick in axis.get_ticklabels(which="both")), (
        "no formula, which would be shown as it is written"
    )
    thick = {line.get_label(): line for line in panels[0].lines if line.get_linewidth() > 1 and not line.get_label().startswith("_")}
    assert set(thick) == {"CTRL", "published", "CTRL adjoint"}
    assert thick["CTRL"].get_xdata().tolist() == [4, 8, 12]
    assert thick["CTRL"].get_ydata().tolist() == pytest.approx([0.5, 0.73, 0.94])
    assert sum(line.get_linewidth() < 0.7 for line in panels[0].lines) == len(RUNS)
    marks = [line.get_xydata().tolist()[0] for line in panels[0].lines if line.get_gid() == "reached"]
    assert marks == [[10.0, 0.95], [40.0, 0.95]], "of CTRL and the published recipe; one seed of the adjoint's never came"
    assert [line.get_xydata().tolist()[0][0] for line in panels[1].lines if line.get_gid() == "reached"] == [200, 160]


def test_a_mean_is_of_the_updates_that_every_seed_has():
    curves = [RUNS[0].curve(0.95), RUNS[1].curve(0.95)[:2]]
    assert figures.mean_curve(curves)["update"].tolist() == [2, 4]


def test_the_script(tmp_path, monkeypatch, capsys):
    for one in RUNS:
        write_json(tmp_path / one.name / "adapter.json", one.adapter)
        write_text(tmp_path / one.name / "history.jsonl", "".join(json.dumps(row) + "\n" for row in one.history))
        write_json(tmp_path / f"{one.name}.json", one.evaluation)
    monkeypatch.setattr(compare_trainers, "run", NoTracking)

    def call(evaluations):
        words = ["--adapters", *(tmp_path / one.name for one in RUNS), "--evaluations", *evaluations]
        words += ["--output", tmp_path / "t.png", "--output-csv", tmp_path / "t.csv", "--output-md", tmp_path / "t.md"]
        monkeypatch.setattr(sys, "argv", ["compare_trainers.py", *map(str, words)])
        errors.main(compare_trainers.main)

    with pytest.raises(SystemExit):
        call([tmp_path / "ctrl.json"])
    assert "there is none of ctrl_seed1" in capsys.readouterr().err and not (tmp_path / "t.csv").exists()
    call([tmp_path / f"{one.name}.json" for one in RUNS])
    assert pd.read_csv(tmp_path / "t.csv")["recipe"].tolist() == ["ctrl", "published", "ctrl_adjoint"]
    assert (tmp_path / "t.md").read_text() in capsys.readouterr().out and size_of(tmp_path / "t.png") == (1080, 720)


# --------------------------------------------------------------------------------------------------------------- the probe


def reference_samples(tmp_path, cells, images):
    table = pd.DataFrame(cells, columns=["subject", "label"])
    return evaluation.Samples(tmp_path, table, images, {})


def test_the_probes_distance_is_kid_within_the_cells_of_the_reference(tmp_path):
    torch.manual_seed(0)
    network, cells = GarmentNet(SUBJECTS, (4, 8)).eval(), [("coat", 0), ("bag", 1)] * 6
    images = torch.rand(12, 3, 16, 16) * 2 - 1
    other = pixels(torch.rand(12, 3, 16, 16) * 2 - 1)
    score = evaluation.distance_to(reference_samples(tmp_path, cells, other), network)
    numbers = torch.tensor([1, 0] * 6)
    expected = metrics.kid(extract(network, pixels(images)), extract(network, other), (numbers, numbers))
    subjects, labels = ["coat", "bag"] * 6, torch.tensor([0, 1] * 6)
    assert score(images, subjects, labels) == {"kid_rejection": pytest.approx(expected)}
    free = score(torch.cat([images, torch.ones(3, 3, 16, 16)]), subjects + ["bag"] * 3, torch.cat([labels, torch.full((3,), 7)]))
    assert free == {"kid_rejection": pytest.approx(expected)}, "a label that the reference does not have is left out"
    assert score(images[:2], subjects[:2], labels[:2]) == {} and score(images[:1], ["dress"], labels[:1]) == {}, "too few: no figure"


def test_training_does_not_depend_on_the_probe(control, tmp_path):
    """Neither on its size nor on what is asked of it: the weights are the same, bit for bit."""
    task = Task(control, control.base.process(3), [(SUBJECTS[0], 0), (SUBJECTS[1], 1)], TEMPLATES, 1.0, 0)
    start = {name: p.detach().clone() for name, p in control.parameters().items()}
    seen, ends = [], []

    def score(images, subjects, labels):
        seen.append((tuple(images.shape), subjects, labels.tolist()))
        return {"oracle_accuracy": 0.5}

    def gradient(update):
        generator = torch.Generator().manual_seed(update)
        for parameter in control.parameters().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator) + torch.rand(())  # global numbers as well
        return {}

    for folder, size in (("a", 0), ("b", 2), ("c", 5)):
        with torch.no_grad():
            for name, parameter in control.parameters().items():
                parameter.copy_(start[name])
        torch.manual_seed(0)
        probe = probe_function(task, score, size, 2) if size else lambda update: {}
        optimizer = torch.optim.SGD(control.groups(1e-3, 1e-3))
        loop.run(control.parameters(), [optimizer], gradient, probe, 3, tmp_path / folder, 1.0, 2, 1, "s")
        ends.append({name: p.detach().clone() for name, p in control.parameters().items()})
    assert all(torch.equal(ends[0][name], end[name]) for end in ends[1:] for name in start)
    assert [shape for shape, _, _ in seen] == [(2, 3, 16, 16)] * 3 + [(5, 3, 16, 16)] * 3
    assert len({str(one[1:]) for one in seen[3:]}) == 1, "the same prompts and labels each time"
    assert all((subject, label) in task.cells for _, subjects, labels in seen for subject, label in zip(subjects, labels, strict=True))
