# The strength dial, eps_pre + strength * (eps_psi - eps_pre), of one adapter, against adapters that were trained with other gammas.
#
# Needs  results/{experiment}/evaluation_val/{method}.json of the dial (ctrl_strength0.5, ...) and of the sweep of gamma
# Makes  results/{experiment}/tables/strength.csv, figures/strength.png


rule compare_strengths:
    """Both curves with their intervals, and for each strength the gamma of equal accuracy: how else do the two differ?"""
    input:
        code=CODE["compare_strengths"],
        strengths=expand("results/{{experiment}}/evaluation_val/{method}.json", method=dial_of(config)),
        gammas=expand("results/{{experiment}}/evaluation_val/{adapter}.json", adapter=sweep_of(config)),
    output:
        csv="results/{experiment}/tables/strength.csv",
        figure=report("results/{experiment}/figures/strength.png", caption="../report/strength.rst", category="6 Long run"),
    log:
        "results/{experiment}/logs/compare_strengths.txt",
    resources:
        **CPU,
        mem_mb=2000,
        runtime=5,
    params:
        config="results/{experiment}/config.json",
    shell:
        """
        python scripts/compare_strengths.py \
            --config {params.config:q} \
            --strengths {input.strengths:q} \
            --gammas {input.gammas:q} \
            --output-csv {output.csv:q} \
            --output-figure {output.figure:q} 2>&1 | tee {log:q}
        """


rule strength:
    """The strength dial."""
    input:
        of_classes("strength", "tables/strength.csv", "figures/strength.png"),
