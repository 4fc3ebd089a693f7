# What each method is given before it samples: an adapter, or a guidance scale.
#
# Needs  results/{experiment}/{dataset, classifier, cells.json}, the base model; for distances the validation rejection samples
# Makes  results/{experiment}/adapters/{adapter}  LoRA, label embedding, adapter.json, model card, history.jsonl
#        results/{experiment}/tuning/{guidance}.json


rule finetune:
    """CTRL: entropy-regularised fine-tuning of an adapter. A killed run goes on from its checkpoint; on SIGTERM it writes one first."""
    input:
        code=CODE["finetune"],
        base=files_of(config["base"]["path"]),
        classifier=lambda wildcards: (
            f"{RESULTS}/classifier{sample_of(wildcards.adapter)}/model.safetensors"
            if needs_classifier(for_adapter(config, wildcards.adapter))
            else []
        ),
        cells="results/{experiment}/cells.json",
        report=lambda wildcards: f"{RESULTS}/dataset{sample_of(wildcards.adapter)}/report.json",
        features=ancient(files_of(config["evaluation"]["features"])),  # of the probe alone, like the reference: no reason to train again
        reference=ancient("results/{experiment}/samples_val/rejection/samples.parquet"),
    output:
        lora="results/{experiment}/adapters/{adapter}/pytorch_lora_weights.safetensors",
        embedding="results/{experiment}/adapters/{adapter}/label_embedding.safetensors",
        adapter="results/{experiment}/adapters/{adapter}/adapter.json",
        card="results/{experiment}/adapters/{adapter}/README.md",
        history="results/{experiment}/adapters/{adapter}/history.jsonl",
    log:
        "results/{experiment}/logs/finetune_{adapter}.txt",
    benchmark:
        "results/{experiment}/benchmarks/finetune_{adapter}.tsv"
    priority: 1  # the longest first: what is left at the end then is short
    threads: cores(config["finetune"]["num_updates"] * config["finetune"]["batch_size"])
    resources:
        **FINETUNE,
    params:
        config="results/{experiment}/config.json",
        depends=lambda wildcards: sections(
            "seed", "base", "sampler", "prompts.templates.train", "prompts.templates.val", "finetune", adapter=wildcards.adapter
        ),
        needs=lambda wildcards, input: flags({"classifier": input.classifier} if input.classifier else {}),
        dataset=lambda wildcards: f"{RESULTS}/dataset{sample_of(wildcards.adapter)}",
        reference="results/{experiment}/samples_val/rejection",
        output="results/{experiment}/adapters/{adapter}",
    shell:
        """
        {LAUNCH} scripts/finetune.py \
            --config {params.config:q} \
            --name {wildcards.adapter:q} \
            {params.needs:q} \
            --cells {input.cells:q} \
            --dataset {params.dataset:q} \
            --reference {params.reference:q} \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | (
            trap "" TERM
            tee {log:q}
        )
        """


rule tune:
    """The guidance scale that does best on validation prompts; every baseline gets the same number of images."""
    input:
        code=CODE["tune"],
        base=files_of(config["base"]["path"]),
        features=files_of(config["evaluation"]["features"]),
        adapter=lambda wildcards: sample_needs(wildcards).get("adapter", []),
        classifier=lambda wildcards: sample_needs(wildcards)["classifier"],
        cells="results/{experiment}/cells.json",
        report="results/{experiment}/dataset/report.json",
        reference="results/{experiment}/samples_val/rejection/samples.parquet",
    output:
        tuning="results/{experiment}/tuning/{method}.json",
        figure=report("results/{experiment}/tuning/{method}.png", caption="../report/tuning.rst", category="4 Training"),
    log:
        "results/{experiment}/logs/tune_{method}.txt",
    benchmark:
        "results/{experiment}/benchmarks/tune_{method}.tsv"
    threads: lambda wildcards: cores(config["tuning"]["num_images"] * len(config["tuning"][row_of(wildcards.method)["guidance"]]["scale"]))
    resources:
        **GPU,
    params:
        config="results/{experiment}/config.json",
        depends=sections("seed", "base", "sampler", "prompts.templates.val", "tuning", "evaluation.features"),
        dataset="results/{experiment}/dataset",
        reference="results/{experiment}/samples_val/rejection",
        method=lambda wildcards: row_of(wildcards.method)["method"],
        needs=lambda wildcards: flags(sample_needs(wildcards), "adapter", "classifier"),
    shell:
        """
        python scripts/tune.py \
            --config {params.config:q} \
            --method {params.method:q} \
            {params.needs:q} \
            --cells {input.cells:q} \
            --dataset {params.dataset:q} \
            --reference {params.reference:q} \
            --output {output.tuning:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """
