# The classifier p(y | x), and which labels each subject can take.
#
# Needs  results/{experiment}/dataset, the base model
# Makes  results/{experiment}/pool              images of the pretrained model on training prompts
#        results/{experiment}/classifier        model.safetensors, config.json, metrics.json, reliability.png
#        results/{experiment}/noisy_classifier  the same of noisy latents, with accuracy_by_timestep.png; for classifier guidance
#        results/{experiment}/cells.json        the (subject, label) pairs that are asked for


rule sample_pool:
    """Images of the pretrained model: the classifier is also measured on them, and the cells are counted on them."""
    input:
        code=CODE["sample"],
        base=files_of(config["base"]["path"]),
        checked=ancient("results/{experiment}/base.json"),
    output:
        samples="results/{experiment}/pool/samples.parquet",
    log:
        "results/{experiment}/logs/sample_pool.txt",
    benchmark:
        "results/{experiment}/benchmarks/sample_pool.tsv"
    threads: cores(config["pool"]["images_per_subject"] * len(config["prompts"]["subjects"]))
    resources:
        **GPU,
    params:
        config="results/{experiment}/config.json",
        depends=sections("seed", "base", "sampler", "prompts.subjects", "prompts.held_out", "prompts.templates.train"),
        per_subject=config["pool"]["images_per_subject"],
        output="results/{experiment}/pool",
    shell:
        """
        python scripts/sample.py \
            --config {params.config:q} \
            --method pretrained \
            --split train \
            --per-subject {params.per_subject} \
            --held-out \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


rule train_classifier:
    """Fitted on the training split, chosen on the validation split, calibrated on the calibration split alone."""
    input:
        code=CODE["train_classifier"],
        own=OWN["networks"],
        metadata="results/{experiment}/dataset/metadata.parquet",
        report="results/{experiment}/dataset/report.json",
        generated="results/{experiment}/pool/samples.parquet",
    output:
        model="results/{experiment}/classifier/model.safetensors",
        config="results/{experiment}/classifier/config.json",
        metrics="results/{experiment}/classifier/metrics.json",
        reliability=report(
            "results/{experiment}/classifier/reliability.png",
            caption="../report/reliability.rst",
            category="2 Classifier",
        ),
    log:
        "results/{experiment}/logs/train_classifier.txt",
    benchmark:
        "results/{experiment}/benchmarks/train_classifier.tsv"
    priority: 3  # everything waits for it
    threads: SHARE
    resources:
        **GPU,
    params:
        config="results/{experiment}/config.json",
        depends=sections("seed", "classifier", "label", "dataset.image_size"),
        dataset="results/{experiment}/dataset",
        generated="results/{experiment}/pool",
        output="results/{experiment}/classifier",
    shell:
        """
        python scripts/train_classifier.py \
            --config {params.config:q} \
            --dataset {params.dataset:q} \
            --generated {params.generated:q} \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


rule train_noisy_classifier:
    """p_t(y | x_t), fitted on the training split, chosen on the calibration split, measured at each step on the validation split."""
    input:
        code=CODE["train_noisy_classifier"],
        base=files_of(config["base"]["path"]),
        metadata="results/{experiment}/dataset/metadata.parquet",
        report="results/{experiment}/dataset/report.json",
    output:
        model="results/{experiment}/noisy_classifier/model.safetensors",
        config="results/{experiment}/noisy_classifier/config.json",
        metrics="results/{experiment}/noisy_classifier/metrics.json",
        figure=report(
            "results/{experiment}/noisy_classifier/accuracy_by_timestep.png",
            caption="../report/accuracy_by_timestep.rst",
            category="2 Classifier",
        ),
    log:
        "results/{experiment}/logs/train_noisy_classifier.txt",
    benchmark:
        "results/{experiment}/benchmarks/train_noisy_classifier.tsv"
    threads: SHARE
    resources:
        **GPU,
    params:
        config="results/{experiment}/config.json",
        depends=sections("seed", "base", "sampler", "noisy_classifier"),
        dataset="results/{experiment}/dataset",
        output="results/{experiment}/noisy_classifier",
    shell:
        """
        python scripts/train_noisy_classifier.py \
            --config {params.config:q} \
            --dataset {params.dataset:q} \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


rule estimate_cells:
    """The share of each label among a subject's pretrained images; labels that hardly occur are not asked for."""
    input:
        code=CODE["estimate_cells"],
        pool="results/{experiment}/pool/samples.parquet",
        classifier="results/{experiment}/classifier/model.safetensors",
        report="results/{experiment}/dataset/report.json",
    output:
        cells="results/{experiment}/cells.json",
    log:
        "results/{experiment}/logs/estimate_cells.txt",
    threads: cores(config["pool"]["images_per_subject"] * len(config["prompts"]["subjects"]))
    resources:
        **CPU,
        mem_mb=4000,
        runtime=30,
    params:
        config="results/{experiment}/config.json",
        depends=sections("cells", "prompts.held_out"),
        pool="results/{experiment}/pool",
        classifier="results/{experiment}/classifier",
        dataset="results/{experiment}/dataset",
    shell:
        """
        python scripts/estimate_cells.py \
            --config {params.config:q} \
            --pool {params.pool:q} \
            --classifier {params.classifier:q} \
            --dataset {params.dataset:q} \
            --output {output.cells:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """
