"""results/{experiment}/config.json, which every script is given: written where it differs, and never under a workflow that runs by it."""

import json
import os
from pathlib import Path

from ctrl.errors import UserError


def write(path: Path, config: dict, locks: Path, unlocking: bool) -> None:
    """Writes the complete configuration atomically; leaves a file that says the same alone.

    `locks` is the folder where Snakemake lists what running workflows read and write. UserError where one of them works in the folder of
    `path` by another configuration (unless this start is there to remove the lock), or where the file cannot be written.
    """
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    try:
        if path.exists() and path.read_text() == text:
            return
        if not unlocking and path.exists() and any(f"{path.parent}/" in lock.read_text() for lock in locks.glob("*.lock")):
            raise UserError(
                f"a workflow runs in {path.parent} by another configuration: wait for its end; if it was killed, repeat with --unlock, "
                "and then without"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder") from error
