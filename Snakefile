# Give a pretrained diffusion model a new control from labels alone, and compare it with the exact answer.
#
#   snakemake --cores all all                                     the embedded default, config/config.yaml
#   snakemake --cores all all --configfile config/smoke.yaml      every rule in minutes, with few steps and images
#   snakemake --cores all paper                                   further rows of the table, the sweep of gamma, the strength dial; hours
#   snakemake --cores all efficiency                              accuracy against the number of labelled images; hours
#   snakemake --cores all all --configfile config/mixture.yaml    the proof on a Gaussian mixture, where the exact answer is known
#   snakemake --profile slurm all                                 the same on a cluster


configfile: "config/config.yaml"


include: "workflow/rules/ancient.smk"
include: "workflow/rules/common.smk"
include: "workflow/rules/cluster.smk"
include: "workflow/rules/base.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/classifier.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/strength.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/trainers.smk"
include: "workflow/rules/efficiency.smk"
include: "workflow/rules/mixture.smk"


rule all:
    default_target: True
    input:
        all_targets(),
