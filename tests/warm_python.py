"""A Python whose libraries are loaded already: the workflow's scripts start in forks of it, and not in 8 seconds each.

Tests that run the workflow for its results use it (`repository.snakemake`); those of clusters and kills start Python as users do. In the
shells that find BASH_ENV in their environment, `python SCRIPT ...` is a function: it hands its arguments, folder, environment and streams
to a server, which forks, and waits for the exit code. A fork loads the code in its own PYTHONPATH: the server loads libraries alone.
"""

import array
import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

LIBRARIES = ["torch", "diffusers", "peft", "transformers", "torch._dynamo", "pandas", "matplotlib.figure", "scipy.stats", "scipy.optimize"]
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
def environment_of_jobs() -> dict[str, str]:
    """What the environment of Snakemake needs so that its jobs start in forks; starts this process's server, which ends with it."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    address, client, shell = str(folder / "socket"), folder / "client.py", folder / "shell"
    client.write_text(CLIENT.format(address=address))
    shell.write_text(
        f'python() {{ case "$1" in scripts/*.py) {sys.executable} -SEs {client} "$@" ;; *) {sys.executable} "$@" ;; esac; }}\n'
    )
    server = subprocess.Popen([sys.executable, __file__, address], cwd=folder)
    atexit.register(server.terminate)
    deadline = time.monotonic() + 120
    while not Path(address).exists():
        assert server.poll() is None and time.monotonic() < deadline, "the server of warm processes did not start"
        time.sleep(0.05)
    return {"BASH_ENV": str(shell)}


def run(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
    """`python ARGUMENTS` in this very process, a fork; its exit code."""
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    script, *sys.argv[1:] = arguments
    sys.argv[0] = script
    sys.path[:] = [str(Path(script).parent.resolve()), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    try:
        runpy.run_path(script, run_name="__main__")
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
    """What the client sent, and its three streams."""
    size, ancillary, *_ = client.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i", ancillary[0][2]).tolist()
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(1 << 16)
    return json.loads(request), streams


def serve(address: str) -> None:
    """Forks for every client, and tells it how that ended; ends with the process that started it."""
    for library in LIBRARIES:
        __import__(library)
    parent, running = os.getppid(), {}
    server = socket.socket(socket.AF_UNIX)
    server.bind(address + ".new")
    server.listen()
    server.settimeout(0.02)
    os.rename(address + ".new", address)
    while os.getppid() == parent:
        try:
            client, _ = server.accept()
            client.setblocking(True)
            request, streams = read_request(client)
            if (pid := os.fork()) == 0:
                os._exit(run(*request, streams))
            running[pid] = client
            for stream in streams:
                os.close(stream)
        except TimeoutError:
            pass
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                with running.pop(pid) as client:
                    client.sendall(bytes([code if code >= 0 else 128 - code]))


if __name__ == "__main__":
    serve(sys.argv[1])
