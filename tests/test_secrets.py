"""Secrets that no message, log or record tells, and servers that nobody else reaches."""

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctrl import mlflow_client
from ctrl.errors import UserError, redact
from scripts.common import load_config
from tests.repository import ROOT

SECRETS = {"HF_TOKEN": "hf_abcdefghijklmnop", "MLFLOW_TRACKING_PASSWORD": "correct-horse", "AWS_SECRET_ACCESS_KEY": "x1y2z3-x1y2z3"}


def test_secrets_are_redacted():
    text = "GET http://me:pass@host:5000/x failed for hf_abcdefghijklmnop, correct-horse; s3://bucket/a@b stays, so does HOME"
    assert (
        redact(text, SECRETS | {"HOME": "bucket/a"})
        == "GET http://***@host:5000/x failed for ***, ***; s3://bucket/a@b stays, so does HOME"
    )
    assert str(UserError("cannot reach https://token@host/x")) == "cannot reach https://***@host/x"


def test_a_password_in_the_configuration_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("mlflow: {tracking_uri: 'http://me:hunter2hunter2@host'}")
    with pytest.raises(UserError, match="mlflow.tracking_uri holds a password") as caught:
        load_config(argparse.Namespace(config=[tmp_path / "config.yaml"]))
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_no_secret_reaches_a_log_or_a_file(tmp_path):
    """A script that logs to a server that is away, fails, and is full of secrets: what it prints and leaves behind holds none."""
    code = """
from ctrl import errors
from ctrl.tracking import run
import os
def main():
    with run({"seed": 1, "a": {"b": 2}}, "secret", "one", folder="results", patience_seconds=5) as tracker:
        tracker.log_metrics({"x": 1.0}, 0)
    raise RuntimeError(f"request to {os.environ['MLFLOW_TRACKING_URI']} with {os.environ['HF_TOKEN']} failed")
errors.main(main)
"""
    environment = os.environ | SECRETS | {"MLFLOW_TRACKING_URI": "http://me:hunter2hunter2@127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "warning: MLflow" in done.stderr
    assert "http://***@127.0.0.1:9" in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "journal.jsonl" for path in files)
    written = done.stdout + done.stderr + "".join(path.read_bytes().decode(errors="replace") for path in files)
    assert [secret for secret in (*SECRETS.values(), "hunter2") if secret in written] == []


def test_servers_are_told_to_bind_to_this_machine_alone():
    text = (ROOT / "Makefile").read_text() + "".join(path.read_text() for path in ROOT.glob("scripts/*.py"))
    assert re.search(r"^UI_HOST \?= 127\.0\.0\.1$", text, re.MULTILINE) and "--host $(UI_HOST)" in text
    assert not re.search(r"0\.0\.0\.0|share=True", text)


@pytest.mark.slow
def test_the_page_of_runs_listens_on_this_machine_alone(tmp_path):
    """The real server of `make ui`, by the Makefile's own command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "results").mkdir()
    mlflow_client._create_database(tmp_path / "results" / "mlflow.db")
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "-o", ".venv/.installed", "ui", f"PORT={port}"]
    environment = {k: v for k, v in os.environ.items() if k != "UI_HOST"} | {"PATH": path}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        listening = set()
        for _ in range(240):
            rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
            listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
            if listening or server.poll() is not None:
                break
            time.sleep(0.5)
        assert listening == {"0100007F"}, (tmp_path / "log").read_text()[-2000:]  # 127.0.0.1, and no other address
    finally:
        os.killpg(server.pid, 9)
        server.wait()
