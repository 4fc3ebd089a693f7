"""Runs reach a real sqlite store, and a server that is away costs nothing but a warning."""

import json
import multiprocessing
import shutil
import sqlite3
import time
from contextlib import closing

import pytest

from ctrl import tracking

AWAY = "http://127.0.0.1:9"  # the discard port: refuses at once


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty store; making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking._create_database(path)
    return path


@pytest.fixture
def folder(database, tmp_path):
    shutil.copy(database, tmp_path)
    return tmp_path


def query(folder, sql: str) -> list[tuple]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(sql).fetchall()


def log_one(folder, name: str) -> None:
    with tracking.run({"seed": 1}, "race", name, folder=folder, patience_seconds=120) as run:
        run.log_metrics({"x": 1.0}, step=0)


def test_everything_arrives(folder):
    from matplotlib.figure import Figure

    artifact = folder / "note.txt"
    artifact.write_text("hello")
    params = {"seed": 3, "finetune": {"gamma": 10.0, "lora": {"rank": 4, "target_modules": ["to_q"]}}}
    with tracking.run(params, "e", "finetune ctrl", tags={"method": "ctrl"}, folder=folder, patience_seconds=120) as run:
        for step in range(3):
            run.log_metrics({"loss": 1.0 / (step + 1), "kl_nats": step, "ignored": "text", "metrics": {"accuracy": 0.5}}, step=step)
        run.log_artifact(artifact)
        run.log_figure(Figure(), "curves.png")
        run.log_artifact(folder / "missing.txt")
    assert query(folder, "select name, status from runs") == [("finetune ctrl", "FINISHED")]
    assert dict(query(folder, "select key, value from params")) == {
        "seed": "3",
        "finetune.gamma": "10.0",
        "finetune.lora.rank": "4",
        "finetune.lora.target_modules": '["to_q"]',
    }
    assert sorted(query(folder, "select step, value from metrics where key = 'loss'")) == [(0, 1.0), (1, 0.5), (2, 1.0 / 3)]
    assert query(folder, "select distinct key from metrics order by key") == [("kl_nats",), ("loss",), ("metrics.accuracy",)]
    tags = dict(query(folder, "select key, value from tags"))
    assert (tags["experiment"], tags["method"], tags["seed"]) == ("e", "ctrl", "3") and tags["git_commit"]
    assert {path.name for path in (folder / "mlruns" / "e").rglob("*.*") if path.is_file()} == {"note.txt", "curves.png"}
    assert not list(folder.glob("mlflow-unsent/*"))


def test_a_failing_body_is_recorded_and_raised(folder):
    with pytest.raises(KeyError), tracking.run({}, "e", "n", folder=folder, patience_seconds=120):
        raise KeyError("mistake")
    assert query(folder, "select status from runs") == [("FAILED",)]


def test_server_away_warns_once_keeps_all_and_sends_it_later(folder, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    start = time.monotonic()
    with tracking.run({"seed": 1}, "e", "away", tracking_uri=AWAY, folder=folder) as run:
        for step in range(20):
            run.log_metrics({"loss": float(step)}, step=step)
            time.sleep(0.01)
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err.count("warning: MLflow") == 1
    (record,) = folder.glob("mlflow-unsent/*/record.json")
    content = json.loads(record.read_text())
    assert len(content["events"]) == 20 and content["status"] == "FINISHED"

    content["uri"] = f"sqlite:///{folder}/mlflow.db"  # the server is back
    record.write_text(json.dumps(content))
    with tracking.run({}, "e", "next", folder=folder, patience_seconds=120):
        pass
    assert sorted(query(folder, "select name from runs")) == [("away",), ("next",)]
    assert len(query(folder, "select value from metrics")) == 20
    assert not list(folder.glob("mlflow-unsent/*"))


def test_server_lost_in_the_middle(folder, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    with tracking.run({}, "e", "first", folder=folder, patience_seconds=120):
        pass
    send, lost = tracking._send, []

    def unreliable(client, record):
        if record.events and not lost:
            lost.append(1)
            raise ConnectionError("gone")
        send(client, record)

    monkeypatch.setattr(tracking, "_send", unreliable)
    with tracking.run({}, "e", "second", folder=folder, patience_seconds=120) as run:
        run.log_metrics({"x": 1.0}, step=0)
        time.sleep(1.0)
        run.log_metrics({"x": 2.0}, step=1)
    assert lost and "gone" in capsys.readouterr().err
    assert sorted(query(folder, "select step, value from metrics")) == [(0, 1.0), (1, 2.0)]


def test_environment_names_the_server(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    with tracking.run({}, "e", "n", folder=folder / "elsewhere", patience_seconds=120):
        pass
    assert query(folder, "select name from runs") == [("n",)]
    assert not (folder / "elsewhere" / "mlflow.db").exists()


@pytest.mark.slow
def test_processes_that_start_at_once_on_no_database(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=log_one, args=(tmp_path, f"run {i}")) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(query(tmp_path, "select name from runs")) == [(f"run {i}",) for i in range(4)]
    assert query(tmp_path, "select count(distinct experiment_id) from runs") == [(1,)]
    assert query(tmp_path, "select count(*) from metrics") == [(4,)]
