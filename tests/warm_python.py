"""A Python whose libraries are loaded already: the workflow's scripts start in forks of it, and not in ten seconds each.

What `repository.snakemake` runs uses it. In the shells that find BASH_ENV in their environment, `python SCRIPT ...` is a function: it hands
its arguments, folder, environment and streams to a server, which forks, and waits for the exit code. A fork loads the code in its own
PYTHONPATH: the server loads libraries alone. Two things are not as in a Python of one's own: all forks have one seed of hashes, and one
thread, whatever a script asks for: two wait for each other where other tests run beside. A fork dies with its client, but no other signal
reaches it, and no job's accounting sees it: where those count, test_slurm starts jobs as users do.
"""

import array
import atexit
import contextlib
import functools
import json
import multiprocessing.process
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

LIBRARIES = [
    "torch",
    "torch._dynamo",
    "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim",
    "transformers.models.clip.modeling_clip",
    "pandas",
    "pyarrow.parquet",
    "matplotlib.figure",
    "scipy.stats",
    "scipy.optimize",
    "jsonschema",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "sqlalchemy.dialects.sqlite",
    "alembic.command",
]
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")  # of the environment that libraries are loaded in
THREADS = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # they read it when they are loaded
CLIENT = """
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(request)
    answer = server.recv(1)
sys.exit(answer[0] if answer else 1)
"""


@functools.cache
def client_of_server() -> Path:
    """The script whose arguments, a script and its own, run in a fork; starts this process's server, which ends with it."""
    from ctrl.mlflow_client import ENVIRONMENT  # what MLflow reads when it is loaded; not above: the server knows no code of ours

    folder = Path(tempfile.mkdtemp(prefix="warm", dir="/tmp"))  # a socket's address has 108 bytes at most
    address, client = str(folder / "socket"), folder / "client.py"
    client.write_text(CLIENT.format(address=address))
    environment = {key: os.environ[key] for key in KEPT if key in os.environ} | THREADS | ENVIRONMENT
    server = subprocess.Popen([sys.executable, __file__, address, str(os.getpid())], cwd=folder, env=environment)
    atexit.register(server.terminate)
    deadline = time.monotonic() + 120
    while not Path(address).exists():
        assert server.poll() is None and time.monotonic() < deadline, "the server of warm processes did not start"
        time.sleep(0.05)
    return client


@functools.cache
def environment_of_jobs() -> dict[str, str]:
    """What the environment of Snakemake needs so that its jobs start in forks."""
    client, python = client_of_server(), shlex.quote(sys.executable)
    shell = client.with_name("shell")
    shell.write_text(f'python() {{ case "$1" in scripts/*.py) {python} -SEs {client} "$@" ;; *) {python} "$@" ;; esac; }}\n')
    executable = client.with_name("python")  # what a fork takes for its own Python: whose `-c CODE` is a fork too
    executable.write_text(f'#!/bin/sh\ncase "$1" in -c) exec {python} -SEs {client} "$@" ;; *) exec {python} "$@" ;; esac\n')
    executable.chmod(0o700)
    return {"BASH_ENV": str(shell), "WARM_PYTHON": str(executable)}


def command(script: Path | str, *arguments: str) -> list[str]:
    """For subprocess: `python SCRIPT ARGUMENTS` in a fork."""
    return [sys.executable, "-SEs", str(client_of_server()), str(script), *arguments]


def run(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
    """`python ARGUMENTS` in this very process, a fork; its exit code."""
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = environment.get("WARM_PYTHON", sys.executable)
    script, *sys.argv[1:] = arguments
    sys.argv[0] = script
    source = sys.argv.pop(1) if script == "-c" else ""
    first = "" if source else str(Path(script).parent.resolve())
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    try:
        exec(source, {"__name__": "__main__"}) if source else runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def read_request(client: socket.socket) -> tuple[list, list[int]]:
    """What the client sent, and its three streams; ConnectionError where it was cut off."""
    size, ancillary, *_ = client.recvmsg(4, socket.CMSG_SPACE(12))
    if len(size) < 4 or not ancillary:
        raise ConnectionError("no request")
    request, length = b"", int.from_bytes(size, "big")
    while len(request) < length:
        if not (part := client.recv(1 << 16)):
            raise ConnectionError("half a request")
        request += part
    return json.loads(request), array.array("i", ancillary[0][2]).tolist()


def start(server: socket.socket, running: dict[int, socket.socket]) -> None:
    """Forks for the next client, if there is one."""
    try:
        client, _ = server.accept()
        client.setblocking(True)
        request, streams = read_request(client)
    except (TimeoutError, ConnectionError):
        return
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in (server, client, *running.values()):
            other.close()
        os._exit(run(*request, streams))
    running[pid] = client
    for stream in streams:
        os.close(stream)


def gone(client: socket.socket) -> bool:
    """Whether it was closed; an end of the stream is all that a client says after its request."""
    try:
        return client.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def serve(address: str, parent: int) -> None:
    """Forks for every client, and tells it how that ended; ends with the process `parent`, and its forks with it or with their client."""
    for library in LIBRARIES:
        __import__(library)
    torch = sys.modules["torch"]
    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None
    sys.modules["sqlalchemy.orm"].configure_mappers()  # a second that each fork would need
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server, running = socket.socket(socket.AF_UNIX), {}
    server.bind(address + ".new")
    server.listen()
    server.settimeout(0.02)
    os.rename(address + ".new", address)
    try:
        while os.getppid() == parent:
            start(server, running)
            for pid, client in list(running.items()):
                if gone(client):
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    with running.pop(pid), contextlib.suppress(OSError):
                        client.sendall(bytes([code if code >= 0 else 128 - code]))
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(Path(address).parent, ignore_errors=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
