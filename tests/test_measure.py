"""What an update costs, in seconds and memory, weighted by hand and measured."""

import os
from types import SimpleNamespace

import pytest

from ctrl import io, measure
from ctrl.config import resolve
from scripts.common import DEFAULTS, SCHEMA, read_yaml
from tests.conftest import SUBJECTS, TEMPLATES

CONFIG = resolve(read_yaml(DEFAULTS), io.read_json(SCHEMA))


@pytest.mark.parametrize(
    ("trainer", "timed", "seconds"),
    [("backprop", [0, 0, 75], 4 * (0.75 * 0 + 0.25 * 75)), ("policy_gradient", [0, 0, 1, 76, 77], 4 * (0.75 * 0.5 + 0.25 * 76.5))],
)
def test_an_update_is_weighted_by_its_phase_and_its_reuse(control, monkeypatch, trainer, timed, seconds):
    """Every update takes as many seconds as its number says."""
    task, done = SimpleNamespace(control=control, process=control.base.process(4)), []
    monkeypatch.setattr(measure, "update_function", lambda *_: lambda u: done.append(u) or {"seconds": float(u)})
    monkeypatch.setattr(measure.loop, "run", lambda p, o, gradient, probe, num, *_: [gradient(k) for k in range(num)])
    monkeypatch.setattr(measure, "peak_memory_mb", lambda base: 100.0)
    changes = {"trainer": trainer, "num_updates": 100, "batch_size": 8, "micro_batch_size": 2}
    cost = measure.update_cost(task, None, CONFIG["finetune"] | changes)
    assert done == timed and cost["seconds_per_update"] == pytest.approx(seconds)
    assert cost["hours"] == pytest.approx(seconds * 100 / 3600)
    held = 6 * (3 * 4 + 1) * 4 * 8 * 8 * 4 / 2**20 if trainer == "policy_gradient" else 0.0
    assert cost["memory_mb"] == pytest.approx(100 + held)


@pytest.mark.parametrize("trainer", ["backprop", "adjoint", "efficient_adjoint", "policy_gradient", "supervised"])
def test_a_real_update_has_a_cost(control, trainer):
    task = measure.Task(control, control.base.process(4), [(SUBJECTS[0], 0), (SUBJECTS[1], 1)], TEMPLATES, 1.0, 0)
    changes = {"trainer": trainer, "num_updates": 10, "batch_size": 4, "micro_batch_size": 2}
    cost = measure.update_cost(task, lambda x, y, temperature: -x.square().flatten(1).mean(1), CONFIG["finetune"] | changes)
    assert cost["seconds_per_update"] > 0 and cost["memory_mb"] >= cost["memory_before_mb"] > 50 and cost["trainer"] == trainer


def test_a_process_of_its_own():
    assert measure.alone(os.getpid) != os.getpid()
    with pytest.raises(measure.Killed, match="perhaps for its memory"):
        measure.alone(os._exit, 1)


def test_free_memory_is_less_than_the_machine_has():
    free = measure.free_memory_mb()
    assert free is None or 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
