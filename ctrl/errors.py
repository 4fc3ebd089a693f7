"""The one exception for a user's mistakes, and how a script ends on it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


def main(func: Callable[[], object]) -> None:
    """Runs a script's `func`; a UserError becomes `error: ...` on stderr and exit code 2."""
    try:
        func()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
