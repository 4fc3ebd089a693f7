#!/bin/sh
# slurm/launch.sh GPUS SCRIPT ARGUMENTS: the SCRIPT on all nodes of this job by accelerate, with a process for each of a node's GPUS (0: one, on its CPUs).
# It runs within a step of one task on the job's first node: its own step shares what that one holds.
set -eu
gpus=$1
shift
# Of the job, since Snakemake's plugin leaves the variables of its own step, which srun would believe.
export SLURM_JOB_NODELIST="$(scontrol show job "$SLURM_JOB_ID" -o | sed -n 's/.* NodeList=\([^ ]*\).*/\1/p')"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NODES="$(echo "$hosts" | wc -l)"
export PROCESSES=$((NODES * (gpus > 0 ? gpus : 1)))
export MAIN_IP="$(scontrol show node "$(echo "$hosts" | head -n 1)" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # where the nodes meet: no other job of theirs has it
each='exec accelerate launch --multi_gpu --num_processes "$PROCESSES" --num_machines "$NODES" --machine_rank "$SLURM_PROCID" \
    --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" --mixed_precision no --dynamo_backend no "$@"'
exec srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    $([ "$gpus" -eq 0 ] || echo "--gres=gpu:$gpus") sh -c "$each" sh "$@"
