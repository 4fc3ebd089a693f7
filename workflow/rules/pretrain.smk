# The embedded models, trained again. Not part of `all`: their weights ship in resources/, and nothing here writes there.
#
# Needs  Fashion-MNIST's training images in /usr/share/datasets/fashion-mnist (Debian's package dataset-fashion-mnist)
# Makes  results/pretrain/mini-sd   the base model, a diffusers folder
#        results/pretrain/mini-sd3  a Stable Diffusion 3 beside it: a transformer of flow matching, for config/flow.yaml; it ships nowhere
#        results/pretrain/garments  the independent classifier behind the distances and prompt_accuracy


rule pretrain:
    """The base model, a Stable Diffusion in miniature: tokenizer, text encoder, VAE, UNet."""
    input:
        code=CODE["pretrain"],
        config="config/pretrain.yaml",
    output:
        index="results/pretrain/mini-sd/model_index.json",
        unet="results/pretrain/mini-sd/unet/diffusion_pytorch_model.safetensors",
        vae="results/pretrain/mini-sd/vae/diffusion_pytorch_model.safetensors",
        text_encoder="results/pretrain/mini-sd/text_encoder/model.safetensors",
    log:
        "results/pretrain/logs/pretrain.txt",
    benchmark:
        "results/pretrain/benchmarks/pretrain.tsv"
    threads: CORES
    resources:
        **GPU,
    params:
        output="results/pretrain/mini-sd",
        checkpoints="results/pretrain/checkpoints",
    shell:
        """
        python scripts/pretrain.py \
            --config {input.config:q} \
            --output {params.output:q} \
            --checkpoints {params.checkpoints:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


rule pretrain_flow:
    """A Stable Diffusion 3 in miniature, on the VAE and the text encoder of the embedded base."""
    input:
        code=CODE["pretrain"],
        config="config/pretrain_flow.yaml",
        base=files_of("resources/mini-sd"),
    output:
        index="results/pretrain/mini-sd3/model_index.json",
        transformer="results/pretrain/mini-sd3/transformer/diffusion_pytorch_model.safetensors",
    log:
        "results/pretrain/logs/pretrain_flow.txt",
    benchmark:
        "results/pretrain/benchmarks/pretrain_flow.tsv"
    threads: CORES
    resources:
        **GPU,
    params:
        output="results/pretrain/mini-sd3",
        checkpoints="results/pretrain/checkpoints-sd3",
    shell:
        """
        python scripts/pretrain.py \
            --config {input.config:q} \
            --output {params.output:q} \
            --checkpoints {params.checkpoints:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """


rule train_garments:
    """The garment classifier that no method is trained on."""
    input:
        code=CODE["train_garments"],
    output:
        model="results/pretrain/garments/model.safetensors",
        config="results/pretrain/garments/config.json",
    log:
        "results/pretrain/logs/train_garments.txt",
    benchmark:
        "results/pretrain/benchmarks/train_garments.tsv"
    threads: CORES
    resources:
        **GPU,
    params:
        output="results/pretrain/garments",
    shell:
        """
        python scripts/train_garments.py \
            --output {params.output:q} \
            --num-threads {threads} 2>&1 | tee {log:q}
        """
