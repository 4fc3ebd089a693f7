"""A Python file of the user's own, as the configuration names it: the one place where code from outside of the project is run."""

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ctrl.errors import UserError, is_out_of_memory
from ctrl.names import COLUMN


def is_own(name: object) -> bool:
    """Whether the `name` of an oracle or a network is a Python file, and not one of the project's."""
    return isinstance(name, str) and name.endswith(".py")


def digest(path: str | Path) -> str:
    """The SHA-256 of a file's content; UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}: give the path of a Python file, from the folder that the command is started in")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load(path: str | Path, attribute: str, sha256: str | None = None):
    """What the file at `path` calls `attribute`.

    UserError in one line where the file is missing, fails, has no such name, or is no longer the one with this `sha256`.
    """
    found = digest(path)
    if sha256 not in (None, found):
        raise UserError(f"{path} has changed since the results that name it were made: make them again")
    spec = importlib.util.spec_from_file_location(f"own_{found[:16]}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with explained(path):
        spec.loader.exec_module(module)
    if not callable(getattr(module, attribute, None)):
        raise UserError(f"{path} has no {attribute}: see docs/your-own.md for what it must hold")
    return getattr(module, attribute)


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Inside, an error of the file at `path` becomes a UserError that says where in it, and what."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        here = Path(path).resolve()
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == here]
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == here:
            lines = [error.lineno]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{where}: {type(error).__name__}: {str(error)[:300]}") from error


def files_of(config: dict, arguments: Sequence[str] = ()) -> dict[str, list[str]]:
    """The files that a configuration names, which are inputs of the rules: `oracles` with their weights, `networks`, and the `judge`'s.

    UserError where a Python file is missing, or the weights of the aesthetic oracle are: hours would pass before they are needed. A dry
    run, by Snakemake's `arguments`, says so and goes on.
    """
    label = config["label"]
    factors = label["factors"] or [label]
    oracles = [factor["oracle"] for factor in factors]
    networks = {factor.get("network") or config["classifier"]["network"] for factor in factors}
    found = {"oracles": [name for name in oracles if is_own(name)], "networks": sorted(name for name in networks if is_own(name))}
    judged = any(name.startswith(COLUMN) for name in oracles)
    found["judge"] = [name for name in [label["judge"]["network"] if judged else ""] if is_own(name)]
    for name in found["oracles"] + found["networks"] + found["judge"]:
        digest(name)
    if "aesthetic" in oracles and not Path(weights := label["aesthetic"]["weights"]).is_file():
        line = f"label.aesthetic.weights: there is no file {weights}; docs/your-own.md says where to get it"
        if not any(re.fullmatch("--dry-?run|-[A-Za-z]*n[A-Za-z]*", argument) for argument in arguments):
            raise UserError(line)
        print(f"note: {line}", file=sys.stderr)
    elif "aesthetic" in oracles:
        found["oracles"].append(weights)
    return found
