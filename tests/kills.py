"""`kill -9` at random moments over the whole workflow, until it is done all the same; its results must equal those of an undisturbed run.

python -m tests.kills --kills 30                                  both runs, in temporary folders
python -m tests.kills --kills 30 --reference ../other/checkout    compares with a run that is there already
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from tests.repository import copy_repository, environment, snakemake
from tests.warm_python import environment_of_jobs

ARGUMENTS = ("--cores", "2", "--configfile", "config/smoke.yaml")
RESULTS = Path("results/smoke")
SKIPPED = {".md", ".tex", ".txt", ".tsv"}  # logs, and the same table for people, with its seconds
MEASURED = re.compile(r"second|memory")  # what no two runs share
VICTIMS = ("everything", "everything", "the scheduler alone", "a job alone")


def content(path: Path) -> object:
    """What must be equal in both runs: tables and JSON without what was measured of time and memory, all else byte for byte."""

    def unmeasured(value: object) -> object:
        if isinstance(value, dict):
            return {key: unmeasured(v) for key, v in value.items() if not MEASURED.search(key)}
        return [unmeasured(v) for v in value] if isinstance(value, list) else value

    if path.suffix == ".json":
        return unmeasured(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [unmeasured(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix in (".parquet", ".csv"):
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        return table[[name for name in table if not MEASURED.search(name)]].to_csv()
    return path.read_bytes()


def contents(repository: Path) -> dict[str, object]:
    """Of every result, by its name."""
    files = sorted(path for path in (repository / RESULTS).rglob("*") if path.is_file() and path.suffix not in SKIPPED)
    return {str(path.relative_to(repository)): content(path) for path in files if path.suffix != ".lock"}


def differences(reference: Path, repository: Path) -> list[str]:
    """The results that are not the same in both, or not in both."""
    a, b = contents(reference), contents(repository)
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name])


def children(pid: int) -> list[int]:
    """All processes below `pid`."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    pairs = list(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    found, parents = [], {pid}
    while below := [child for child, parent in pairs if parent in parents]:
        found, parents = found + below, set(below)
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended by itself


def attempt(repository: Path, target: str, wait_seconds: float, victim: str) -> tuple[bool, list[int]]:
    """Runs the workflow for so long after its first job began, and kills the victim.

    Returns whether it was done before, and the jobs that it left without their scheduler.
    """
    with open(repository / "attempts.txt", "a") as log:
        command = [sys.executable, "-m", "snakemake", target, *ARGUMENTS]
        process = subprocess.Popen(command, cwd=repository, env=environment(repository) | environment_of_jobs(), stdout=log, stderr=log)
        while process.poll() is None and not children(process.pid):
            time.sleep(0.1)
        try:
            return process.wait(wait_seconds) == 0, []
        except subprocess.TimeoutExpired:
            below = children(process.pid)
        chosen = {"everything": [process.pid, *below], "the scheduler alone": [process.pid], "a job alone": below[-1:]}[victim]
        kill(chosen or [process.pid])
        process.wait()  # of a job that is killed alone the scheduler learns by itself
    return False, below if victim == "the scheduler alone" else []


def disturb(repository: Path, num_kills: int, longest_wait: float, generator: random.Random, target: str = "all") -> int:
    """Kills the workflow up to `num_kills` times, and lets it end; returns the number of kills that it took before it was done."""
    orphans: list[int] = []
    for number in range(num_kills):
        wait, victim = generator.uniform(0, longest_wait), generator.choice(VICTIMS)
        started = time.monotonic()
        done, left = attempt(repository, target, wait, victim)
        orphans += left
        finished = len(list((repository / RESULTS).rglob("*")))
        print(f"kill {number + 1}: {victim} after {time.monotonic() - started:.0f} s; {finished} files", flush=True)
        if done:
            kill(orphans)
            return number
        shutil.rmtree(repository / ".snakemake" / "locks", ignore_errors=True)  # what `snakemake --unlock` does, which takes longer
    for _ in range(len(orphans) + 1):  # a job left alone may still hold what it writes: then the rerun is refused, and comes again
        last = snakemake(repository, target, *ARGUMENTS, timeout=3600)
        if last.returncode == 0:
            return num_kills
        assert "another process is writing" in last.stdout, last.stdout[-5000:]
        kill(orphans)
    raise AssertionError(last.stdout[-5000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many (default: %(default)s); a workflow that is done is begun anew")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: %(default)s)")
    parser.add_argument("--longest-wait", type=float, default=20, help="from the first job to a kill, in seconds (default: %(default)s)")
    parser.add_argument("--reference", type=Path, help="a checkout with the results of an undisturbed run")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = args.reference
        if reference is None:
            reference = copy_repository(Path(folder) / "reference")
            assert snakemake(reference, "all", *ARGUMENTS, timeout=7200).returncode == 0
        kills, rounds = 0, 0
        while kills < args.kills:
            repository, rounds = copy_repository(Path(folder) / f"round{rounds}"), rounds + 1
            kills += max(1, disturb(repository, args.kills - kills, args.longest_wait, generator))
            found = differences(reference, repository)
            compared = len(contents(reference))
            print(f"round {rounds}: {kills} kills so far, {len(found)} of {compared} results differ {found[:5]}", flush=True)
            if found:
                sys.exit(1)


if __name__ == "__main__":
    main()
