"""What MLflow is to be told about one run, kept on disk until it knows: a line of JSON for each thing that happened.

A journal is the folder `<folder>/mlflow-unsent/<id>/`. While a process writes or sends it, that process holds a lock on it; a journal
without one is what a run left behind, whether it ended well or was killed.
"""

import fcntl
import json
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

FOLDER = "mlflow-unsent"


class Journal:
    """`header` is what was known at the start; `events` is what MLflow is to be sent, of which it has the first `num_sent`.

    `run_id` is MLflow's name of the run, None before it has one; `end` is None, or the status and time that the run ended with.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.header = path, header
        self.events: list[dict] = []
        self.num_sent, self.run_id, self.end = 0, None, None
        self._file, self._lock = None, threading.Lock()

    @classmethod
    def create(cls, folder: Path, header: dict) -> "Journal":
        """A new one under `folder`; nothing is written before `open`."""
        identity = uuid.uuid4().hex
        return cls(folder / FOLDER / identity / "journal.jsonl", {"id": identity, "start_ms": now_ms(), **header})

    def open(self) -> None:
        """Makes the file and locks it; raises OSError where that cannot be: the journal then lives in memory alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a")  # noqa: SIM115
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._write({"header": self.header})

    @classmethod
    def claim(cls, path: Path) -> "Journal | None":
        """One that was left behind, locked; None where another process has it, or where it is gone or says nothing."""
        try:
            file = open(path, "a+")  # noqa: SIM115
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():  # sent and removed by the process that had it
                raise OSError
            journal = cls(path, {})
            file.seek(0)
            for line in file:
                journal._apply(json.loads(line))
        except OSError:
            file.close()
            return None
        except json.JSONDecodeError:
            pass  # the end of a killed process: half a line
        if not journal.header:
            file.close()
            return None
        journal._file = file
        journal.end = journal.end or ["KILLED", max([journal.header["start_ms"], *(e.get("time_ms", 0) for e in journal.events)])]
        return journal

    def add(self, **line) -> None:
        """One of event={...}, run_id=..., num_sent=..., end=[status, time in ms]; raises OSError where the disk refuses."""
        with self._lock:
            self._apply(line)
            if self._file:
                self._write(line)

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def unsent(self) -> list[dict]:
        return self.events[self.num_sent :]

    def remove(self) -> None:
        """MLflow has all of it."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Gives the lock back."""
        with self._lock:
            if self._file:
                self._file.close()
            self._file = None

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()

    def _apply(self, line: dict) -> None:
        if "event" in line:
            self.events.append(line["event"])
        else:
            vars(self).update(line)


def left_behind(folder: Path) -> Iterator[Journal]:
    """Every journal under `folder` that no process holds, locked for the caller, the oldest first."""
    paths = [(path.stat().st_mtime, path) for path in (folder / FOLDER).glob("*/journal.jsonl")]
    for _, path in sorted(paths):
        if journal := Journal.claim(path):
            yield journal


def now_ms() -> int:
    return int(time.time() * 1000)
