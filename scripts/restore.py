"""Fetch the results that dvc.lock names, check them byte for byte, and only then tell Snakemake that they are up to date.

Snakemake goes by times, and git and DVC write files in any order: a fresh clone with all results looks out of date. `snakemake --touch`
would make anything look right; here it is called only where DVC finds that code, configuration and results are those of the recorded run.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from ctrl import errors

CACHE = Path(".dvc/cache/files/md5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--configfile", nargs="*", default=[], help="as for snakemake: of the experiment in dvc.yaml, if it is another")
    parser.add_argument("--force", action="store_true", help="replace results in this folder that differ from the recorded ones")
    args = parser.parse_args()
    if not Path("dvc.lock").exists():
        raise errors.UserError("there is no dvc.lock here; call this in the repository's folder, after the run was recorded (dvc commit)")
    for path in corrupted(CACHE):
        print(f"{path}: corrupted; removed, to be fetched again", flush=True)
        path.unlink()
    dvc("pull", *(["--force"] if args.force else []))
    for path in corrupted(CACHE):
        path.unlink()
        raise errors.UserError(f"the remote's copy of {path} is corrupted; push it again from where the results were made")
    if changed := json.loads(dvc("status", "--json", quiet=True)):
        raise errors.UserError(
            f"what is here is not what was recorded: {describe(changed)}; see dvc status. Nothing was marked as up to date"
        )
    config = ["--configfile", *args.configfile] if args.configfile else []
    snakemake = [sys.executable, "-m", "snakemake", "--cores", "1", "all", *config]
    call([*snakemake, "--touch", "--forceall", "--quiet", "all"])
    if "Nothing to be done" not in (said := call([*snakemake, "-n"])):
        raise errors.UserError(f"Snakemake still has work to do: {said[-500:]}")
    print("all results are here, equal to the recorded ones; snakemake and dvc have nothing to do")


def corrupted(cache: Path) -> list[Path]:
    """The files of a DVC cache whose content is not what their name says. (DVC itself takes a read-only file for sound.)"""
    return [path for path in cache.glob("??/*") if md5(path) != path.parent.name + path.name.removesuffix(".dir")]


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def describe(status: dict) -> str:
    """`dvc status --json` in one line: what is modified, deleted or new."""
    kinds = [kind for stage in status.values() for change in stage if isinstance(change, dict) for kind in change.values()]
    found = [f"{path} ({what if isinstance(what, str) else 'changed'})" for kind in kinds for path, what in kind.items()]
    return ", ".join(found) or ", ".join(status)


def dvc(*arguments: str, quiet: bool = False) -> str:
    return call([sys.executable, "-m", "dvc", *arguments], quiet)


def call(command: list[str], quiet: bool = True) -> str:
    """What a command says; UserError with its last lines where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise errors.UserError(f"{' '.join(command[2:4])} failed: {(done.stderr or done.stdout)[-600:]}")
    if not quiet:
        print(done.stdout, end="", flush=True)
    return done.stdout + done.stderr if command[2] == "snakemake" else done.stdout


if __name__ == "__main__":
    errors.main(main)
