"""A real tracking server with passwords: many jobs at once, a server that comes and goes, and what a browser shows of it."""

import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from ctrl import tracking
from tests.browser import open_browser
from tests.repository import ROOT

pytestmark = pytest.mark.slow
USER, PASSWORD = "admin", "a-long-secret-of-one-test"
NUM_JOBS, NUM_UPDATES = 20, 40
METRICS = ("loss", "kl_nats", "log_prob")
SCREENSHOTS = Path(os.environ["SCREENSHOTS"]) if "SCREENSHOTS" in os.environ else None


class Server:
    """`mlflow server` with sqlite and artefacts in a folder, on a port of 127.0.0.1; the same port each time it is started."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = {USER}\n"
            f"admin_password = {PASSWORD}\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "grant_default_workspace_access = false\nauth_cache_ttl_seconds = 60\n"
        )

    def start(self) -> None:
        if self.process and self.process.poll() is None:
            return
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of one test",
        }
        command = [
            sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "files"),
        ]  # fmt: skip
        with open(self.folder / "server.txt", "a") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.txt").read_text()[-3000:]
                time.sleep(0.3)
        raise AssertionError("the server did not start")

    def stop(self) -> None:
        """At once, as when its machine goes away."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def query(self, sql: str) -> list[tuple]:
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as database:
            return database.execute(sql).fetchall()

    def metrics(self, run: str) -> list[tuple]:
        return sorted(self.query(f"select step, value from metrics join runs using (run_uuid) where name = '{run}' and key = 'x'"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed: no server with passwords")
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Where the jobs run: results/ with the configuration of their workflow."""
    folder = tmp_path_factory.mktemp("project") / "results"
    (folder / "garments").mkdir(parents=True)
    (folder / "garments" / "config.json").write_text(json.dumps({"experiment": "garments", "finetune": {"gamma": 10.0}}))
    return folder


@pytest.fixture(autouse=True)
def environment(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.5)


def job(folder: Path, number: int) -> None:
    with tracking.run({"seed": number}, "garments", f"job {number}", folder=folder, patience_seconds=200) as run:
        for step in range(NUM_UPDATES):
            run.log_metrics(dict.fromkeys(METRICS, step + number / 100), step)


def start_run(results, name: str):
    return tracking.run({"seed": 0}, "garments", name, folder=results, patience_seconds=60)


def unsent(results) -> int:
    return len(list(results.glob("mlflow-unsent/*")))


def sync(results, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/sync_mlflow.py", "--folder", str(results), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_server_that_is_down_at_the_start_costs_a_warning(server, results, capsys):
    with start_run(results, "before the server") as run:
        waited = time.thread_time()
        for step in range(5):
            run.log_metrics({"x": step}, step)
        waited = time.thread_time() - waited
    assert waited < 0.1
    assert capsys.readouterr().err.count("warning: MLflow") == 1 and unsent(results) == 1


def test_twenty_jobs_at_once_lose_nothing(server, results):
    server.start()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ctrl.tracking", "mlflow.tracking"])
    jobs = [context.Process(target=job, args=(results, number)) for number in range(NUM_JOBS)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
    sent_later = sync(results)  # whose patience ended before the busy server answered
    assert sent_later.returncode == 0, sent_later.stderr
    assert server.query("select count(*), count(distinct name) from runs where name like 'job %' and status = 'FINISHED'") == [(20, 20)]
    for name in METRICS:
        rows = server.query(f"select runs.name, step, value from metrics join runs using (run_uuid) where key = '{name}'")
        assert sorted(rows) == sorted((f"job {n}", step, step + n / 100) for n in range(NUM_JOBS) for step in range(NUM_UPDATES))
    assert server.metrics("before the server") == [(step, step) for step in range(5)], "the first of them sent it too"
    parents = server.query("select value, count(*) from tags where key = 'mlflow.parentRunId' group by value")
    assert [count for _, count in parents] == [NUM_JOBS + 1] and unsent(results) == 0


def test_a_server_that_goes_and_comes_back_in_the_middle(server, results):
    with start_run(results, "middle") as run:
        run.log_metrics({"x": 0}, 0)
        wait_for(lambda: server.metrics("middle"))
        server.stop()
        run.log_metrics({"x": 1}, 1)
        time.sleep(1)
        server.start()
        run.log_metrics({"x": 2}, 2)
        wait_for(lambda: len(server.metrics("middle")) == 3)
    assert server.metrics("middle") == [(0, 0), (1, 1), (2, 2)] and unsent(results) == 0


def test_a_wrong_password_keeps_the_figures(server, results, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "an-old-secret")
    with start_run(results, "locked out") as run:
        run.log_metrics({"x": 0}, 0)
    said = capsys.readouterr().err
    assert unsent(results) == 1 and "warning: MLflow" in said and "an-old-secret" not in said
    assert server.query("select * from runs where name = 'locked out'") == []
    monkeypatch.undo()


def test_what_the_server_missed_is_sent_once(server, results):
    with start_run(results, "end") as run:
        run.log_metrics({"x": 0}, 0)
        wait_for(lambda: server.metrics("end"))
        server.stop()
        run.log_metrics({"x": 1}, 1)
    assert unsent(results) == 2
    down = sync(results)
    assert down.returncode == 1 and "2 of 2 runs are still in" in down.stderr and unsent(results) == 2
    server.start()
    done = sync(results)
    assert done.returncode == 0 and "2 runs sent" in done.stdout and unsent(results) == 0
    assert server.metrics("end") == [(0, 0), (1, 1)] and server.metrics("locked out") == [(0, 0)]
    assert server.query("select status from runs where name = 'end'") == [("FINISHED",)]
    assert sync(results).stdout == "nothing to send\n"
    assert server.query("select count(*) from runs where name in ('end', 'locked out')") == [(2,)]


def picture(step: int) -> Image.Image:
    image = Image.new("RGB", (768, 384), "white")
    for row in range(4):
        for column in range(8):
            box = [column * 96 + 8, row * 96 + 8, column * 96 + 88, row * 96 + 88]
            ImageDraw.Draw(image).rectangle(box, fill=(60 * row, min(255, 8 * step), 30 * column))
    return image


@pytest.fixture(scope="module")
def finetuned(server, results):
    """Two fine-tunings as the workflow logs them, and the table behind them."""
    server.start()
    os.environ |= {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    for gamma in (3.0, 10.0):
        adapter = results / "garments" / "adapters" / f"ctrl_gamma{gamma:g}"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter.json").write_text(json.dumps({"gamma": gamma}))
        (adapter / "pytorch_lora_weights.safetensors").write_text(f"weights {gamma}")
        params = {"experiment": "garments", "seed": 0, "finetune": {"gamma": gamma, "trainer": "backprop", "num_updates": 30}}
        tags = {"method": adapter.name, "gamma": gamma}
        with tracking.run(params, "garments", f"finetune {adapter.name}", tags, folder=results, patience_seconds=100) as run:
            run.log_image(picture(0), "probe", 0)
            for step in range(1, 31):
                run.log_metrics({"loss": 10 / step, "log_prob": -gamma / step, "kl_nats": step / gamma, "seconds": 2.3}, step)
                if step % 10 == 0:
                    run.log_metrics({"oracle_accuracy": 0.3 + 0.02 * step}, step)
                    run.log_image(picture(step), "probe", step)
            for file in sorted(adapter.iterdir()):
                run.log_artifact(file)
    with tracking.run(params, "garments", "tabulate", folder=results, patience_seconds=100) as run:
        table = "| method | accuracy |\n| --- | ---: |\n| ctrl_gamma10 | 0.934 |\n"
        run.register_model(adapter, "garments-ctrl", table, {"gamma": 10.0, "accuracy": "0.934"})
    ((experiment,),) = server.query("select experiment_id from experiments where name = 'garments'")
    return experiment, dict(server.query("select name, run_uuid from runs"))


@pytest.fixture(scope="module")
def page(server, finetuned, tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as page:
        page.log_in(USER, PASSWORD)
        yield page


@pytest.fixture
def show(server, page):
    """What a page says when it says all `texts` and `ready` is true, and after the script and the texts of `then`.

    A screenshot goes to the folder in $SCREENSHOTS.
    """

    def show(route: str, *texts: str, ready: str = "true", then: tuple = (), name: str) -> str:
        page.open("about:blank")
        page.open(f"{server.uri}/#/{route}{'&' if '?' in route else '?'}workflowType=machine_learning")
        said = page.read(*texts, ready=ready)
        page.run("document.querySelector('[aria-label=Close]')?.click()")  # the assistant, which covers a third of the page
        if then:
            page.run(then[0])
            said = page.read(*then[1:])
        if SCREENSHOTS:
            time.sleep(1)
            page.screenshot(SCREENSHOTS / f"{name}.png", whole=False)
        return said

    return show


LINES = "document.querySelectorAll('.js-plotly-plot .scatterlayer .trace path').length >= {}"


def test_the_list_of_runs_has_the_workflow_with_its_runs_below(show, finetuned):
    experiment, runs = finetuned
    (workflow,) = (name for name in runs if name.startswith("workflow "))
    unfold = "document.querySelector('.ag-row [data-component-id*=runnamecellrenderer]').click()"
    route = f"experiments/{experiment}/runs"
    said = show(route, workflow[:15], f"{len(runs)} matching runs", then=(unfold, "finetune ctrl_g", "tabulate"), name="runs")
    assert "job 7" in said


def test_the_charts_of_a_run_are_drawn(show, finetuned):
    experiment, runs = finetuned
    route = f"experiments/{experiment}/runs/{runs['finetune ctrl_gamma10']}/model-metrics"
    show(route, "kl_nats", "log_prob", "oracle_accuracy", ready=LINES.format(4), name="charts")


def test_the_pictures_of_a_run_are_shown_by_step(show, finetuned, page):
    experiment, runs = finetuned
    route = f"experiments/{experiment}/runs/{runs['finetune ctrl_gamma10']}/model-metrics"
    loaded = "[...document.images].some(i => i.naturalWidth >= 256 && i.src.includes('probe'))"
    slider = "document.querySelector('[role=slider]')"
    show(route, "probe", ready=loaded, then=(f"{slider}.scrollIntoView({{block: 'end'}})", "probe"), name="images")
    limits = f"[{slider}.ariaValueMin, {slider}.ariaValueNow, {slider}.ariaValueMax]"
    assert page.run(limits) == ["0", "0", "30"]


def test_the_artefacts_of_a_run_are_listed(show, finetuned):
    experiment, runs = finetuned
    route = f"experiments/{experiment}/runs/{runs['finetune ctrl_gamma10']}/artifacts"
    show(route, "adapter.json", "pytorch_lora_weights.safetensors", "images", name="artefacts")


def test_two_runs_compare_by_what_differs(show, finetuned):
    experiment, runs = finetuned
    chosen = [runs[f"finetune ctrl_gamma{gamma}"] for gamma in (3, 10)]
    route = f"compare-runs?runs={json.dumps(chosen)}&experiments={json.dumps([str(experiment)])}"
    show(route.replace('"', "%22").replace(" ", ""), "finetune.gamma", "3.0", "10.0", name="compare")


def test_the_registered_adapter_has_its_table_and_its_run(show):
    said = show("models/garments-ctrl/versions/1", "ctrl_gamma10", "0.934", "Source Run", name="model")
    assert "gamma" in said


def test_the_password_is_nowhere_but_in_the_server(server, results):
    places = [path for path in results.parent.rglob("*") if path.is_file()] + [server.folder / "mlflow.db", server.folder / "server.txt"]
    assert [path for path in places if PASSWORD.encode() in path.read_bytes()] == []
