# Trainers compared over several seeds: how soon each recipe of `trainers.recipes` gets where. `snakemake trainers`
#
# Needs  results/{experiment}/adapters/{adapter}/{adapter.json, history.jsonl}, results/{experiment}/evaluation_val/{adapter}.json
# Makes  results/{experiment}/figures/trainers.png   accuracy and KID of the probe against seconds and UNet passes
#        results/{experiment}/tables/trainers.{csv, md}   final figures of each recipe: mean and range over seeds


rule compare_trainers:
    """Curves and table of every recipe and seed. Trainings that share a machine slow each other down: run this with one job at a time."""
    input:
        code=CODE["compare_trainers"],
        adapters=expand("results/{{experiment}}/adapters/{adapter}/adapter.json", adapter=compared_of(config)),
        histories=expand("results/{{experiment}}/adapters/{adapter}/history.jsonl", adapter=compared_of(config)),
        evaluations=expand("results/{{experiment}}/evaluation_val/{adapter}.json", adapter=compared_of(config)),
    output:
        figure=report("results/{experiment}/figures/trainers.png", caption="../report/trainers.rst", category="7 Trainers"),
        csv="results/{experiment}/tables/trainers.csv",
        md="results/{experiment}/tables/trainers.md",
    log:
        "results/{experiment}/logs/compare_trainers.txt",
    resources:
        **CPU,
        mem_mb=2000,
        runtime=5,
    params:
        depends=sections("trainers.target", "trainers.max_kid"),
        config="results/{experiment}/config.json",
        adapters=expand("results/{{experiment}}/adapters/{adapter}", adapter=compared_of(config)),
    shell:
        """
        python scripts/compare_trainers.py \
            --config {params.config:q} \
            --adapters {params.adapters:q} \
            --evaluations {input.evaluations:q} \
            --output {output.figure:q} \
            --output-csv {output.csv:q} \
            --output-md {output.md:q} 2>&1 | tee {log:q}
        """


rule trainers:
    """The comparison of trainers."""
    input:
        of_classes("trainers", "figures/trainers.png"),
