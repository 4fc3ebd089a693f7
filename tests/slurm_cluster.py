"""A SLURM cluster of one node, or of several on this machine, in a folder of its own and on ports of its own: nothing outside the folder is
written, none is met.

Folder and nodes have short names whatever the machine and the test are called: slurmd has a socket for each step at
FOLDER/spool-NODE/NODE_JOB.STEP, and where that has 108 bytes, SLURM holds the job for ever (launch_failed_requeued_held).

Real daemons (Debian's packages slurm-wlm and munge), without accounting database, with GPUs that are files alone. By hand:

    python -m tests.slurm_cluster     # until Ctrl-C; prints the variables that make sbatch, squeue and scontrol find it
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ["munged", "mungekey", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun"]
PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CPUS, MEMORY_MB, GPUS = 8, 64000, 8  # what the node says it has, to run some jobs at once; nothing here needs that much
CONF = """
ClusterName=ctrl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Memory is looked at every second, and who has more than it asked for is killed: the limit without cgroups.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=10
KillWait=60
MessageTimeout=10
MinJobAge=3600
MpiDefault=none
SlurmdParameters=config_overrides
GresTypes=gpu
LaunchParameters=disable_send_gids
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN\n"


def missing() -> str:
    """Why no cluster can be started here; nothing where one can."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=PLACES)]
    return f"needs the Debian packages slurm-wlm and munge: there is no {', '.join(lacking)}" if lacking else ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """A running cluster; `environment` makes SLURM's programs, and so Snakemake, find it."""

    def __init__(self, folder: Path, num_nodes: int = 1):
        self.folder, self.processes, host = folder, {}, socket.gethostname().split(".")[0]
        self.nodes = [f"node{k}" for k in range(num_nodes)]
        for name in ("state", "bin", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        amounts = {"host": host, "cpus": CPUS, "memory": MEMORY_MB, "gpus": GPUS}
        nodes = [NODE.format(name=node, port=free_port(), **amounts) for node in self.nodes]
        (folder / "slurm.conf").write_text(CONF.format(host=host, port=free_port(), folder=folder, user=user) + "".join(nodes))
        for k in range(GPUS):
            (folder / f"gpu{k}").touch()  # SLURM only counts and hands out the files
        gpus = [f"NodeName={node} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n" for node in self.nodes]
        (folder / "gres.conf").write_text("".join(gpus))
        # Snakemake's SLURM plugin takes SLURM_CONF away from a job, in which these then look for /etc/slurm/slurm.conf.
        for name in ("srun", "scontrol"):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name, path=PLACES)} "$@"\n')
            program.chmod(0o755)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder / 'bin'}{os.pathsep}{PLACES}"}

    def start(self, program: str, *arguments: str, name: str = "") -> None:
        """Starts a daemon in the foreground, in a session of its own, as `name` where there are several of a program."""
        name = name or program
        with (self.folder / f"{name}.out").open("a") as out:
            self.processes[name] = subprocess.Popen(
                [shutil.which(program, path=PLACES), *arguments], env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True, cwd=self.folder,  # where a daemon that crashes leaves its core
            )  # fmt: skip

    def start_all(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        self.start("munged", "--foreground", "--force", f"--key-file={key}", *(f"--{k}={self.folder / name}" for k, name in files.items()))
        wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.nodes), "the nodes")

    def start_node(self, node: str) -> None:
        self.start("slurmd", "-D", "-N", node, name=f"slurmd-{node}")

    def stop_node(self, node: str) -> None:
        """It goes down, and was the only one: its daemon and every process of the jobs are gone at once."""
        self.kill(f"slurmd-{node}", signal.SIGKILL)
        self.kill_jobs()

    def kill_jobs(self) -> None:
        for process in [*self.job_processes(command="slurmstepd"), *self.job_processes()]:  # nobody is left to say how a job ended
            with suppress(ProcessLookupError):  # it is gone
                os.kill(process, signal.SIGKILL)

    def kill(self, name: str, number: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def job_processes(self, job: str = "", command: str = "") -> list[int]:
        """Every process with `command` in its command line that runs in a job of this cluster (in `job`); without `job`, slurmstepd too."""
        mark, found = f"{self.folder}/".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment, line = (path / "environ").read_bytes(), (path / "cmdline").read_bytes()
                in_job = f"SLURM_JOB_ID={job}".encode() + b"\0" * bool(job) in environment
                if mark in environment and (in_job or (not job and b"slurmstepd" in line)) and command.encode() in line:
                    found.append(int(path.name))
            except OSError:
                pass  # it is gone
        return found

    def __call__(self, *command: str) -> str:
        """The output of one of SLURM's programs; RuntimeError where a daemon has ended by itself, as slurmctld 22.05 can."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}; what it said is in {self.folder / name}.out")
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=30, check=False).stdout

    def stop(self) -> None:
        """Stops every job and daemon; nothing of them is left."""
        for name in list(reversed(self.processes)):  # the nodes, the controller, munge
            self.kill(name)
        self.kill_jobs()


def wait_for(condition, what: str, seconds: float = 60, every: float = 0.1):
    """The first true answer of `condition()`; TimeoutError naming what was waited for."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(every)
    return answer


@contextmanager
def running(num_nodes: int = 1) -> Iterator[Cluster]:
    """A cluster, from start to stop; its folder is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder), num_nodes)
        try:
            cluster.start_all()
            yield cluster
        finally:
            cluster.stop()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with running() as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']} PATH={cluster.folder / 'bin'}:$PATH", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
