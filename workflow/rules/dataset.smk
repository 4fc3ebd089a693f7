# The offline dataset: images with prompts, and from the oracle their scores and labels.
#
# Needs  resources/fashion-mnist (dataset.kind embedded), a folder of images (folder), or the base model (generated)
# Makes  results/{experiment}/dataset/{metadata.parquet, report.json, histogram.png}, and judge/ where a column is the label

JUDGED = [factor_of(f["oracle"]) for f in config["label"]["factors"] or [config["label"]] if f["oracle"].startswith(COLUMN)]
IMAGES, *TABLES = {  # the folder of images behind the dataset, and the names that its table may have
    "embedded": (f"{RESULTS}/images", "metadata.csv"),
    "generated": (f"{RESULTS}/generated", "samples.parquet"),
    "folder": (config["dataset"]["path"], "metadata.csv", "metadata.parquet"),
}[config["dataset"]["kind"]]
UNTOLD = config["dataset"]["kind"] == "folder" and not config["dataset"]["captions"]  # it may have no table
TABLE = next((f"{IMAGES}/{name}" for name in TABLES if Path(IMAGES, name).exists()), IMAGES if UNTOLD else f"{IMAGES}/{TABLES[0]}")


rule unpack_images:
    """Fashion-MNIST's 10,000 test images, which the base model has never seen, as PNG files with a table of prompts."""
    input:
        code=CODE["unpack_images"],
        images="resources/fashion-mnist/t10k-images-idx3-ubyte.gz",
        labels="resources/fashion-mnist/t10k-labels-idx1-ubyte.gz",
    output:
        metadata="results/{experiment}/images/metadata.csv",
    log:
        "results/{experiment}/logs/unpack_images.txt",
    resources:
        **CPU,
        mem_mb=2000,
        runtime=10,
    params:
        config="results/{experiment}/config.json",
        depends=sections("prompts.templates.train", "dataset.image_size"),
        idx="resources/fashion-mnist",
        output="results/{experiment}/images",
    shell:
        """
        python scripts/unpack_images.py \
            --config {params.config:q} \
            --idx {params.idx:q} \
            --split t10k \
            --output {params.output:q} 2>&1 | tee {log:q}
        """


rule generate_images:
    """For dataset.kind generated: images of the base model on training prompts."""
    input:
        code=CODE["sample"],
        base=files_of(config["base"]["path"]),
        checked=ancient("results/{experiment}/base.json"),
    output:
        samples="results/{experiment}/generated/samples.parquet",
    log:
        "results/{experiment}/logs/generate_images.txt",
    benchmark:
        "results/{experiment}/benchmarks/generate_images.tsv"
    threads: CORES
    resources:
        **GPU,
    params:
        config="results/{experiment}/config.json",
        depends=sections("seed", "base", "sampler", "prompts.subjects", "prompts.templates.train"),
        per_subject=-(-config["dataset"]["num_generated"] // len(config["prompts"]["subjects"])),
        seed_offset=REFERENCE_SEED_OFFSET,
        output="results/{experiment}/generated",
    shell:
        """
        python scripts/sample.py \
            --config {params.config:q} \
            --method pretrained \
            --split train \
            --per-subject {params.per_subject} \
            --seed-offset {params.seed_offset} \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


rule build_dataset:
    """Scores by the oracle, labels by bins, splits by a hash of each image; the judge of a column."""
    input:
        code=CODE["build_dataset"],
        own=OWN["oracles"] + OWN["judge"],
        table=TABLE,
    output:
        metadata="results/{experiment}/dataset/metadata.parquet",
        report="results/{experiment}/dataset/report.json",
        histogram=report(
            "results/{experiment}/dataset/histogram.png",
            caption="../report/dataset.rst",
            category="1 Dataset",
        ),
        judge=[f"results/{{experiment}}/dataset/judge/{name}/model.safetensors" for name in JUDGED],
    log:
        "results/{experiment}/logs/build_dataset.txt",
    threads: SHARE if JUDGED else 1
    resources:
        **(GPU if JUDGED else {**CPU, "mem_mb": 4000, "runtime": 30}),
    params:
        config="results/{experiment}/config.json",
        depends=sections("dataset", "label", *(["classifier", "seed", "evaluation.num_bootstrap"] if JUDGED else [])),
        images=IMAGES,
        output="results/{experiment}/dataset",
    shell:
        """
        python scripts/build_dataset.py \
            --config {params.config:q} \
            --images {params.images:q} \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """
