"""The Python that the workflow's scripts start in forks of: it answers as Python does, and outlives what happens to its clients."""

import os
import subprocess
import sys
import time

import pytest

from tests.warm_python import environment_of_jobs

pytestmark = pytest.mark.slow
SCRIPT = """
import os, subprocess, sys, time
print(sys.argv[1:], os.environ["WORD"], "torch" in sys.modules, __name__)
if sys.argv[1] == "sleep":
    open("pid", "w").write(str(os.getpid()))
    time.sleep(60)
if sys.argv[1] == "another":
    code = "import sys; print(sys.argv, 'torch' in sys.modules, __name__, flush=True); sys.exit(3)"
    print(subprocess.run([sys.executable, "-c", code, "word"]).returncode)
sys.exit({"seven": 7, "text": "a reason", "none": None}.get(sys.argv[1], 0) if sys.argv[1] != "raise" else 1 / 0)
"""


@pytest.fixture
def shell(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "s.py").write_text(SCRIPT)
    environment = os.environ | environment_of_jobs() | {"WORD": "hello"}
    return lambda word: subprocess.Popen(
        ["bash", "-c", f"python scripts/s.py {word} 2>&1"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("word", "code"), [("seven", 7), ("text", 1), ("none", 0), ("raise", 1)])
def test_exit_codes_streams_and_environment(shell, word, code):
    process = shell(word)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code and f"['{word}'] hello True __main__\n" in said
    assert ("a reason" in said.splitlines()) == (word == "text") and ("ZeroDivisionError" in said) == (word == "raise")


def test_a_python_that_a_job_starts_is_a_fork_of_the_same(shell):
    said, _ = shell("another").communicate(timeout=60)
    assert "['-c', 'word'] True __main__" in said and said.splitlines()[-1] == "3"


def test_a_client_that_is_killed_takes_its_fork_with_it_and_not_the_server(shell, tmp_path):
    process = shell("sleep")
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")
    assert shell("none").wait(60) == 0


def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    code = "from tests.warm_python import *; print(environment_of_jobs()['BASH_ENV'], flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    folder = os.path.dirname(done.stdout.strip())
    deadline = time.monotonic() + 10
    while (servers := subprocess.run(["pgrep", "-f", f"{folder}/socket"], stdout=subprocess.PIPE, text=True).stdout) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert not servers
