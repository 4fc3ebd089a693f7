# The proof: every method on a Gaussian mixture (config/mixture.yaml), where the exact p_gamma(x | y) is known.
#
# Needs  the config's base, label, gammas, num_samples, num_sets, methods, sampler.num_steps and finetune
# Makes  results/{experiment}/samples/{method}.{parquet, json}, tables/mixture.{csv, md}, figures/mixture.png


rule mixture:
    """Samples of one method for every gamma and label, and their distance to the exact law. A killed training goes on from its checkpoint."""
    input:
        code=CODE["mixture"],
    output:
        samples="results/{experiment}/samples/{method}.parquet",
        figures="results/{experiment}/samples/{method}.json",
    log:
        "results/{experiment}/logs/mixture_{method}.txt",
    benchmark:
        "results/{experiment}/benchmarks/mixture_{method}.tsv"
    threads: 1
    resources:
        **CPU,
        mem_mb=4000,
        runtime=240,
    params:
        config="results/{experiment}/config.json",
        depends=lambda wildcards: sections("seed", "base", "label", "sampler", "finetune", "particles", "gammas", "num_samples", "num_sets"),
        checkpoints="results/{experiment}/checkpoints",
    shell:
        """
        python scripts/mixture.py \
            --config {params.config:q} \
            --method {wildcards.method:q} \
            --output {output.samples:q} \
            --checkpoints {params.checkpoints:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


rule plot_mixture:
    """The table of distances beside their noise floor, and the densities side by side."""
    input:
        code=["scripts/plot_mixture.py", "ctrl/figures/mixture.py", "ctrl/figures/style.py"],
        samples=lambda wildcards: expand("results/{{experiment}}/samples/{method}.parquet", method=config["methods"]),
    output:
        csv="results/{experiment}/tables/mixture.csv",
        md="results/{experiment}/tables/mixture.md",
        figure=report("results/{experiment}/figures/mixture.png", caption="../report/mixture.rst", category="3 Results"),
    log:
        "results/{experiment}/logs/plot_mixture.txt",
    resources:
        **CPU,
        mem_mb=2000,
        runtime=10,
    params:
        config="results/{experiment}/config.json",
    shell:
        """
        python scripts/plot_mixture.py \
            --config {params.config:q} \
            --samples {input.samples:q} \
            --output-csv {output.csv:q} \
            --output-md {output.md:q} \
            --output {output.figure:q} 2>&1 | tee {log:q}
        """
