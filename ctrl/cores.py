"""How jobs share the cores of a machine."""

import shutil


def jobs_at_once(cores: int) -> int:
    """How many heavy jobs a machine with so many `cores` runs side by side, each with its share of them.

    A GPU is given to one at a time. Without one there are two: with the small networks that a CPU can train, half of the threads take
    less than twice the time (`benchmarks/threads.py`).
    """
    gpu = any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi"))
    return 1 if gpu or cores < 2 else 2
