"""Folders that strangers made: no name in them, and no link, leads out of them."""

import os
from pathlib import Path

from ctrl.errors import UserError


def is_inside(folder: Path | str, name: str) -> bool:
    """Whether `folder / name`, with every link followed, lies in `folder`.

    A snapshot in the hub's cache is a folder of links into the same model's `blobs`: these count as inside.
    """
    root = Path(folder).absolute()
    allowed = [root.resolve()]
    if root.parent.name == "snapshots":
        allowed.append((root.parent.parent / "blobs").resolve())
    if "\0" in str(name):
        return False
    try:
        target = (root / name).resolve()
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        return False
    return any(target.is_relative_to(one) for one in allowed)


def check_links(folder: Path | str, where: str = "") -> None:
    """Raises UserError where something in `folder` is a link out of it, or neither a file nor a folder (a pipe, a device)."""
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if not is_inside(folder, os.path.relpath(path, folder)):
                raise UserError(f"{where}{path} is a link to a place outside of {folder}: put the file itself there")
            if path.is_symlink() and not path.exists():
                raise UserError(f"{where}{path} is a link to a file that is not there: fetch the folder again, a download was interrupted")
            if not path.is_file() and not path.is_dir():
                raise UserError(f"{where}{path} is neither a file nor a folder: delete it")
