"""What a trainer learns from, and which files' content decides whether a checkpoint is of the same run."""

import argparse

import pytest
import torch

from ctrl.errors import UserError
from ctrl.labels import Factors
from scripts import common, finetune, loading, training

SPACE = Factors.of(3)


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(dataset=tmp_path / "dataset", classifier=None)


def settings(trainer: str) -> dict:
    return {"trainer": trainer, "factor_weights": None}


def oracle(images):
    return torch.zeros(len(images), dtype=torch.int64)


def test_policy_gradient_learns_from_the_oracle_whose_bins_the_report_has(base, args, monkeypatch):
    monkeypatch.setattr(loading, "load_oracle", lambda dataset: oracle)
    reward, examples, files = training.learned_from(base, SPACE, settings("policy_gradient"), args)
    assert reward(torch.zeros(2, *base.latent_shape), torch.tensor([0, 1])).tolist() == [1.0, 0.0]
    assert examples is None and files == [args.dataset / "report.json"]


def test_supervised_learns_from_the_labelled_images(base, args, monkeypatch):
    monkeypatch.setattr(training, "load_examples", lambda base, folder: ("examples of", folder))
    reward, examples, files = training.learned_from(base, SPACE, settings("supervised"), args)
    assert reward is None and examples == ("examples of", args.dataset)
    assert files == [args.dataset / "report.json", args.dataset / "metadata.parquet"]


def test_backprop_learns_from_the_classifier(base, args, tmp_path):
    from ctrl import classifier as classifiers

    args.classifier = tmp_path / "classifier"
    args.classifier.mkdir()
    description = {"network": "dct", "head": "density", "num_classes": 4, "descending": True}
    classifiers.save(args.classifier, classifiers.Classifier(description))
    log_prob, examples, files = training.learned_from(base, Factors.of(4), settings("backprop"), args)
    assert callable(log_prob) and examples is None and files == [args.classifier / "config.json"]
    with pytest.raises(UserError, match="has 4 labels, .* has 3"):
        training.learned_from(base, SPACE, settings("adjoint"), args)


def test_the_content_of_the_data_is_part_of_a_runs_identity(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    before = common.digest({"gamma": 1.0}, common.contents([tmp_path / "report.json"]))
    assert before == common.digest({"gamma": 1.0}, common.contents([tmp_path / "report.json"]))
    (tmp_path / "report.json").write_text("{ }")
    assert before != common.digest({"gamma": 1.0}, common.contents([tmp_path / "report.json"]))


def test_a_missing_classifier_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["finetune.py", "--cells", "c", "--dataset", "d", "--output", "o"])
    with pytest.raises(UserError, match="finetune.trainer is backprop: it also needs --classifier"):
        finetune.main()
