"""Where to compute."""

from collections.abc import Mapping
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
