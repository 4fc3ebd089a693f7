# The first step: whether the base can be had at all, before anything expensive runs.
#
# Needs  the config's section `base`, and the network behind the distances; for a name on the hub a network, or the model in the hub's cache
# Makes  results/{experiment}/base.json: the base's kind, its commit, what it predicts, the size of its images


rule check_base:
    """Fetches a base from the hub into its cache; on a cluster where the workflow was started, which has a network if any machine has."""
    input:
        code=CODE["check_base"],
        base=files_of(config["base"]["path"]),
    output:
        found="results/{experiment}/base.json",
    log:
        "results/{experiment}/logs/check_base.txt",
    localrule: True
    params:
        config="results/{experiment}/config.json",
        depends=sections("base", "dataset.image_size", "label", "classifier", "evaluation", "prompts.subjects", "prompts.held_out"),
    shell:
        """
        python scripts/check_base.py \
            --config {params.config:q} \
            --output {output.found:q} 2>&1 | tee {log:q}
        """
