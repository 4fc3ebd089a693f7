"""The estimate of the long run: hand-computed sums, and memory and time that are really measured."""

import pytest

from ctrl import estimate, measure, tables
from ctrl.finetune.task import Task
from scripts.common import DEFAULTS, read_yaml
from tests.conftest import SUBJECTS, TEMPLATES
from tests.repository import ROOT

CONFIG = read_yaml(DEFAULTS)
METHODS = tables.read_methods(ROOT / "config/methods.tsv").to_dict("records")


def of(**seconds):
    update = dict.fromkeys(estimate.adapters_of(CONFIG, METHODS), seconds.get("update", 0.0))
    image = {kind: seconds.get(kind, 0.0) for kind in ("plain", "guided", "weighed")}
    return {job.name: job.seconds for job in estimate.jobs(CONFIG, METHODS, image, update, seconds.get("start", 0.0))}


def test_each_job_costs_what_the_config_asks():
    num = CONFIG["evaluation"]["images_per_label"] * CONFIG["label"]["num_classes"]
    plain, guided, weighed, update = of(plain=2.0), of(guided=3.0), of(weighed=4.0), of(update=5.0)
    assert plain["sample pretrained"] == plain["sample ctrl"] == 2 * num
    assert weighed["sample smc"] == weighed["sample svdd"] == 4 * num * CONFIG["particles"] and plain["sample smc"] == 0
    assert plain["sample rejection"] == 2 * num * CONFIG["label"]["num_classes"]
    assert guided["sample mpgd"] == 3 * num and guided["sample ctrl"] == 0
    assert guided["tune mpgd"] == 3 * CONFIG["tuning"]["num_images"] * len(CONFIG["tuning"]["mpgd"]["scale"])
    assert (
        update["train ctrl"] == 5 * CONFIG["finetune"]["num_updates"]
        and update["train cfg"] == 5 * CONFIG["adapters"]["cfg"]["num_updates"]
    )
    assert plain["sample samples_val/ctrl_strength0"] == 2 * num and plain["sample samples_val/ctrl_strength0.5"] == 2 * 2 * num
    assert "sample samples_val/ctrl_strength1" not in plain and set(of(start=7.0).values()) == {7.0}


def test_the_sweep_adds_the_gammas_that_the_table_lacks():
    more = {**CONFIG, "gamma_sweep": [CONFIG["finetune"]["gamma"], 2.5]}
    assert set(estimate.adapters_of(more, METHODS)) - set(estimate.adapters_of({**CONFIG, "gamma_sweep": []}, METHODS)) == {"ctrl_gamma2.5"}


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (719, "12 min"), (3900, "1 h 05 min"), (7199, "2 h 00 min")])
def test_durations(seconds, text):
    assert estimate.duration(seconds) == text


def test_an_update_is_scaled_from_its_parts(control, monkeypatch):
    process = control.base.process(4)
    task = Task(control, process, [(SUBJECTS[0], 0), (SUBJECTS[1], 1)], TEMPLATES, 1.0, 0)
    settings = CONFIG["finetune"] | {"batch_size": 12, "num_updates": 8, "coarse": {"stride": 2, "end": 0.75}}

    def log_prob(x_0, y, temperature):
        return -x_0.square().flatten(1).mean(1)

    passes = []

    def counted(function, *_):
        before = control.base.passes.forward
        function()
        passes.append(control.base.passes.forward - before)
        return float(passes[-1])

    monkeypatch.setattr(measure, "seconds", counted)
    whole = measure.update_seconds(task, log_prob, settings, 2)
    assert passes[0] < passes[1] and whole == 6 * (0.75 * passes[0] + 0.25 * passes[1])
    assert measure.update_function(task, log_prob, settings | {"trainer": "supervised"}, 3)(0)["unet_forward"] == 3


def test_policy_gradients_are_timed_with_the_drawing_of_their_trajectories(control, monkeypatch):
    """Of 4 steps the control acts at 3: a draw takes 4 pretrained passes and 3 of its own, each of the two updates 3 more."""
    task = Task(control, control.base.process(4), [(SUBJECTS[0], 0), (SUBJECTS[1], 1)], TEMPLATES, 1.0, 0)
    assert sum(control.active(task.process)) == 3
    settings = CONFIG["finetune"] | {"trainer": "policy_gradient", "batch_size": 12, "num_updates": 8, "coarse": {"stride": 1, "end": 0.5}}
    passes = []

    def counted(function, *_):
        before = control.base.passes.forward
        function()
        passes.append(control.base.passes.forward - before)
        return float(passes[-1])

    monkeypatch.setattr(measure, "seconds", counted)
    whole = measure.update_seconds(task, lambda x_0, y, temperature: x_0.flatten(1).mean(1), settings, 2)
    assert passes == [2 * (4 + 3 + 3 + 3)] * 2 and whole == 12 * (4 + 3 + 3 + 3) / 2
