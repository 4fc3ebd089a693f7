"""A journal, told to MLflow. Whatever is sent twice, since an answer was lost, is there once."""

import fcntl
import importlib
import json
import logging
import os
import uuid
from contextlib import contextmanager
from pathlib import Path

from ctrl.journal import Journal

MAX_BATCH = 500  # metrics a request
MAX_PARAMS = 100  # parameters a request, MLflow's limit
MAX_PARAM_LENGTH = 6000  # characters, MLflow's limit
MAX_DESCRIPTION = 5000  # characters of a model version's description, MLflow's limit
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def import_mlflow(uri: str) -> None:
    """Takes seconds."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    importlib.import_module("mlflow.tracking")
    if uri.startswith("sqlite:"):
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def connect(journal: Journal, uri: str, folder: Path, again: bool):
    """An MlflowClient on which the journal has a run. `again`: an earlier try, or another process, may have made it already."""
    from mlflow import MlflowClient

    database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if database:
        _create_database(database)
    client = MlflowClient(uri, registry_uri=uri)
    if journal.run_id is None:
        header = journal.header
        location = (database.parent / "mlruns" / header["experiment"]).absolute().as_uri() if database else None
        experiment_id = _experiment(client, header["experiment"], location)
        tags = header["tags"] | {"journal": header["id"]}
        if header["workflow"]:
            tags["mlflow.parentRunId"] = _parent(client, experiment_id, header, folder)
        run_id = _find(client, experiment_id, "journal", header["id"]) if again else None
        if run_id is None:
            run_id = client.create_run(experiment_id, header["start_ms"], tags, header["name"]).info.run_id
        _log_params(client, run_id, header["params"])  # again, where the connection was lost among them
        journal.add(run_id=run_id)
    return client


def send(client, journal: Journal) -> None:
    """Sends the events that MLflow does not have: metrics in batches, files one by one."""
    from mlflow.entities import Metric

    while unsent := journal.unsent():
        metrics, count = [], 0
        for event in unsent:
            if event["kind"] != "metrics" or (metrics and len(metrics) + len(event["values"]) > MAX_BATCH):
                break
            metrics += [Metric(key, value, event["time_ms"], event["step"]) for key, value in event["values"].items()]
            count += 1
        for start in range(0, len(metrics), MAX_BATCH):
            client.log_batch(journal.run_id, metrics=metrics[start : start + MAX_BATCH])
        if not count:
            OTHERS[unsent[0]["kind"]](client, journal.run_id, unsent[0])
            count = 1
        journal.add(num_sent=journal.num_sent + count)


def finish(client, journal: Journal) -> None:
    """Ends the run; the workflow's ends with the last of its runs."""
    status, end_ms = journal.end
    client.set_terminated(journal.run_id, status, end_ms)
    if parent := client.get_run(journal.run_id).data.tags.get("mlflow.parentRunId"):
        client.set_terminated(parent, status, end_ms)


def image_names(name: str, step: int, time_ms: int) -> tuple[str, str]:
    """The names by which MLflow's page knows the picture of a step, and the small one that it shows first."""
    stem = f"{name.replace('/', '~')}+step+{step}+timestamp+{time_ms}+{uuid.uuid4()}"
    return f"{stem}.png", f"{stem}+compressed.webp"


def _send_artifact(client, run_id: str, event: dict) -> None:
    path = Path(event["path"])
    if path.is_dir():
        client.log_artifacts(run_id, str(path), path.name)
    elif path.exists():
        client.log_artifact(run_id, str(path))


def _send_images(client, run_id: str, event: dict) -> None:
    for path in filter(os.path.exists, event["paths"]):
        client.log_artifact(run_id, path, "images")
    client.set_tag(run_id, "mlflow.loggedImages", "True")


def _send_model(client, run_id: str, event: dict) -> None:
    """A version for each digest of the weights; the newest table describes it."""
    from mlflow.exceptions import MlflowException

    name, description = event["name"], event["description"][:MAX_DESCRIPTION]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    folder = Path(event["path"])
    versions = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("digest") == event["tags"]["digest"]]
    if versions:
        client.update_model_version(name, versions[0].version, description)
        for key, value in event["tags"].items():
            client.set_model_version_tag(name, versions[0].version, key, value)
    elif folder.exists():
        client.log_artifacts(run_id, str(folder), f"adapters/{folder.name}")
        source = f"{client.get_run(run_id).info.artifact_uri}/adapters/{folder.name}"
        client.create_model_version(name, source, run_id, event["tags"], description=description)


OTHERS = {"artifact": _send_artifact, "images": _send_images, "model": _send_model}


def _experiment(client, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process was faster
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


def _parent(client, experiment_id: str, header: dict, folder: Path) -> str:
    """The run of a workflow, which has all parameters; made by one process at a time, since MLflow has no names that are unique."""
    workflow = header["workflow"]
    with _locked(folder / "mlflow.lock"):
        run_id = _find(client, experiment_id, "workflow", workflow["id"])
        if run_id is None:
            tags = {key: value for key, value in header["tags"].items() if "git" in key}
            tags |= {"experiment": header["experiment"], "workflow": workflow["id"], "mlflow.source.name": "Snakefile"}
            run_id = client.create_run(experiment_id, header["start_ms"], tags, f"workflow {workflow['id']}").info.run_id
        _log_params(client, run_id, workflow["params"])  # again, where the connection was lost among them
        return run_id


def _find(client, experiment_id: str, tag: str, value: str) -> str | None:
    runs = client.search_runs([experiment_id], f"tags.{tag} = '{value}'", max_results=1, order_by=["attributes.start_time"])
    return runs[0].info.run_id if runs else None


def _log_params(client, run_id: str, params: dict) -> None:
    from mlflow.entities import Param

    items = [Param(key, _text(value)) for key, value in params.items()]
    for start in range(0, len(items), MAX_PARAMS):
        client.log_batch(run_id, params=items[start : start + MAX_PARAMS])


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 3] + "..."


def _create_database(database: Path) -> None:
    """A complete sqlite file, or none: made under another name by one process at a time (two at once leave half a schema)."""
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with _locked(database.with_suffix(".lock")):
        if not database.exists():
            temporary = database.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            SqlAlchemyStore(f"sqlite:///{temporary.resolve()}", (database.parent / "mlruns").absolute().as_uri()).engine.dispose()
            os.replace(temporary, database)


@contextmanager
def _locked(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
