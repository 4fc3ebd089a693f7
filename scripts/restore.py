"""Fetch the results that dvc.lock names, check them byte for byte, and only then tell Snakemake that they are up to date.

Snakemake goes by times, and git and DVC write files in any order: a fresh clone with all results looks out of date. `snakemake --touch`
would make anything look right; here it is called only where code, configuration and results are those of the recorded run. DVC remembers
what a file was when it last looked, and takes a read-only file in its cache for sound: here everything is read anew.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ctrl import errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--configfile", nargs="*", default=[], help="as for snakemake, where dvc.yaml describes another experiment")
    parser.add_argument("--force", action="store_true", help="replace results in this folder that differ from the recorded ones")
    args = parser.parse_args()
    if not Path("dvc.lock").exists():
        raise errors.UserError("there is no dvc.lock here; call this in the repository's folder, after a run was recorded (dvc commit)")
    cache = Path(dvc("cache", "dir").strip()) / "files" / "md5"
    for path in corrupted(cache):
        print(f"{path}: corrupted; removed, to be fetched again", flush=True)
        path.unlink()
    with tempfile.TemporaryDirectory() as memory:
        print(dvc("pull", *(["--force"] if args.force else []), memory=memory), end="")
        changed = json.loads(dvc("status", "--json", memory=memory))
    if found := corrupted(cache):
        raise errors.UserError(f"{found[0]} is corrupted in the remote, too; push it again from where the results were made")
    if changed:
        raise errors.UserError(f"not what was recorded: {describe(changed)}; nothing was marked as up to date; see dvc status")
    config = ["--configfile", *args.configfile] if args.configfile else []
    snakemake("all", *config, "--touch", "--forceall", "--quiet", "all")
    if "Nothing to be done" not in (said := snakemake("all", *config, "-n")):
        raise errors.UserError(f"Snakemake still has work to do: {said[-500:]}")
    print("all results are here, equal to the recorded ones; snakemake and dvc have nothing to do")


def corrupted(cache: Path) -> list[Path]:
    """The files of a DVC cache whose content is not what their name says."""
    return [path for path in cache.glob("??/*") if md5(path) != path.parent.name + path.name.removesuffix(".dir")]


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def describe(status: dict) -> str:
    """`dvc status --json` in one line: what is modified, deleted or new."""
    kinds = [kind for stage in status.values() for change in stage if isinstance(change, dict) for kind in change.values()]
    found = [f"{path} ({what if isinstance(what, str) else 'changed'})" for kind in kinds for path, what in kind.items()]
    return ", ".join(found) or ", ".join(status)


def dvc(*arguments: str, memory: str | None = None) -> str:
    """With an empty folder as `memory`, DVC computes every checksum anew."""
    return call(["dvc", *arguments], {"DVC_SITE_CACHE_DIR": memory} if memory else {})


def snakemake(*arguments: str) -> str:
    return call(["snakemake", "--cores", "1", *arguments], {})


def call(command: list[str], environment: dict) -> str:
    """What a command says (Snakemake says it on stderr); UserError with its last lines where it fails."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise errors.UserError(f"{' '.join(command[:2])} failed: {(done.stderr or done.stdout)[-600:]}")
    return done.stdout if command[0] == "dvc" else done.stdout + done.stderr


if __name__ == "__main__":
    errors.main(main)
