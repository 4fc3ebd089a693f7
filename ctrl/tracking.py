"""What a script did, sent to MLflow beside the work: it never raises into the work and never makes it wait for a server.

Everything goes through a queue to one thread. What could not be sent by the end of the script is kept under `<folder>/mlflow-unsent/` and
sent by the next script that finds the server again. Tables and figures are made from the files under results/, never from MLflow.
"""

import fcntl
import importlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

from ctrl.errors import redact

MAX_BATCH = 500  # metrics a request
MAX_PARAMS = 100  # parameters a request, MLflow's limit
MAX_PARAM_LENGTH = 6000  # characters, MLflow's limit
RETRY_SECONDS = 5.0  # pause after a failed request
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextmanager
def run(
    params: dict,
    experiment: str,
    name: str,
    tags: dict | None = None,
    tracking_uri: str | None = None,
    folder: Path | str = "results",
    patience_seconds: float = 30.0,
) -> Iterator["Run"]:
    """One MLflow run around the body of a `with`.

    Args:
        params: any nested dictionary, the configuration; logged under dotted keys.
        experiment: name of the MLflow experiment, created if it is new.
        name: name of the run, such as "finetune ctrl".
        tags: further tags, such as {"method": "ctrl"}; experiment, seed (from `params`) and the git commit are added.
        tracking_uri: None takes the environment's MLFLOW_TRACKING_URI, and without that sqlite in `folder`.
        folder: where mlflow.db, mlruns/ and what is unsent are kept.
        patience_seconds: longest wait at the end for what is still on its way; 2 s where the server did not answer before.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(folder).resolve()}/mlflow.db"
    tags = {"experiment": experiment, **({"seed": params["seed"]} if "seed" in params else {}), **(tags or {})}
    current = Run(_Record(uri, experiment, name, dict(_flatten(params)), tags), Path(folder))
    status = "FINISHED"
    try:
        yield current
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        current.close(status, patience_seconds)


class _Record:
    """All that MLflow is to be told about one run; `events` are what it does not know yet."""

    def __init__(self, uri: str, experiment: str, name: str, params: dict, tags: dict):
        self.uri, self.experiment, self.name, self.params = uri, experiment, name, params
        self.tags = {key: str(value) for key, value in tags.items()}
        self.start_ms, self.end_ms, self.status, self.run_id = _now_ms(), None, "RUNNING", None
        self.events: deque[dict] = deque()

    def dump(self) -> str:
        return json.dumps({**vars(self), "uri": redact(self.uri), "events": list(self.events)})

    @classmethod
    def load(cls, text: str) -> "_Record":
        record = cls.__new__(cls)
        vars(record).update(json.loads(text))
        record.events = deque(record.events)
        return record


class Run:
    """What the body of `run` logs to. Every method returns at once."""

    def __init__(self, record: _Record, folder: Path):
        self._record, self._folder = record, folder
        self._unsent = folder / "mlflow-unsent" / uuid.uuid4().hex
        self._wake, self._closing, self._gave_up, self._failed = threading.Condition(), False, False, False
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        try:
            _import_mlflow(record.uri)
            self._thread.start()
        except Exception as error:
            self._warn(error)

    def log_metrics(self, metrics: dict, step: int = 0) -> None:
        """Numbers by name at a step (an update, an epoch); what is not a number is left out."""
        values = {_key(k): float(v) for k, v in _flatten(metrics) if isinstance(v, Real) and not isinstance(v, bool)}
        self._add({"kind": "metrics", "values": values, "step": int(step), "time_ms": _now_ms()})

    def log_artifact(self, path: Path | str) -> None:
        """A finished file or folder, copied to MLflow; it must not move before the run ends."""
        self._add({"kind": "artifact", "path": str(Path(path).resolve())})

    def log_figure(self, figure, name: str) -> None:
        """A matplotlib figure as the artifact `name`, such as "curves.png"."""
        try:
            self._unsent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self._unsent / name)
            self._add({"kind": "artifact", "path": str((self._unsent / name).resolve())})
        except Exception as error:
            self._warn(error)

    def close(self, status: str, patience_seconds: float) -> None:
        """Ends the run; what is not sent within the patience is kept for the next one."""
        record = self._record
        with self._wake:
            record.status, record.end_ms, self._closing = status, _end_ms(record), True
            self._wake.notify_all()
        if self._thread.ident:
            self._thread.join(min(patience_seconds, 2.0) if self._failed else patience_seconds)
        with self._wake:
            self._gave_up = True
            done = record.end_ms is None
        try:
            if not done:
                self._unsent.mkdir(parents=True, exist_ok=True)
                (self._unsent / "record.json").write_text(record.dump())
                self._warn(f"{record.uri} did not answer in time")
            elif self._unsent.exists():
                shutil.rmtree(self._unsent)
        except Exception as error:
            self._warn(error)

    def _add(self, event: dict) -> None:
        with self._wake:
            self._record.events.append(event)
            self._wake.notify_all()

    def _send_all(self) -> None:
        """The thread: sends what is queued until the run is closed and everything is out, or it gives up."""
        client = None
        while not self._gave_up:
            try:
                client = client or _connect(self._record, self._folder)
                _send(client, self._record)
                if self._closing and not self._record.events:
                    _finish(client, self._record)
                    _send_unsent(client, self._record.uri, self._unsent.parent)
                    return
                pause = None
            except Exception as error:
                self._warn(error)
                if self._closing:
                    return
                pause = RETRY_SECONDS
            with self._wake:
                if not self._closing and (pause or not self._record.events):
                    self._wake.wait_for(lambda pause=pause: self._closing or (not pause and self._record.events), pause)

    def _warn(self, error: object) -> None:
        """Once a run, on stderr."""
        if not self._failed:
            self._failed = True
            text = redact(" ".join(str(error).split()))[:200]
            print(f"warning: MLflow: {text}; the work goes on, what is unsent is kept in {self._unsent.parent}", file=sys.stderr)


def _import_mlflow(uri: str) -> None:
    """In the main thread, so that no other import runs beside it."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    importlib.import_module("mlflow.tracking")
    if uri.startswith("sqlite:"):
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _connect(record: _Record, folder: Path):
    """An MlflowClient on which `record` has a run."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    database = Path(record.uri.removeprefix("sqlite:///")) if record.uri.startswith("sqlite:///") else None
    if database:
        _create_database(database)
    client = MlflowClient(record.uri)
    found = client.get_experiment_by_name(record.experiment)
    location = (database.parent / "mlruns" / record.experiment).absolute().as_uri() if database else None
    try:
        experiment_id = found.experiment_id if found else client.create_experiment(record.experiment, artifact_location=location)
    except MlflowException:  # another process was faster
        experiment_id = client.get_experiment_by_name(record.experiment).experiment_id
    if record.run_id is None:
        commit = _git_commit()
        source = {
            "mlflow.source.name": sys.argv[0],
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": commit.removesuffix("-dirty"),
        }
        tags = {**source, "git_commit": commit, **record.tags}
        record.run_id = client.create_run(experiment_id, start_time=record.start_ms, tags=tags, run_name=record.name).info.run_id
    return client


def _create_database(database: Path) -> None:
    """A complete sqlite file, or none: made under another name by one process at a time (two at once leave half a schema)."""
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            temporary = database.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{temporary.resolve()}", (database.parent / "mlruns").absolute().as_uri()).engine.dispose()
            os.replace(temporary, database)


def _send(client, record: _Record) -> None:
    """Sends parameters and events, dropping each from the record once MLflow has it."""
    from mlflow.entities import Metric, Param

    items = list(record.params.items())
    for start in range(0, len(items), MAX_PARAMS):
        chunk = dict(items[start : start + MAX_PARAMS])
        client.log_batch(record.run_id, params=[Param(key, _text(value)) for key, value in chunk.items()])
        record.params = {key: value for key, value in record.params.items() if key not in chunk}
    while record.events:
        events, metrics = [], []
        for event in list(record.events):
            if event["kind"] != "metrics" or len(metrics) + len(event["values"]) > MAX_BATCH:
                break
            events.append(event)
            metrics += [Metric(key, value, event["time_ms"], event["step"]) for key, value in event["values"].items()]
        if events:
            client.log_batch(record.run_id, metrics=metrics)
        else:
            events = [record.events[0]]
            _send_one(client, record.run_id, events[0])
        for _ in events:
            record.events.popleft()


def _send_one(client, run_id: str, event: dict) -> None:
    """An artifact, or more metrics in one event than a batch holds."""
    from mlflow.entities import Metric

    if event["kind"] == "metrics":
        metrics = [Metric(key, value, event["time_ms"], event["step"]) for key, value in event["values"].items()]
        for start in range(0, len(metrics), MAX_BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + MAX_BATCH])
    elif Path(event["path"]).is_dir():
        client.log_artifacts(run_id, event["path"], Path(event["path"]).name)
    elif Path(event["path"]).exists():
        client.log_artifact(run_id, event["path"])


def _finish(client, record: _Record) -> None:
    client.set_terminated(record.run_id, record.status, record.end_ms)
    record.end_ms = None


def _send_unsent(client, uri: str, folder: Path) -> None:
    """What earlier runs could not send to the same server. Renaming a record claims it, so that no two processes send it."""
    for path in sorted(folder.glob("*/record.json")):
        claimed = path.with_name("record.claimed")
        try:
            record = _Record.load(path.read_text())
            if record.uri != redact(uri):
                continue
            record.uri = uri  # with the password, which is kept nowhere
            path.rename(claimed)
        except FileNotFoundError:  # another process has it
            continue
        try:
            _connect(record, folder.parent)
            _send(client, record)
            _finish(client, record)
        except Exception:
            claimed.write_text(record.dump())
            claimed.rename(path)
            raise
        shutil.rmtree(path.parent)


def _git_commit() -> str:
    """The commit of the working folder, with "-dirty" behind it if files differ; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _flatten(nested: dict, parent: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of a nested dictionary."""
    for key, value in nested.items():
        name = f"{parent}.{key}" if parent else str(key)
        if isinstance(value, dict):
            yield from _flatten(value, name)
        else:
            yield name, value


def _key(name: str) -> str:
    """A name that MLflow accepts."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:250]


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 3] + "..."


def _end_ms(record: _Record) -> int:
    """Now, but not before the run's start, where the clock was set back."""
    return max(_now_ms(), record.start_ms)


def _now_ms() -> int:
    return math.floor(time.time() * 1000)
