# What jobs ask for. A cluster's scheduler is told (`snakemake --profile slurm`); on one machine only `threads` counts.
#
# Needs  the config's section `cluster`

from ctrl.cores import jobs_at_once


def asked(section: str) -> dict[str, int | str]:
    """Resources of rules by a section of `cluster`; what is null there is not asked for, and the cluster's default holds."""
    asks = (cluster := config["cluster"])[section]
    places = {"slurm_account": cluster["account"], "slurm_partition": asks["partition"]}
    amounts = {"gpu": asks["gpus"], "mem_mb": asks["mem_mb"], "runtime": asks["minutes"], "one_at_a_time": 1} if "gpus" in asks else {}
    if asks.get("nodes", 1) > 1:  # SLURM counts gres on each node, and tasks and what `gpu` becomes on all of them
        each = {"gres": f"gpu:{asks['gpus']}"} if asks["gpus"] else {"tasks": asks["nodes"]}
        amounts |= {"gpu": 0, "nodes": asks["nodes"], **each}
    return {name: value for name, value in (amounts | places).items() if value}


NUM_NODES, NUM_PROCESSES = (config["cluster"]["finetune"][key] for key in ("nodes", "gpus"))
CPU, GPU, FINETUNE = asked("cpu"), asked("gpu"), asked("finetune")
# In a job of a cluster Snakemake sees the whole node, of which a part was asked for.
HERE = None if workflow.remote_exec else workflow._cores
CORES = HERE or config["cluster"]["cpus"]
SHARE = HERE // jobs_at_once(HERE) if HERE else CORES  # of a job that has others beside it
# Data parallel on several GPUs. Not a parameter of the rule: the adapter is the same but for rounding, and need not be trained again.
LAUNCH = (
    f"accelerate launch --multi_gpu --num_processes {NUM_PROCESSES} --num_machines 1 --mixed_precision no --dynamo_backend no"
    " --main_process_port 0"
    if NUM_PROCESSES > 1
    else "python"
)
if NUM_NODES > 1 and workflow.remote_exec:  # several nodes are a job of SLURM's, and nothing on one machine
    LAUNCH = f"sh slurm/launch.sh {NUM_PROCESSES}"


def cores(num_images: int) -> int:
    """Threads of a job of many images; one for a trial, whose time is spent on imports."""
    return SHARE if num_images >= 200 else 1
