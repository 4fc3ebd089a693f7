"""Configurations: laid over each other, and one line for every mistake."""

import argparse
import json

import pytest
import yaml

from ctrl.config import check_scales, for_adapter, merge, resolve
from ctrl.contradictions import MIXTURE
from ctrl.errors import UserError
from ctrl.finetune.objective import effective_gamma
from ctrl.names import dial_of, recipe_of, sample_of, split_strength
from ctrl.schema import check
from scripts import common


def load(tmp_path, *texts: str) -> dict:
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(text)
    parser = argparse.ArgumentParser()
    common.add_config_argument(parser)
    return common.load_config(parser.parse_args(["--config", *map(str, paths)] if paths else []))


def properties(schema: dict, key: str = ""):
    if "properties" in schema:
        yield key, schema
        for name, inner in schema["properties"].items():
            yield from properties(inner, f"{key}.{name}".strip("."))


def test_merge_goes_into_mappings_and_replaces_lists_and_leaves_its_arguments_alone():
    defaults = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    merged = merge(defaults, {"a": {"c": [5]}}, {"d": {"e": 1}, "a": {"b": 2}})
    assert merged == {"a": {"b": 2, "c": [5]}, "d": {"e": 1}}
    assert defaults == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_the_default_configuration_is_complete_and_nothing_else():
    schema, defaults = json.loads(common.SCHEMA.read_text()), yaml.safe_load(common.DEFAULTS.read_text())
    assert load_defaults() == resolve(defaults, schema)
    for key, inner in properties(schema):
        # (which methods there are to tune, methods.tsv says: see check_scales)
        assert inner["additionalProperties"] is False or key == "tuning", key
        assert inner["required"] == [name for name in inner["properties"] if name not in MIXTURE.get(key or None, ())], key


def load_defaults() -> dict:
    parser = argparse.ArgumentParser()
    common.add_config_argument(parser)
    return common.load_config(parser.parse_args([]))


def test_later_files_override(tmp_path):
    config = load(tmp_path, "finetune: {gamma: 3}\nseed: 5", '{"finetune": {"gamma": 4.5}}')
    assert config["finetune"]["gamma"] == 4.5
    assert config["seed"] == 5
    assert config["finetune"]["num_updates"] == load_defaults()["finetune"]["num_updates"]


def test_edges_fix_the_number_of_classes(tmp_path):
    assert load(tmp_path, "label: {edges: [0.5, 1, 2.5, 3]}")["label"]["num_classes"] == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("finetune: {gama: 3}", "unknown key finetune.gama; did you mean finetune.gamma?"),
        ("gamma: 3", "unknown key gamma; did you mean finetune.gamma?"),
        ("sampler: {steps: 3}", "did you mean sampler.num_steps?"),
        ("dataset: {splits: {trian: 0.8}}", "unknown key dataset.splits.trian; did you mean dataset.splits.train?"),
        ("finetune: {gamma: 0}", "finetune.gamma is 0; it must be a finite number above 0"),
        ("finetune: {gamma: -1}", "finetune.gamma is -1; it must be a finite number above 0"),
        ("finetune: {gamma: .nan}", "finetune.gamma is NaN"),
        ("finetune: {gamma: .inf}", "finetune.gamma is Infinity"),
        ("finetune: {learning_rate: 1e-3}", "write 1.0e-3"),
        ("finetune:", "finetune is null; it must be a mapping"),
        ("label: {edges: [3, 2]}", "label.edges is [3, 2]; it must be a list of 1 or more entries, in ascending order"),
        ("label: {edges: [2, 2]}", "in ascending order"),
        ("label: {edges: quartiles}", "it must be quantiles or values or a list"),
        ("label: {oracle: jpeg}", "it must be one of jpeg_size, brightness, aesthetic, or the path of a Python file"),
        ("label: {oracle: my-oracle.py}", "label.oracle is my-oracle.py; it must be one of"),
        ("classifier: {network: cnn2}", "it must be one of dct, pixels, cnn, clip, or the path of a Python file"),
        (
            "label: {aesthetic: {weights: aesthetic.pth}}",
            "label.aesthetic.weights is aesthetic.pth; it must be the path of a safetensors file",
        ),
        ("label: {aesthetic: {sha256: 21dd}}", "label.aesthetic.sha256 is 21dd; it must be a SHA-256 as 64 hexadecimal digits"),
        ("evaluation: {brisque: {weights: b.safetensors}}", "evaluation.brisque.sha256 is missing"),
        ("prompts: {held_out: [coat]}", "prompts.held_out has coat, which is among prompts.subjects, too"),
        ("finetune: {factor_weights: [1, 2]}", "finetune.factor_weights is [1, 2]; it takes a number for each of label.factors"),
        ("label: {factors: [{oracle: a/x.py}, {oracle: b/x.py}]}", "names an oracle twice"),
        ("label: {kind: continuous}", "label.kind is continuous, classifier.head density; a continuous label's is gaussian, and only its"),
        ("classifier: {head: gaussian}", "label.kind is oracle, classifier.head gaussian"),
        ("label: {range: [2, 1]}", "label.range is [2, 1]"),
        ("label: {tolerance: 0}", "label.tolerance is 0; it must be a finite number above 0"),
        ("label: {num_classes: 1}", "label.num_classes is 1; it must be a whole number at least 2"),
        ("dataset: {splits: {train: 0.7}}", "values add up to 1"),
        ("dataset: {kind: folder}", "dataset.path is null"),
        ("finetune: {truncation: [3, 1]}", "null or [low, high]"),
        ("finetune: {truncation: 3}", "null or [low, high]"),
        ("finetune: {trainer: adjoint, truncation: [1, 3]}", "finetune.trainer is adjoint; it takes no truncation"),
        ("finetune: {gradient_checkpointing: blocks, speed: {compile: gpu}}", "blocks, which excludes finetune.speed.compile"),
        ("finetune: {unguided_jacobian: true}", "is for finetune.trainer adjoint, under a sampler.guidance_scale other than 1"),
        (
            "adapters: {ctrl_adjoint: {unguided_jacobian: true}}",
            "adapters.ctrl_adjoint laid over finetune: finetune.unguided_jacobian is for",
        ),
        ("finetune: {trainer: adjoint, unguided_jacobian: true}", "under a sampler.guidance_scale other than 1"),
        (
            "{finetune: {trainer: adjoint, unguided_jacobian: true, control_variate: true}, sampler: {guidance_scale: 3}}",
            "finetune.unguided_jacobian excludes finetune.control_variate",
        ),
        ("finetune: {trainer: adjoint, kl_weight: 0}", "finetune.trainer is adjoint; it takes no truncation"),
        (
            "finetune: {trainer: efficient_adjoint, num_terms: 2}",
            "finetune.trainer is efficient_adjoint; it takes no truncation (null), no",
        ),
        ("finetune: {trainer: efficient_adjoint, truncation: [1, 3]}", "finetune.trainer is efficient_adjoint; it takes no truncation"),
        ("finetune: {trainer: efficient_adjoint, control_variate: true}", "no control_variate (false), and a kl_weight and a min_timestep"),
        ("finetune: {trainer: efficient_adjoint, min_timestep: 0}", "and a kl_weight and a min_timestep above 0"),
        ("finetune: {trainer: efficient_adjoint, kl_weight: 0}", "and a kl_weight and a min_timestep above 0"),
        (
            "finetune: {efficient_adjoint: {num_levels: 0}}",
            "finetune.efficient_adjoint.num_levels is 0; it must be a whole number at least 1",
        ),
        ("finetune: {trainer: policy_gradient, checkpoint_every: 25}", "a multiple of policy_gradient.reuse: not 25 with 2"),
        ("finetune: {trainer: adjoints}", "one of backprop, adjoint"),
        ("finetune: {truncation: [1, 1001]}", "sampler.num_steps has only"),
        ("cluster: {finetune: {gpus: 33}}", "cluster.finetune is 33 processes (nodes x gpus), finetune.batch_size 32; each takes a share"),
        ("cluster: {finetune: {nodes: 5, gpus: 8}}", "cluster.finetune is 40 processes (nodes x gpus), finetune.batch_size 32"),
        ("cluster: {gpu: {gpus: 2}}", "cluster.gpu.gpus is 2; it must be a whole number at least 0, at most 1"),
        ("cluster: {cpu: {mem_mb: 2}}", "unknown key cluster.cpu.mem_mb"),
        ("adapters: {odd: {gama: 3}}", "adapters.odd laid over finetune: unknown key finetune.gama"),
        ("adapters: {odd: {trainer: adjoint, kl_weight: 0}}", "adapters.odd laid over finetune: finetune.trainer is adjoint"),
        ("adapters: {ctrl: {rank: 3}}", "adapters"),
        ("adapters: {lora_n8: {lora: {rank: 8}}}", "adapters.lora_n8: _gamma, _seed, _n and _strength with a number vary a recipe"),
        ("adapters: {soft_gamma1: {kl_weight: 0.5}}", "adapters.soft_gamma1: _gamma"),
        ("adapters: {small_strength2: {}}", "adapters.small_strength2: _gamma"),
        ("trainers: {recipes: [ctrl, adjoint]}", "trainers.recipes has adjoint; the recipes are ctrl, cfg"),
        ("trainers: {seeds: [0, 0]}", "trainers.seeds is [0, 0]"),
        ("trainers: {target: 95}", "trainers.target is 95; it must be a finite number above 0, at most 1"),
        ("sampler: {spacing: quadratic, eta: 0.5}", "with sampler.spacing quadratic it must be 1"),
        ("finetune: {temperature: {hold: 0.9}}", "must not be above its end"),
        ("finetune: {micro_batch_size: 48}", "it must divide finetune.batch_size"),
        ("prompts: {templates: {test: [no place]}}", "prompts.templates.test.0 is no place; it must be a text with one {}"),
        ("seed: true", "seed is true; it must be a whole number"),
        ("experiment: ../up", "experiment is ../up"),
        ("gamma_sweep: []", "gamma_sweep is []"),
        ("strengths: [-1, 1]", "strengths.0 is -1; it must be a finite number at least 0"),
        ("strengths: [1, 1]", "strengths is [1, 1]; it must be a list of 1 or more entries, in ascending order"),
        ("sample_sizes: [0, 10]", "sample_sizes.0 is 0; it must be a whole number at least 1"),
        ("sample_sizes: [30, 10]", "sample_sizes is [30, 10]; it must be a list of 1 or more entries, in ascending order"),
        ("sample_sizes: [1.5]", "sample_sizes.0 is 1.5; it must be a whole number"),
        ("label: {held_out: [[0, 1]]}", "without label.factors there are no combinations"),
        ("label: {factors: [{oracle: brightness}, {oracle: brightness}]}", "names an oracle twice"),
        ("label: {factors: [{oracle: brightness}]}", "label.factors"),
        ("label: {factors: [{oracle: brightness}, {oracle: jpeg_size}], held_out: [[0, 4]]}", "there are 4 x 4 labels"),
        ("label: {factors: [{oracle: brightness}, {oracle: jpeg_size}], held_out: [[0]]}", "a label of each factor"),
        (
            "label: {num_classes: 2, factors: [{oracle: brightness}, {oracle: jpeg_size}], held_out: [[0, 1], [1, 1]]}",
            "label.held_out has all 2 combinations of jpeg_size 1: nothing could teach it",
        ),
        ("label: {factors: [{oracle: brightness}, {oracles: jpeg_size}]}", "label.factors.1.oracles"),
        ("[1, 2]", "must hold keys and values"),
        ("a: [", "no valid YAML"),
    ],
)
def test_one_line_a_mistake(tmp_path, text, says):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        common.load_config(argparse.Namespace(config=[tmp_path / "nowhere.yaml"]))


def test_a_missing_key_is_named():
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    with pytest.raises(UserError, match="config: a is missing"):
        check({}, schema)


METHODS = {"mpgd": {"family": "guidance", "guidance": "mpgd"}, "smc": {"family": "particles", "guidance": "smc"}}


def test_every_guided_method_has_scales_and_every_scale_a_method():
    scales = {"num_images": 8, "mpgd": {"scale": [1.0]}}
    assert check_scales(METHODS, scales) is METHODS
    with pytest.raises(UserError, match="method mpgd: no scales to try; add tuning.mpgd"):
        check_scales(METHODS, {"num_images": 8})
    with pytest.raises(UserError, match="unknown key tuning.mpdg; did you mean tuning.mpgd?"):
        check_scales(METHODS, scales | {"mpdg": {"scale": [1.0]}})


def test_a_guidance_is_tuned_on_the_row_of_its_name():
    scales = {"num_images": 8, "mpgd": {"scale": [1.0]}}
    other = {"early": {"family": "guidance", "guidance": "mpgd"}}
    assert check_scales(METHODS | other, scales) == METHODS | other, "its scale is that of the row mpgd"
    with pytest.raises(UserError, match="method early: there is no row mpgd to tune its guidance on"):
        check_scales(other, scales)


def test_factors_inherit_the_label_and_multiply(tmp_path):
    text = "label: {num_classes: 2, factors: [{oracle: jpeg_size}, {oracle: brightness, edges: [0.2, 0.4]}], held_out: [[0, 2]]}"
    label = load(tmp_path, text)["label"]
    assert [f["num_classes"] for f in label["factors"]] == [2, 3] and label["num_classes"] == 6
    assert label["factors"][0] == {"edges": "quantiles", "num_classes": 2, "descending": True, "oracle": "jpeg_size"}
    again = load(tmp_path, json.dumps({"label": label}))["label"]
    assert again == label, "the complete configuration is one itself"


def test_the_name_of_an_adapter_says_what_it_varies(tmp_path):
    defaults = load(tmp_path)
    one = for_adapter(defaults, "cfg_gamma0.5_seed3")
    assert one["finetune"] == for_adapter(defaults, "cfg")["finetune"] | {"gamma": 0.5} and one["seed"] == 3
    assert for_adapter(defaults, "ctrl") == defaults
    assert [recipe_of(n) for n in ("ctrl", "ctrl_adjoint", "ctrl_gamma30", "cfg_seed1")] == ["ctrl", "ctrl_adjoint", "ctrl", "cfg"]
    fewer = "ctrl_gamma3_seed1_n300"
    assert (recipe_of(fewer), sample_of(fewer)) == ("ctrl", "_n300")
    assert for_adapter(defaults, fewer) == for_adapter(defaults, "ctrl_gamma3_seed1"), "fewer images, and nothing else"
    assert [sample_of(n) for n in ("ctrl", "ctrl_gamma3", "ctrl_n0", "ctrl_n03", "mpgd")] == [""] * 5


def test_the_name_of_a_method_says_its_strength(tmp_path):
    assert split_strength("ctrl_gamma3_seed1_strength0.5") == ("ctrl_gamma3_seed1", {"strength": "0.5"})
    assert split_strength("ctrl") == ("ctrl", {}) and split_strength("ctrl_strengthen") == ("ctrl_strengthen", {})
    dial = dial_of(load(tmp_path, "strengths: [0, 1.0e-5, 0.5, 1.0, 2.0, 10]"))
    assert dial == ["ctrl_strength0", "ctrl_strength0.00001", "ctrl_strength0.5", "ctrl", "ctrl_strength2", "ctrl_strength10"]
    assert all(float(split_strength(name)[1].get("strength", 1)) == s for name, s in zip(dial, [0, 1e-5, 0.5, 1, 2, 10], strict=True))


def test_the_published_recipe_fits_every_config(tmp_path):
    """Its constants are not the user's mistake: fewer steps than its truncation, another trainer, a micro-batch that does not divide."""
    config = load(tmp_path, "sampler: {num_steps: 4}\nfinetune: {trainer: adjoint, batch_size: 48, micro_batch_size: 48}")
    published = for_adapter(config, "published_seed2")
    assert published["seed"] == 2 and published["finetune"]["trainer"] == "backprop" and published["finetune"]["truncation"] == [1, 6]
    assert effective_gamma(*(published["finetune"][key] for key in ("gamma", "kl_weight", "kl_reduction")), 256) == pytest.approx(2560)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sampler: {eta: 0.3}", "sampler.eta is 0.3; with base.kind gaussian_mixture it can only be 1.0"),
        ("finetune: {truncation: [1, 6]}", "finetune.truncation is [1, 6]; with base.kind gaussian_mixture it can only be null"),
    ],
)
def test_what_does_nothing_in_the_proof_is_refused(tmp_path, text, says):
    mixture = common.DEFAULTS.with_name("mixture.yaml").read_text()
    load(tmp_path, mixture)
    with pytest.raises(UserError) as caught:
        load(tmp_path, mixture, text)
    assert says in str(caught.value)
