"""A copy of the repository for tests that run its workflow, and how to run Snakemake there."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.warm_python import environment_of_jobs

ROOT = Path(__file__).resolve().parent.parent
NUM_IMAGES = 2500
COPIED = ["Snakefile", "workflow", "config", "profiles", "slurm", "scripts", "ctrl"]


def copy_repository(folder: Path) -> Path:
    """What the workflow needs, in `folder`; resources by links, but for the images, of which it has NUM_IMAGES."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "resources").mkdir()
    for path in (ROOT / "resources").iterdir():
        (folder / "resources" / path.name).symlink_to(path)
    few_images(folder)
    return folder


def few_images(folder: Path) -> None:
    """Gives the repository in `folder` the first NUM_IMAGES of the embedded images alone: no test needs 10,000."""
    images = folder / "resources" / "fashion-mnist"
    images.unlink() if images.is_symlink() else shutil.rmtree(images)
    images.mkdir()
    for path in (ROOT / "resources" / "fashion-mnist").glob("*.gz"):
        data, head = gzip.decompress(path.read_bytes()), 16 if "images" in path.name else 8  # bytes of the file's header
        size = (len(data) - head) // int.from_bytes(data[4:8], "big")
        kept = data[:4] + NUM_IMAGES.to_bytes(4, "big") + data[8 : head + NUM_IMAGES * size]
        (images / path.name).write_bytes(gzip.compress(kept, mtime=0))


def environment(folder: Path) -> dict[str, str]:
    """That of a process that runs the code in `folder`, without settings of this one's Snakemake and MLflow."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "SNAKEMAKE"))} | {"PYTHONPATH": str(folder)}


def fresh_clone(folder: Path) -> Path:
    """What a clone of the repository, with its files as they are now, has in `folder`. RuntimeError outside of a git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise RuntimeError("no git checkout")
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def snakemake(folder: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """`snakemake ARGUMENTS` in `folder`, with the code that is there, its jobs in forks of a warm Python; stderr goes to stdout."""
    command, streams = [sys.executable, "-m", "snakemake", *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(
        command, cwd=folder, env=environment(folder) | environment_of_jobs(), **streams, text=True, timeout=timeout, check=False
    )
