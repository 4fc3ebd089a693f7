# Tables and figures, all from files under results/. `snakemake --report FILE.html` binds them with their captions.
#
# Needs  results/{experiment}/{samples, evaluation}/{method}, results/{experiment}/adapters/{adapter}/history.jsonl
# Makes  results/{experiment}/tables/{results, paper}.{csv, md, tex}
#        results/{experiment}/figures/*.png, figures_paper/*.png, figures/gamma_sweep.png
#        results/{experiment}/methods.md


rule tabulate:
    """The table: a row a method, each number with its interval. `results` has the rows of the demo, `paper` all."""
    input:
        code=CODE["tabulate"],
        methods="config/methods.tsv",
        evaluations=lambda wildcards: expand(
            "results/{experiment}/evaluation/{method}.json", experiment=wildcards.experiment, method=methods(wildcards.table)
        ),
        adapters=lambda wildcards: expand(
            "results/{experiment}/adapters/{adapter}/adapter.json", experiment=wildcards.experiment, adapter=adapters(wildcards.table)
        ),
    output:
        csv=report(
            "results/{experiment}/tables/{table}.csv",
            caption="../report/table.rst",
            category="3 Results",
        ),
        md="results/{experiment}/tables/{table}.md",
        tex="results/{experiment}/tables/{table}.tex",
    log:
        "results/{experiment}/logs/tabulate_{table}.txt",
    resources:
        **CPU,
        mem_mb=2000,
        runtime=5,
    params:
        config="results/{experiment}/config.json",
        adapters=lambda wildcards: [f"{RESULTS}/adapters/{name}" for name in adapters(wildcards.table)],
    shell:
        """
        python scripts/tabulate_results.py \
            --config {params.config:q} \
            --methods {input.methods:q} \
            --evaluations {input.evaluations:q} \
            --adapters {params.adapters:q} \
            --output-csv {output.csv:q} \
            --output-md {output.md:q} \
            --output-tex {output.tex:q} 2>&1 | tee {log:q}
        """


rule plot_figures:
    """Pictures of every method with the measured size under each, sizes by label, confusion matrices, training curves."""
    input:
        code=CODE["plot_figures"],
        samples=expand("results/{{experiment}}/samples/{method}/samples.parquet", method=methods("results")),
        evaluations=expand("results/{{experiment}}/evaluation/{method}.json", method=methods("results")),
        history=expand("results/{{experiment}}/adapters/{adapter}/history.jsonl", adapter=adapters("results")),
        report="results/{experiment}/dataset/report.json",
        cells="results/{experiment}/cells.json",
    output:
        teaser=report("results/{experiment}/figures/teaser.png", caption="../report/teaser.rst", category="3 Results"),
        sizes=report("results/{experiment}/figures/sizes.png", caption="../report/sizes.rst", category="3 Results"),
        confusion=report(
            expand("results/{{experiment}}/figures/{name}.png", name=[] if CONTINUOUS else ["confusion"]),
            caption="../report/confusion.rst",
            category="3 Results",
        ),
        factors=report(
            expand("results/{{experiment}}/figures/{name}.png", name=["factors"] if config["label"]["factors"] else []),
            caption="../report/factors.rst",
            category="3 Results",
        ),
        training=report("results/{experiment}/figures/training.png", caption="../report/training.rst", category="4 Training"),
        grids=report(
            expand("results/{{experiment}}/figures/grid_{method}.png", method=methods("results")),
            caption="../report/grid.rst",
            category="5 Pictures",
        ),
    log:
        "results/{experiment}/logs/plot_figures.txt",
    resources:
        **CPU,
        mem_mb=4000,
        runtime=15,
    params:
        config="results/{experiment}/config.json",
        dataset="results/{experiment}/dataset",
        samples=expand("results/{{experiment}}/samples/{method}", method=methods("results")),
        output="results/{experiment}/figures",
    shell:
        """
        python scripts/plot_figures.py \
            --config {params.config:q} \
            --dataset {params.dataset:q} \
            --cells {input.cells:q} \
            --samples {params.samples:q} \
            --evaluations {input.evaluations:q} \
            --history {input.history:q} \
            --output {params.output:q} 2>&1 | tee {log:q}
        """


use rule plot_figures as plot_figures_paper with:
    input:
        code=CODE["plot_figures"],
        samples=expand("results/{{experiment}}/samples/{method}/samples.parquet", method=methods("paper")),
        evaluations=expand("results/{{experiment}}/evaluation/{method}.json", method=methods("paper")),
        history=expand("results/{{experiment}}/adapters/{adapter}/history.jsonl", adapter=adapters("paper")),
        report="results/{experiment}/dataset/report.json",
        cells="results/{experiment}/cells.json",
    output:
        teaser=report("results/{experiment}/figures_paper/teaser.png", caption="../report/teaser.rst", category="6 Long run"),
        sizes=report("results/{experiment}/figures_paper/sizes.png", caption="../report/sizes.rst", category="6 Long run"),
        confusion=report(
            expand("results/{{experiment}}/figures_paper/{name}.png", name=[] if CONTINUOUS else ["confusion"]),
            caption="../report/confusion.rst",
            category="6 Long run",
        ),
        factors=report(
            expand("results/{{experiment}}/figures_paper/{name}.png", name=["factors"] if config["label"]["factors"] else []),
            caption="../report/factors.rst",
            category="6 Long run",
        ),
        training=report("results/{experiment}/figures_paper/training.png", caption="../report/training.rst", category="6 Long run"),
        grids=report(
            expand("results/{{experiment}}/figures_paper/grid_{method}.png", method=methods("paper")),
            caption="../report/grid.rst",
            category="6 Long run",
        ),
    log:
        "results/{experiment}/logs/plot_figures_paper.txt",
    params:
        config="results/{experiment}/config.json",
        dataset="results/{experiment}/dataset",
        samples=expand("results/{{experiment}}/samples/{method}", method=methods("paper")),
        output="results/{experiment}/figures_paper",


rule plot_sweep:
    """Accuracy, kid_rejection, diversity and KL against gamma, on validation prompts."""
    input:
        code=CODE["plot_sweep"],
        evaluations=expand("results/{{experiment}}/evaluation_val/{adapter}.json", adapter=sweep_of(config)),
    output:
        figure=report("results/{experiment}/figures/gamma_sweep.png", caption="../report/gamma_sweep.rst", category="6 Long run"),
    log:
        "results/{experiment}/logs/plot_sweep.txt",
    resources:
        **CPU,
        mem_mb=2000,
        runtime=5,
    params:
        config="results/{experiment}/config.json",
    shell:
        """
        python scripts/plot_sweep.py \
            --config {params.config:q} \
            --evaluations {input.evaluations:q} \
            --output {output.figure:q} 2>&1 | tee {log:q}
        """


rule sweep:
    """The sweep of gamma."""
    input:
        f"{RESULTS}/figures/gamma_sweep.png",


rule write_methods_page:
    """The page on all methods, from the long table: what each computes and needs, its row, and what the figures say."""
    input:
        code=["scripts/write_methods_page.py", *lib("methods_page efficiency strength strength_page tables tuning tuning_page")],
        methods="config/methods.tsv",
        table="results/{experiment}/tables/paper.csv",
        samples=expand("results/{{experiment}}/samples/{method}/samples.json", method=methods("paper")),
        adapters=expand("results/{{experiment}}/adapters/{adapter}/adapter.json", adapter=adapters("paper")),
        figures=expand("results/{{experiment}}/figures_paper/{name}.png", name=("teaser", "sizes", "training")),
        sweep="results/{experiment}/figures/gamma_sweep.png",
        strength=expand("results/{{experiment}}/{name}", name=DIAL),
        tuning=dict.fromkeys(
            f"{RESULTS}/tuning/{METHODS[m]['guidance']}.json" for m in methods("paper") if METHODS[m]["family"] in ("guidance", "cfg")
        ),
    output:
        page="results/{experiment}/methods.md",
    log:
        "results/{experiment}/logs/write_methods_page.txt",
    resources:
        **CPU,
        mem_mb=2000,
        runtime=5,
    params:
        config="results/{experiment}/config.json",
        command=" ".join(["snakemake paper --cores all", *(f"--configfile {path}" for path in workflow.configfiles[1:])]),
        depends=sections("finetune", "particles", "candidates", "sampler", "tuning", "adapters", "evaluation"),
        strength=lambda wildcards, input: ["--strength", input.strength[0]] if DIAL else [],
        dial=lambda wildcards, input: input.strength[1:],
    shell:
        """
        python scripts/write_methods_page.py \
            --config {params.config:q} \
            --table {input.table:q} \
            --methods {input.methods:q} \
            --samples {input.samples:q} \
            --adapters {input.adapters:q} \
            --command {params.command:q} \
            {params.strength:q} \
            --tuning {input.tuning:q} \
            --figures {input.figures:q} {input.sweep:q} {params.dial:q} \
            --output {output.page:q} 2>&1 | tee {log:q}
        """


rule paper:
    """The long run: the demo, the further rows of the table, the sweep of gamma, the strength dial, the page on all methods."""
    input:
        all_targets(),
        all_targets("paper"),
        f"{RESULTS}/figures/gamma_sweep.png",
        expand(f"{RESULTS}/{{name}}", name=DIAL),
        f"{RESULTS}/methods.md",
