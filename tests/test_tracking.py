"""Runs reach a real sqlite store, and a server that is away costs nothing but a warning."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from PIL import Image

from ctrl import config, errors, mlflow_client, tracking
from ctrl.journal import Journal, left_behind

AWAY = "http://127.0.0.1:9"  # the discard port: refuses at once


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty store; making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_client._create_database(path)
    return path


@pytest.fixture
def folder(database, tmp_path):
    shutil.copy(database, tmp_path)
    return tmp_path


def query(folder, sql: str) -> list[tuple]:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(sql).fetchall()


def unsent(folder) -> list:
    return list(folder.glob("mlflow-unsent/*"))


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
        run.log_image(Image.new("RGB", (4, 4)), "probe", 2)
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
    files = {path.name: path for path in (folder / "mlruns" / "e").rglob("*.*") if path.is_file()}
    assert {"note.txt", "curves.png"} <= set(files)
    pictures = sorted(name for name in files if name.startswith("probe+step+2+"))
    assert len(pictures) == 2 and pictures[0].endswith("+compressed.webp") and files[pictures[0]].parent.name == "images"
    assert tags["mlflow.loggedImages"] == "True"
    assert not unsent(folder)


def test_a_failing_body_is_recorded_and_raised(folder):
    with pytest.raises(KeyError), tracking.run({}, "e", "n", folder=folder, patience_seconds=120):
        raise KeyError("mistake")
    assert query(folder, "select status from runs") == [("FAILED",)]


def test_runs_of_one_workflow_hang_under_one_parent_which_has_its_whole_configuration(folder):
    (folder / "e").mkdir()
    for gamma in (10, 10, 3):
        (folder / "e" / "config.json").write_text(json.dumps({"experiment": "e", "finetune": {"gamma": gamma}}))
        with tracking.run({}, "e", "child", folder=folder, patience_seconds=120):
            pass
    parents = query(folder, "select run_uuid, name, status from runs where name like 'workflow %' order by start_time")
    assert len(parents) == 2 and {status for *_, status in parents} == {"FINISHED"}
    children = query(folder, "select value, count(*) from tags where key = 'mlflow.parentRunId' group by value")
    assert dict(children) == {parents[0][0]: 2, parents[1][0]: 1}
    assert query(folder, f"select value from params where run_uuid = '{parents[1][0]}' and key = 'finetune.gamma'") == [("3",)]


def test_an_adapter_is_registered_once_with_the_newest_table(folder):
    adapter = folder / "ctrl"
    adapter.mkdir()
    for weights, table in (("a", "first"), ("a", "second"), ("b", "third")):
        (adapter / "lora.safetensors").write_text(weights)
        with tracking.run({}, "e", "tabulate", folder=folder, patience_seconds=120) as run:
            run.register_model(adapter, "e-ctrl", f"| table | {table} |", {"accuracy": "0.9"})
    versions = query(folder, "select name, version, description from model_versions order by version")
    assert versions == [("e-ctrl", 1, "| table | second |"), ("e-ctrl", 2, "| table | third |")]
    ((source,),) = query(folder, "select source from model_versions where version = 1")
    assert (folder / "mlruns" / source.split("/mlruns/")[1] / "lora.safetensors").read_text() == "a"
    assert ("accuracy", "0.9") in query(folder, "select key, value from model_version_tags")


def test_server_away_warns_once_keeps_all_and_sends_it_later(folder, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    start = time.monotonic()
    with tracking.run({"seed": 1}, "e", "away", tracking_uri=AWAY, folder=folder) as run:
        for step in range(20):
            run.log_metrics({"loss": float(step)}, step=step)
            time.sleep(0.01)
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err.count("warning: MLflow") == 1
    (journal,) = left_behind(folder)
    assert len(journal.unsent()) == 20 and journal.end[0] == "FINISHED"
    text = journal.path.read_text()
    journal.close()

    journal.path.write_text(text.replace(AWAY, f"sqlite:///{folder}/mlflow.db"))  # the server is back
    with tracking.run({}, "e", "next", folder=folder, patience_seconds=120):
        pass
    assert sorted(query(folder, "select name from runs")) == [("away",), ("next",)]
    assert len(query(folder, "select value from metrics")) == 20
    assert not unsent(folder)


def test_server_lost_in_the_middle(folder, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    with tracking.run({}, "e", "first", folder=folder, patience_seconds=120):
        pass
    send, lost = mlflow_client.send, []

    def unreliable(client, journal):
        send(client, journal)
        if journal.events and not lost:  # it has arrived, but the answer is lost
            lost.append(1)
            journal.num_sent = 0
            raise ConnectionError("gone")

    monkeypatch.setattr(mlflow_client, "send", unreliable)
    with tracking.run({}, "e", "second", folder=folder, patience_seconds=120) as run:
        run.log_metrics({"x": 1.0}, step=0)
        time.sleep(1.0)
        run.log_metrics({"x": 2.0}, step=1)
    assert lost and "gone" in capsys.readouterr().err
    assert sorted(query(folder, "select step, value from metrics")) == [(0, 1.0), (1, 2.0)]
    assert query(folder, "select count(*) from runs") == [(2,)]


def log_and_be_killed(folder) -> None:
    with tracking.run({"seed": 1}, "e", "killed", folder=folder) as run:
        run.log_metrics({"x": 1.0}, step=0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_script_logged_is_sent_by_the_next_command_and_once(folder):
    mlflow_client.import_mlflow("sqlite:")
    process = multiprocessing.get_context("fork").Process(target=log_and_be_killed, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with open(next(folder.glob("mlflow-unsent/*/journal.jsonl")), "a") as file:
        file.write('{"event": {"kind": "met')  # killed within a line
    for path in list(folder.glob("mlflow-unsent/*")):
        shutil.copytree(path, folder / "copy" / path.name)
    assert [problem for _, problem in tracking.send_left_behind(folder, others=True)] == [None]
    assert query(folder, "select name, status from runs") == [("killed", "KILLED")]
    shutil.copytree(folder / "copy", folder / "mlflow-unsent", dirs_exist_ok=True)  # as if the last answer had been lost
    assert [problem for _, problem in tracking.send_left_behind(folder, others=True)] == [None]
    assert query(folder, "select count(*) from runs") == [(1,)] and query(folder, "select step, value from metrics") == [(0, 1.0)]
    assert tracking.send_left_behind(folder, others=True) == []


def test_a_journal_in_use_is_left_alone(tmp_path):
    journal = Journal.create(tmp_path, {"uri": AWAY, "name": "n"})
    journal.open()
    assert list(left_behind(tmp_path)) == []
    journal.close()
    (found,) = left_behind(tmp_path)
    assert found.header["name"] == "n" and found.end[0] == "KILLED"


def test_a_folder_that_refuses_costs_a_warning(tmp_path, capsys):
    (tmp_path / "mlflow-unsent").write_text("no folder")
    with tracking.run({}, "e", "n", tracking_uri=AWAY, folder=tmp_path) as run:
        run.log_metrics({"x": 1.0})
        run.log_image(Image.new("RGB", (4, 4)), "probe", 0)
    assert capsys.readouterr().err.count("nothing of this is kept") == 1


def test_environment_names_the_server(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    with tracking.run({}, "e", "n", folder=folder / "elsewhere", patience_seconds=120):
        pass
    assert query(folder, "select name from runs") == [("n",)]
    assert not (folder / "elsewhere" / "mlflow.db").exists()


def test_a_password_in_the_address_goes_to_mlflow_alone(tmp_path, monkeypatch, capsys):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY.replace("//", "//gustav:hush%2Fhush@"))
    with tracking.run({}, "e", "n", folder=tmp_path) as run:
        run.log_metrics({"x": 1.0})
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("gustav", "hush/hush")
    (journal,) = unsent(tmp_path)
    written = (journal / "journal.jsonl").read_text() + "".join(capsys.readouterr())
    assert AWAY in written and "gustav" not in written and "hush" not in written


def test_errors_are_told_without_secrets(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass/word/9")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken-t0ken")
    said = tracking.scrub("postgresql://anna:secret@host/db\n refused pass/word/9 and t0ken-t0ken")
    assert said == "postgresql://***@host/db refused *** and ***"


def test_a_password_in_the_configuration_is_refused_and_not_repeated():
    from scripts.common import DEFAULTS, SCHEMA, read_yaml

    content = config.merge(read_yaml(DEFAULTS), {"mlflow": {"tracking_uri": "http://anna:secret@host"}})
    with pytest.raises(errors.UserError, match="MLFLOW_TRACKING_PASSWORD") as raised:
        config.resolve(content, json.loads(SCHEMA.read_text()))
    assert "secret" not in str(raised.value)


@pytest.mark.slow
def test_processes_that_start_at_once_on_no_database(tmp_path):
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "config.json").write_text('{"experiment": "race"}')
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=log_one, args=(tmp_path, f"run {i}")) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    names = sorted(name for (name,) in query(tmp_path, "select name from runs"))
    assert names[:4] == [f"run {i}" for i in range(4)] and len(names) == 5, "and one workflow"
    assert query(tmp_path, "select count(distinct experiment_id) from runs") == [(1,)]
    assert query(tmp_path, "select count(*) from metrics") == [(4,)]
