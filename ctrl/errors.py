"""The one exception for a user's mistakes, how a script ends on it, and what no message may hold: secrets."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping

SECRET = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)  # in the name of an environment variable
USERINFO = re.compile(r"(?<=://)[^/\s@]*@")  # of a URL: user:password@
FULL_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory", "std::bad_alloc")


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: object):
        super().__init__(redact(" ".join(str(message).split())))


class Stopped(BaseException):
    """Work that SIGTERM ended early and in good order: what was done is kept. No mistake, and no Exception that anything should handle."""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without the user and password of any URL, and without the value of any environment variable that is named like a secret."""
    for name, value in environment.items():
        if SECRET.search(name) and len(value) >= 8:  # a shorter one would blot out ordinary words
            text = text.replace(value, "***")
    return USERINFO.sub("***@", text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or the GPU has no memory left; PyTorch says so on a CPU in words alone."""
    said = isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in FULL_MEMORY)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(func: Callable[[], object], lower: str = "") -> None:
    """Runs a script's `func`; a UserError becomes `error: ...` on stderr and exit code 2, and Stopped a line and 143, as SIGTERM's own.

    A lack of memory ends like the former, with the settings to `lower`. Whatever else goes wrong is a traceback, without secrets.
    """
    sys.excepthook = lambda *error: print(redact("".join(traceback.format_exception(*error))), end="", file=sys.stderr)
    try:
        func()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = f"lower {lower}, or give" if lower else "give"
        print(f"error: out of memory: {advice} the job more ({redact(' '.join(str(error).split())[:200])})", file=sys.stderr)
        sys.exit(2)
