"""What a script did, sent to MLflow beside the work: it never raises into the work and never makes it wait for a server.

Everything goes into a journal on disk, and from there to MLflow by one thread. What is not sent by the end of the script, because the
server is away or the script was killed, is sent by the next script that finds the server, or by scripts/sync_mlflow.py. Tables and
figures are made from the files under results/, never from MLflow.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ctrl import mlflow_client
from ctrl.errors import USERINFO, redact
from ctrl.journal import Journal, left_behind, now_ms

RETRY_SECONDS = 5.0  # pause after a failed request


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
    """One MLflow run around the body of a `with`, below the run of its workflow: the one of `<folder>/<experiment>/config.json`.

    Args:
        params: any nested dictionary, the configuration; logged under dotted keys.
        experiment: name of the MLflow experiment, created if it is new.
        name: name of the run, such as "finetune ctrl".
        tags: further tags, such as {"method": "ctrl"}; experiment, seed (from `params`) and the git commit are added.
        tracking_uri: None takes the environment's MLFLOW_TRACKING_URI, and without that sqlite in `folder`.
        folder: where mlflow.db, mlruns/ and what is unsent are kept.
        patience_seconds: longest wait at the end for what is still on its way; 2 s where the server did not answer before.
    """
    folder = Path(folder).resolve()
    uri = address(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db")
    tags = {"experiment": experiment, **({"seed": params["seed"]} if "seed" in params else {}), **(tags or {})}
    header = {
        "uri": public(uri),
        "experiment": experiment,
        "name": name,
        "params": dict(flatten(params)),
        "tags": {**_source(), **{key: str(value) for key, value in tags.items()}},
        "workflow": _workflow(folder / experiment / "config.json"),
    }
    current = Run(Journal.create(folder, header), uri, folder)
    status = "FINISHED"
    try:
        yield current
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        current.close(status, patience_seconds)


class Run:
    """What the body of `run` logs to. Every method returns at once."""

    def __init__(self, journal: Journal, uri: str, folder: Path):
        self._journal, self._uri, self._folder = journal, uri, folder
        self._wake, self._closing, self._gave_up, self._failed, self._done = threading.Condition(), False, False, False, False
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        with self._guarded():
            journal.open()
        with self._guarded():
            mlflow_client.import_mlflow(uri)  # in the main thread, so that no other import runs beside it
            self._thread.start()

    def log_metrics(self, metrics: dict, step: int = 0) -> None:
        """Numbers by name at a step (an update, an epoch); what is not a number is left out."""
        values = {_key(k): float(v) for k, v in flatten(metrics) if isinstance(v, Real) and not isinstance(v, bool)}
        self._add({"kind": "metrics", "values": values, "step": int(step), "time_ms": now_ms()})

    def log_artifact(self, path: Path | str) -> None:
        """A finished file or folder, copied to MLflow; it must not move before the run ends."""
        self._add({"kind": "artifact", "path": str(Path(path).resolve())})

    def log_figure(self, figure, name: str) -> None:
        """A matplotlib figure as the artifact `name`, such as "curves.png"."""
        with self._guarded():
            self._add({"kind": "artifact", "path": str(self._save(name, figure.savefig))})

    def log_image(self, image, name: str, step: int) -> None:
        """A PIL image at a step: MLflow shows the steps of a name behind a slider."""
        with self._guarded():
            names = mlflow_client.image_names(name, step, now_ms())
            self._add({"kind": "images", "paths": [str(self._save(file, image.save)) for file in names], "time_ms": now_ms()})

    def register_model(self, folder: Path | str, name: str, description: str, tags: dict) -> None:
        """A finished folder as a version of the model `name` in the registry; weights that are there already get the new description."""
        with self._guarded():
            digest = hashlib.sha256()
            for file in sorted(Path(folder).glob("*.safetensors")):
                digest.update(file.read_bytes())
            tags = {key: str(value) for key, value in tags.items()} | {"digest": digest.hexdigest()}
            event = {"kind": "model", "path": str(Path(folder).resolve()), "name": name, "description": description, "tags": tags}
            self._add(event)

    def wait_until_sent(self, seconds: float = 60.0) -> None:
        """Returns when MLflow has all that was logged, or after `seconds`."""
        with self._wake:
            self._wake.wait_for(lambda: not self._journal.unsent(), seconds)

    def close(self, status: str, patience_seconds: float) -> None:
        """Ends the run; what is not sent within the patience is kept for later."""
        with self._guarded():
            self._journal.add(end=[status, max(now_ms(), self._journal.header["start_ms"])])  # clocks are set back at times
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.ident:
            self._thread.join(min(patience_seconds, 2.0) if self._failed else patience_seconds)
        self._gave_up = True
        if not self._done:
            self._warn(f"{self._journal.header['uri']} did not answer in time")
            self._journal.close()

    def _add(self, event: dict) -> None:
        with self._guarded():
            self._journal.add(event=event)
        with self._wake:
            self._wake.notify_all()

    def _save(self, name: str, save) -> Path:
        path = self._journal.path.with_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
        return path.resolve()

    def _send_all(self) -> None:
        """The thread: sends what is in the journal until the run is closed and everything is out, or it gives up."""
        journal, client = self._journal, None
        while not self._gave_up:
            try:
                client = client or mlflow_client.connect(journal, self._uri, self._folder, again=self._failed)
                mlflow_client.send(client, journal)
                if self._closing and not journal.unsent():
                    mlflow_client.finish(client, journal)
                    self._done = True
                    journal.remove()
                    send_left_behind(self._folder, self._uri)
                    return
                pause = None
            except Exception as error:
                self._warn(error)
                if self._closing:
                    return
                pause = RETRY_SECONDS
            with self._wake:
                self._wake.notify_all()  # whoever waits until all is sent
                if not self._closing and (pause or not journal.unsent()):
                    self._wake.wait_for(lambda pause=pause: self._closing or (not pause and journal.unsent()), pause)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(error)

    def _warn(self, error: object) -> None:
        """Once a run, on stderr."""
        if not self._failed:
            self._failed = True
            kept = f"what is unsent is kept in {self._journal.path.parent.parent}" if self._journal.on_disk else "nothing of this is kept"
            print(f"warning: MLflow: {scrub(error)}; the work goes on, {kept}", file=sys.stderr)


def send_left_behind(folder: Path, server: str | None = None, others: bool = False, to: str | None = None) -> list[tuple[dict, str | None]]:
    """Sends what earlier runs left in `folder`: what was meant for `server`, with `others` also the rest; or all of it `to` another server.

    Returns the header of each journal, with None where MLflow now has all of it, else the reason.
    """
    results = []
    for journal in left_behind(folder):
        meant_for = journal.header["uri"]
        known = bool(server) and public(server) == meant_for
        target = to or (server if known else meant_for)
        try:
            if not (known or others or to):
                continue
            if public(target) != meant_for:  # what one server has says nothing about another
                journal.num_sent, journal.run_id = 0, None
            mlflow_client.import_mlflow(target)
            client = mlflow_client.connect(journal, target, folder, again=True)
            mlflow_client.send(client, journal)
            mlflow_client.finish(client, journal)
            journal.remove()
            results.append((journal.header, None))
        except Exception as error:
            results.append((journal.header, scrub(error)))
            if not (others or to):  # a script that has done its work does not wait for more
                break
        finally:
            journal.close()
    return results


def address(uri: str) -> str:
    """The address of a server without user and password, which go where MLflow looks for them; that of a database as it is."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.username:
        return uri
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    return public(uri)


def public(uri: str) -> str:
    """An address that may be written down: without user and password."""
    return USERINFO.sub("", uri)


def scrub(error: object) -> str:
    """An error in one line, without secrets."""
    return redact(" ".join(str(error).split()))[:300]


def flatten(nested: dict, parent: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of a nested dictionary."""
    for key, value in nested.items():
        name = f"{parent}.{key}" if parent else str(key)
        if isinstance(value, dict):
            yield from flatten(value, name)
        else:
            yield name, value


def _workflow(path: Path) -> dict | None:
    """The workflow that a run belongs to: the complete configuration in `path`, and a short name that follows from it."""
    try:
        text = path.read_text()
        return {"id": hashlib.sha256(text.encode()).hexdigest()[:12], "params": dict(flatten(json.loads(text)))}
    except (OSError, ValueError):
        return None


def _source() -> dict[str, str]:
    """Script and commit, "-dirty" behind it if files differ; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    source = {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}
    return {**source, "mlflow.source.git.commit": commit.removesuffix("-dirty"), "git_commit": commit}


def _key(name: str) -> str:
    """A name that MLflow accepts."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:250]
