"""JSON, parquet, text and safetensors files, and folders of them: complete or absent, whatever happens while they are written.

Everything goes to a temporary name in the same folder, which a rename makes final; a write that fails leaves what was there before.
Two processes that write the same thing are told apart by a lock: the second one is refused. torch and pandas take seconds to import:
they are, by what reads or writes their kind of file.
"""

import errno
import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ctrl.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # "the disk refuses", as opposed to a mistake in the program


def _temporary(path: Path) -> Path:
    """The name under which `path` is written; always the same, so that what a killed run left is overwritten by the next one."""
    return path.with_name(f".{path.name}.tmp")


def _cannot_write(path: Path, reason: object) -> UserError:
    return UserError(f"cannot write {path}: {reason}; free some space or choose another folder")


@contextmanager
def alone(path: Path | str) -> Iterator[None]:
    """Inside, no other process writes the file or folder `path`: UserError where one does already, or the folder is not writable.

    The lock ends with the process, however it ends; a `.lock` file that a killed one left means nothing.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise _cannot_write(path, error.strerror or error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))  # the last holder may have removed it in between
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError:
            mine = True  # a file system without locks
        if not mine:
            raise UserError(f"another process is writing {path}: wait for it, or end it")
        try:
            yield
        finally:
            try:
                lock.unlink(missing_ok=True)
            except OSError:
                pass  # it means nothing without its holder


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a file atomically, creating its folder. UserError where the disk is full, the folder read-only, or another one writes."""
    path = Path(path)
    temporary = _temporary(path)
    with alone(path):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                pass  # the reason is the first error, raised below
            if isinstance(error, OSError):
                raise _cannot_write(path, error.strerror or error) from error
            raise


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode())


def _plain(obj: object) -> object:
    """`obj` in JSON's own types: numpy scalars, arrays and tensors become numbers and lists, paths strings, nan and inf null."""
    if isinstance(obj, dict):
        return {str(k): _plain(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(v) for v in obj]
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if hasattr(obj, "tolist"):
        return _plain(obj.tolist())
    return obj


def write_json(path: Path | str, obj: object) -> None:
    """Writes JSON atomically; numpy and torch values are allowed, nan and infinity become null."""
    write_text(path, json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_parquet(path: Path | str, table: "DataFrame") -> None:
    """Writes a table as parquet, atomically and without its index."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes(path, buffer.getvalue())


def save_tensors(path: Path | str, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Writes tensors of any device as safetensors, atomically; `metadata` goes into the file's header."""
    from safetensors.torch import save

    write_bytes(path, canonical(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)))


def canonical(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's own order changes from process to process."""
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[length:]


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'missing'}: check the path, or run the step that writes it")


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is corrupt ({error}): delete it and run the step that writes it again")


def read_json(path: Path | str) -> object:
    """What a JSON file holds; UserError where it is missing or corrupt."""
    path = Path(path)
    _require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(path, error) from error


def read_rows(path: Path | str) -> list[dict]:
    """What a JSON-lines file holds; UserError where it is missing or corrupt."""
    path = Path(path)
    _require_file(path)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(path, error) from error


def read_parquet(path: Path | str) -> "DataFrame":
    """The table in a parquet file; UserError where it is missing or corrupt."""
    import pandas as pd
    import pyarrow

    path = Path(path)
    _require_file(path)
    try:
        return pd.read_parquet(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def load_tensors(path: Path | str, device: str = "cpu") -> "dict[str, Tensor]":
    """The tensors of a safetensors file, by name; UserError where it is missing or corrupt."""
    from safetensors.torch import load_file

    path = Path(path)
    _require_file(path)
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def load_metadata(path: Path | str) -> dict[str, str]:
    """The strings in the header of a safetensors file; UserError where it is missing or corrupt."""
    path = Path(path)
    _require_file(path)
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by its header; UserError where it is missing or corrupt."""
    path = Path(path)
    _require_file(path)
    try:
        with safe_open(path, "pt") as f:
            return {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def num_values(paths: Iterable[Path]) -> int:
    """How many numbers the tensors of safetensors files hold together, by their headers; UserError where one is missing or corrupt."""
    return sum(math.prod(shape) for path in paths for shape in shapes(path).values())


def _is_full_disk(error: BaseException) -> bool:
    """Whether a library's error says that the disk refuses; Rust's (safetensors, tokenizers) say it in words alone."""
    return getattr(error, "errno", None) in STORAGE or (isinstance(error, Exception) and "No space left on device" in str(error))


@contextmanager
def atomic_folder(path: Path | str, identity: str | None = None) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`, which takes its place on success and is removed on failure.

    A folder already at `path` is replaced as a whole. A full disk, in whatever way it shows in the body, raises UserError naming `path`.
    With an `identity` the temporary folder stays on failure, and the next run of the same identity is given it as it was left, to go on
    from there; what a run of another one left is removed.
    """
    path = Path(path)
    temporary, replaced = _temporary(path), path.with_name(f".{path.name}.old")
    mark = temporary / ".identity"
    with alone(path):
        try:
            goes_on = identity is not None and mark.exists() and mark.read_text() == identity
            for leftover in (replaced, *([] if goes_on else [temporary])):
                if leftover.exists():
                    shutil.rmtree(leftover)
            temporary.mkdir(exist_ok=True)
            if identity is not None and not goes_on:
                write_text(mark, identity)
            yield temporary
            for own in temporary.glob(f".*{mark.name[1:]}*"):
                own.unlink()
            if path.exists():
                os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException as error:
            if identity is None:
                shutil.rmtree(temporary, ignore_errors=True)
            if _is_full_disk(error):
                raise _cannot_write(path, os.strerror(error.errno) if isinstance(error, OSError) else error) from error
            raise
