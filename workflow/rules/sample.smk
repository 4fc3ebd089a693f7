# Images of every method, all through one script: an image depends on its seed, prompt, label and method alone.
#
# Needs  results/{experiment}/cells.json, the base model, and what the method takes: adapter, classifier and tuning, or the oracle's bins
# Makes  results/{experiment}/samples/{method}      on test prompts, for the table
#        results/{experiment}/samples_val/{method}  on validation prompts, to choose settings by; `rejection` is the reference there


# What families with many particles an image depend on besides.
MANY = {"particles": ["particles", "finetune.gamma"], "resampled": ["candidates"]}


rule sample:
    """The rows of the table. `rejection_reference` is a second, independent set of rejection samples: the reference of the distances."""
    input:
        unpack(sample_needs),
        code=lambda wildcards: CODE["sample"]
        + (CONTROL if row_of(wildcards.method)["adapter"] else [])
        + (GUIDANCE if row_of(wildcards.method)["family"] in ("guidance", "particles", "resampled") else []),
        base=files_of(config["base"]["path"]),
        cells="results/{experiment}/cells.json",
    output:
        samples="results/{experiment}/samples/{method}/samples.parquet",
        summary="results/{experiment}/samples/{method}/samples.json",
    log:
        "results/{experiment}/logs/sample_{method}.txt",
    benchmark:
        "results/{experiment}/benchmarks/sample_{method}.tsv"
    threads: cores(config["evaluation"]["images_per_label"] * config["label"]["num_classes"])
    resources:
        **GPU,
    params:
        config="results/{experiment}/config.json",
        depends=lambda wildcards: sections(
            "seed",
            "base",
            "sampler",
            "prompts.templates.test",
            *MANY.get(row_of(wildcards.method)["family"], []),
        ),
        split="test",
        method=lambda wildcards: row_of(wildcards.method)["method"],
        strength=lambda wildcards: row_of(wildcards.method)["strength"],
        per_label=config["evaluation"]["images_per_label"],
        needs=lambda wildcards: flags(sample_needs(wildcards)),
        seed_offset=lambda wildcards: REFERENCE_SEED_OFFSET if wildcards.method.endswith("_reference") else 0,
        output="results/{experiment}/samples/{method}",
    shell:
        """
        python scripts/sample.py \
            --config {params.config:q} \
            --method {params.method:q} \
            --strength {params.strength} \
            --split {params.split} \
            --cells {input.cells:q} \
            --per-label {params.per_label} \
            {params.needs:q} \
            --seed-offset {params.seed_offset} \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


use rule sample as sample_val with:
    output:
        samples="results/{experiment}/samples_val/{method}/samples.parquet",
        summary="results/{experiment}/samples_val/{method}/samples.json",
    log:
        "results/{experiment}/logs/sample_val_{method}.txt",
    benchmark:
        "results/{experiment}/benchmarks/sample_val_{method}.tsv"
    priority: 2  # training waits for the reference of its probe
    params:
        config="results/{experiment}/config.json",
        depends=lambda wildcards: sections(
            "seed",
            "base",
            "sampler",
            "prompts.templates.val",
            *MANY.get(row_of(wildcards.method)["family"], []),
        ),
        split="val",
        method=lambda wildcards: row_of(wildcards.method)["method"],
        strength=lambda wildcards: row_of(wildcards.method)["strength"],
        per_label=config["evaluation"]["images_per_label"],
        needs=lambda wildcards: flags(sample_needs(wildcards)),
        seed_offset=lambda wildcards: REFERENCE_SEED_OFFSET if wildcards.method == "rejection" else 0,
        output="results/{experiment}/samples_val/{method}",
