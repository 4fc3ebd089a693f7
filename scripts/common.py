"""What every script shares: the `--config` argument, the checked configuration behind it, and what a run depends on in short."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from ctrl.config import check_size, merge, resolve
from ctrl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = ROOT / "config" / "config.yaml"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--config FILE...` to a script's parser."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[DEFAULTS],
        metavar="FILE",
        help="YAML or JSON; laid over config/config.yaml, later files over earlier ones (default: config/config.yaml)",
    )


def load_config(args: argparse.Namespace) -> dict:
    """The complete, checked configuration of `args.config`; raises UserError with one line otherwise."""
    paths = args.config if isinstance(args.config, list) else [args.config]
    config = merge(*(read_yaml(Path(path)) for path in [DEFAULTS, *paths]))
    return resolve(config, json.loads(SCHEMA.read_text()), ", ".join(map(str, paths)))


def read_yaml(path: Path) -> dict:
    """A mapping from a YAML or JSON file."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); give a YAML or JSON file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that there is not, brackets in thousands
        raise UserError(f"{path}: no valid YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys and values, but it holds {type(content).__name__}")
    return check_size(content or {}, str(path))


def contents(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def digest(*parts) -> str:
    """What a run depends on, as a short text: what another run left half done is not gone on with."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cores_of(text: str) -> int:
    """The cores that `--cores` names: a number, or `all` that this process may use."""
    if text == "all":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of 1 or more nor `all`")
    return int(text)
