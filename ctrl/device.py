"""Where to compute, and how finely."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ctrl.errors import UserError

DRIVER = Path("/proc/driver/nvidia")


def device_of(environment: Mapping[str, str]) -> str:
    """`cuda` where there is a GPU, else `cpu`.

    UserError where the job of `environment` was given a GPU of NVIDIA that torch cannot use: on a CPU it would run into its time limit.
    """
    if torch.cuda.is_available():
        return "cuda"
    given = environment.get("SLURM_JOB_GPUS") or environment.get("SLURM_STEP_GPUS")
    if given and DRIVER.exists():
        raise UserError(
            f"this job has GPU {given}, but torch {torch.__version__} cannot use it: its driver is too old for CUDA "
            f"{torch.version.cuda}, or torch is built without; install a torch for that driver, or ask for no GPU "
            "(cluster.gpu.gpus, cluster.finetune.gpus: 0)"
        )
    return "cpu"


def set_tf32(products: bool, convolutions: bool | None = None) -> None:
    """Whether a GPU computes float32 with 10 bits of mantissa; `convolutions` None: as `products`. Torch begins with convolutions alone."""
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = products if convolutions is None else convolutions


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, a GPU computes float32 as it is."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        set_tf32(*before)
