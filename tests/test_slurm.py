"""`snakemake --profile slurm` on a real cluster of one node: a whole experiment in a fresh clone, and every way in which a job can be lost.

Adapters of recipes that differ in nothing but their name have the same weights, bit for bit: what was disturbed is held against `ctrl`,
which was not.
"""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ctrl.io import load_metadata, load_tensors
from tests.repository import few_images, fresh_clone
from tests.slurm_cluster import missing, running, wait_for
from tests.warm_python import environment_of_jobs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "there is a cluster")]
FAILURES = "SLURM_FAILURES" in os.environ
NUM_UPDATES = 20 if FAILURES else 2
LOST = ["cancelled", "late", "greedy", "requeued", "stranded"]
SMALL = f"""
pool: {{images_per_subject: 8}}
cells: {{min_probability: 0.1}}
evaluation: {{images_per_label: 8}}
tuning: {{num_images: 16}}
finetune: {{num_updates: {NUM_UPDATES}, probe: {{every: {NUM_UPDATES}}}}}
adapters: {{cancelled: {{}}, late: {{}}, greedy: {{}}, requeued: {{}}, stranded: {{}}}}
cluster:
  cpus: 1
  gpu: {{partition: gpu, mem_mb: 3000, minutes: 20}}
  finetune: {{partition: gpu, mem_mb: 3500, minutes: 30}}
"""
TARGETS = [f"results/smoke/adapters/{name}/adapter.json" for name in LOST]
ON_GPU = {"sample_pool", "train_classifier", "sample_val", "finetune", "sampling"}
ON_CPU = {"dataset", "estimate_cells", "evaluation", "tabulate", "plot_figures"}


@pytest.fixture(scope="module")
def cluster():
    with running() as cluster:
        yield cluster


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C, by which Snakemake cancels its jobs and unlocks its folder."""
    process.send_signal(signal.SIGINT)
    process.wait(120)


class Clone:
    """A fresh clone, whose user has an empty home."""

    def __init__(self, folder: Path, cluster):
        self.folder, self.home, self.cluster = fresh_clone(folder / "clone"), folder / "home", cluster
        few_images(self.folder)
        self.home.mkdir()
        (self.folder / "config" / "small.yaml").write_text(SMALL)
        self.results, self.more = self.folder / "results" / "smoke", []

    def on(self, cluster, *configs: str) -> "Clone":
        """The same clone on another cluster, with `configs` laid over its own."""
        other = copy.copy(self)
        other.cluster, other.more = cluster, configs
        return other

    def start(self, *arguments: str) -> subprocess.Popen:
        """`snakemake --profile slurm ARGUMENTS`, in the background; what it says goes to `said`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "SNAKEMAKE", "SLURM", "XDG", "HF_"))}
        environment = kept | {"HOME": str(self.home), "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"} | self.cluster.environment
        if not FAILURES:  # where SLURM's signals and limits must meet the job's own process
            environment |= environment_of_jobs()
        command = [sys.executable, "-m", "snakemake", "--profile", "slurm", *arguments]
        command += ["--configfile", "config/smoke.yaml", "config/small.yaml", *self.more]
        with (self.folder / "said").open("w") as said:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=said, stderr=said)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def run(self, *arguments: str, timeout: float = 1000) -> int:
        """The exit code of the same in the foreground; again, as docs/slurm.md says, where SLURM took too long to answer."""
        deadline = time.monotonic() + timeout
        process = self.start(*arguments)
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return process.returncode
            if "Falling back to 'sacct'" in self.said():
                interrupt(process)
                process = self.start(*arguments)
            if held := [job for job in self.jobs() if "held" in job["Reason"]]:
                interrupt(process)
                pytest.fail(f"SLURM will never start this job: {held}")
            time.sleep(1)
        jobs = self.jobs()
        interrupt(process)
        pytest.fail(f"still running after {timeout} s: {self.said()[-3000:]}\n{jobs}")

    def jobs(self) -> list[dict[str, str]]:
        """What SLURM says of each job; `Comment` is what Snakemake noted on it, such as rule_finetune_wildcards_smoke_ctrl."""
        lines = self.cluster("scontrol", "show", "jobs", "-o").splitlines()
        return [job for line in lines if "Comment" in (job := dict(re.findall(r"(\S+?)=(\S*)", line)))]


@pytest.fixture(scope="module")
def clone(cluster, tmp_path_factory):
    """After the whole experiment."""
    clone = Clone(tmp_path_factory.mktemp("clone"), cluster)
    assert clone.run("all") == 0, clone.said()[-5000:]
    return clone


def test_the_whole_experiment_runs_in_a_fresh_clone(clone):
    assert (clone.results / "tables" / "results.csv").is_file() and (clone.results / "figures" / "teaser.png").is_file()
    assert {path.name for path in clone.home.iterdir()} <= {".cache", ".config"}, "caches, and nothing that is needed"
    assert clone.run("all") == 0 and "Nothing to be done" in clone.said()


def test_jobs_ask_for_what_the_config_says(clone):
    found = set()
    for job in clone.jobs():
        name = next((name for name in ON_GPU | ON_CPU if job["Comment"].startswith(f"rule_{name}_")), job["Comment"])
        found.add(name)
        gpus, memory = "gres:gpu:1" in job.get("TresPerJob", ""), int(re.search(r"mem=(\d+)M", job["TRES"])[1])
        assert job["JobState"] == "COMPLETED" and job["Partition"] == "gpu"
        assert gpus == (name in ON_GPU), name
        if name == "finetune":
            assert (memory, job["TimeLimit"]) == (3500, "00:30:00")
        elif name in ON_GPU:
            assert memory == 3000, name
    assert found == ON_GPU | ON_CPU


def test_a_log_for_each_job(clone):
    logs = {path.stem for path in (clone.results / "logs").glob("*.txt")}
    assert {"finetune_ctrl", "sample_rejection", "sample_rejection_reference", "evaluate_ctrl", "tabulate_results"} <= logs
    ids = {path.stem for path in (clone.folder / ".snakemake" / "slurm_logs").rglob("*.log")}
    assert {job["JobId"] for job in clone.jobs()} <= ids


@pytest.mark.parametrize("gpus", [1, 0])
def test_two_nodes_train_together(clone, gpus):
    """A recipe of another name than `ctrl`, with its settings: the same adapter but for rounding, by a process on each node."""
    name = ["requeued", "stranded"][gpus]
    (clone.folder / "config" / "nodes.yaml").write_text(f"cluster: {{finetune: {{nodes: 2, gpus: {gpus}}}}}")
    with running(num_nodes=2) as cluster:
        other = clone.on(cluster, "config/nodes.yaml")
        assert other.run(f"results/smoke/adapters/{name}/adapter.json") == 0, clone.said()[-5000:]
        (job,) = [job for job in other.jobs() if job["Comment"].startswith("rule_finetune_")]
    assert (job["JobState"], job["NumNodes"]) == ("COMPLETED", "2") and ("gres:gpu:1" in job.get("TresPerNode", "")) == bool(gpus)
    log = (clone.results / "logs" / f"finetune_{name}.txt").read_text()
    assert "2 processes" in log, log
    alone, together = (load_tensors(clone.results / "adapters" / of / "pytorch_lora_weights.safetensors") for of in ("ctrl", name))
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def lost(clone):
    """Five fine-tunings at once, each lost in a way of its own: (exit code of Snakemake, SLURM's state of each, history of each so far)."""
    if not FAILURES:
        pytest.skip("takes many minutes, and a machine with nothing else to do: SLURM_FAILURES=1 asks for it")
    cluster = clone.cluster
    cluster("scontrol", "update", f"NodeName={cluster.nodes[0]}", "State=DRAIN", "Reason=wait")
    process = clone.start(*TARGETS, "--keep-going")

    def ids() -> dict[str, str]:
        return {name: job["JobId"] for job in clone.jobs() for name in LOST if job["Comment"].endswith(f"_{name}")}

    job = wait_for(lambda: len(found := ids()) == len(LOST) and found, "five jobs in the queue", 200, 0.5)
    cluster("scontrol", "update", f"JobId={job['greedy']}", "MinMemoryNode=300")
    cluster("scontrol", "update", f"NodeName={cluster.nodes[0]}", "State=RESUME")

    def file(name: str) -> Path:
        return clone.results / "adapters" / name / "checkpoints" / "checkpoint.safetensors"

    def show(name: str, field: str) -> str:
        return re.search(rf" {field}=(\S+)", cluster("scontrol", "show", "job", "-o", job[name]))[1]

    def again(name: str) -> None:
        wait_for(lambda: show(name, "JobState") == "PENDING", f"{name} to be in the queue again", 200)
        cluster("scontrol", "update", f"JobId={job[name]}", "StartTime=now")  # SLURM would wait for two minutes

    def send(name: str, number: int) -> None:
        for process_id in cluster.job_processes(job[name], "python\0scripts/finetune.py"):
            os.kill(process_id, number)

    waiting = {"cancelled", "late", "requeued", "stranded"}
    while waiting:  # each stands still from its first checkpoint on, so that none is done before it is disturbed
        name = wait_for(lambda: next((name for name in waiting if file(name).exists()), ""), f"a checkpoint of {waiting}", 400)
        send(name, signal.SIGSTOP)
        waiting.remove(name)
    cluster("scontrol", "update", f"JobId={job['late']}", "EndTime=now+1")
    cluster("scancel", job["cancelled"])
    cluster("scontrol", "requeue", job["requeued"])
    for name in ("cancelled", "requeued"):
        send(name, signal.SIGCONT)
    wait_for(lambda: show("late", "JobState") != "RUNNING", "the end of its time", 300)
    send("late", signal.SIGCONT)  # SIGTERM waits for it; SIGKILL comes a minute after
    again("requeued")
    wait_for(lambda: show("requeued", "JobState") == "COMPLETED", "the job that was requeued", 400)
    cluster.stop_node(cluster.nodes[0])
    wait_for(lambda: "down" in cluster("sinfo", "-h", "-o", "%T"), "the node to be down", 120)
    cluster.start_node(cluster.nodes[0])
    time.sleep(5)  # a job that starts in the second in which its node comes back makes slurmctld 22.05 crash (build_job_info_resp)
    again("stranded")
    code = process.wait(600)
    kept = {name: json.loads(load_metadata(file(name))["history"]) for name in ("cancelled", "late")}
    return code, {name: (show(name, "JobState"), int(show(name, "Restarts"))) for name in LOST}, kept


def test_what_was_lost_is_said(clone, lost):
    code, states, kept = lost
    assert code != 0
    assert states["cancelled"] == ("CANCELLED", 0) and states["late"] == ("TIMEOUT", 0)
    assert states["greedy"][0] in ("FAILED", "OUT_OF_MEMORY", "CANCELLED"), states
    assert states["requeued"] == states["stranded"] == ("COMPLETED", 1)
    for name, history in kept.items():
        log = (clone.results / "logs" / f"finetune_{name}.txt").read_text()
        assert f"SIGTERM: stopped after update {len(history)} of {NUM_UPDATES}; " in log


def test_the_same_command_finishes_with_the_adapters_of_a_run_that_nobody_disturbed(clone, lost):
    assert clone.run(*TARGETS, "--keep-going") == 0, clone.said()[-3000:]
    for name in LOST:
        folder, whole = clone.results / "adapters" / name, clone.results / "adapters" / "ctrl"
        for file in ("pytorch_lora_weights.safetensors", "label_embedding.safetensors"):
            assert (folder / file).read_bytes() == (whole / file).read_bytes(), name
        assert not (folder / "checkpoints").exists()
    for name, before in lost[2].items():
        rows = [json.loads(line) for line in (clone.results / "adapters" / name / "history.jsonl").read_text().splitlines()]
        assert rows[: len(before)] == before and len(rows) == NUM_UPDATES, "seconds included: no update was done twice"
