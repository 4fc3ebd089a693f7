"""The one exception for a user's mistakes, and how a script ends on it."""

import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


class Stopped(BaseException):
    """Work that SIGTERM ended early and in good order: what was done is kept. No mistake, and no Exception that anything should handle."""


def main(func: Callable[[], object]) -> None:
    """Runs a script's `func`; a UserError becomes `error: ...` on stderr and exit code 2, and Stopped a line and 143, as SIGTERM's own."""
    try:
        func()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGTERM)
