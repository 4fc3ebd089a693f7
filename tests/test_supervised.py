"""Supervised fine-tuning: the denoising loss by hand, dropped labels, and updates that follow from their number."""

import pytest
import torch

from ctrl.control import Control
from ctrl.errors import UserError
from ctrl.finetune import gradients as module
from ctrl.finetune.gradients import supervised_gradient
from ctrl.finetune.supervised import supervised
from ctrl.finetune.task import Examples, Task
from ctrl.labels import Factors


def settings(size: int, at_a_time: int | None = None) -> dict:
    return {"batch_size": size, "micro_batch_size": at_a_time or size, "speed": {"autocast": False}}


@pytest.fixture
def task(control):
    return Task(control, control.base.process(4), [("coat", 0)], ["{}"], 1.0, 0)


@pytest.fixture
def examples(base):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(6, *base.latent_shape, generator=generator)
    return Examples(x_0, ["coat", "a coat", "bag", "a bag", "coat", "bag"], torch.tensor([0, 1, 2, 0, 1, 2]))


def test_loss_by_hand(base):
    """A denoiser that says zero has the norm of the noise as its loss, whatever the step."""
    process = base.process(4)
    weight = torch.zeros(1, requires_grad=True)
    x_0 = torch.randn(5, 2, 3)
    loss = supervised(process, lambda x, i: weight * x, x_0, torch.Generator().manual_seed(3), 0.2)["loss"]
    assert loss == pytest.approx(torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3)).square().sum().item() / 5, rel=1e-5)


def test_each_image_has_its_own_step(base):
    """A denoiser that is given x_t and the steps can tell the noise from x_0: no loss is left. Steps that are not active are not drawn."""
    process, x_0, seen = base.process(4), torch.randn(64, 2, 3), []

    def knowing(x_t, i):
        seen.append(i)
        abar = process.abar_t[i].view(-1, 1, 1)
        return ((x_t - abar.sqrt() * x_0) / (1 - abar).sqrt() + 0 * weight).float()

    weight = torch.zeros(1, requires_grad=True)
    loss = supervised(process, knowing, x_0, torch.Generator().manual_seed(3), active=[True, True, True, False])["loss"]
    assert loss < 1e-6 and set(seen[0].tolist()) == {0, 1, 2}


def test_steps_of_their_own_give_each_image_what_it_has_alone(control):
    process, x_t = control.base.process(4), torch.randn(3, *control.base.latent_shape)
    y, i = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    together = control.denoiser(process, ["a", "b", "c"], y)(x_t, i)
    guided = control.denoiser(process, ["a", "b", "c"], y, guidance_scale=3.0)(x_t, i)
    for k in range(3):
        alone = control.denoiser(process, ["abc"[k]], y[k : k + 1])(x_t[k : k + 1], int(i[k]))
        assert torch.allclose(together[k], alone[0], atol=1e-5)
        alone = control.denoiser(process, ["abc"[k]], y[k : k + 1], guidance_scale=3.0)(x_t[k : k + 1], int(i[k]))
        assert torch.allclose(guided[k], alone[0], atol=1e-5)


def gradients(task, examples, update, at_a_time=None):
    for p in task.control.parameters().values():
        p.grad = None
    figures = supervised_gradient(task, examples, settings(4, at_a_time))(update)
    return figures, {name: None if p.grad is None else p.grad.clone() for name, p in task.control.parameters().items()}


def test_an_update_follows_from_its_number(task, examples):
    (first, one), (again, same), (_, other) = (gradients(task, examples, u) for u in (3, 3, 4))
    assert first == again and first["unet_forward"] == first["unet_backward"] == 4
    assert all(torch.equal(one[k], same[k]) for k in one if one[k] is not None)
    assert any(not torch.equal(one[k], other[k]) for k in one if one[k] is not None)
    assert examples.labels.tolist() == [0, 1, 2, 0, 1, 2], "dropping labels leaves the data alone"


def test_gradients_accumulate_over_micro_batches(task, examples):
    (whole, one), (parts, other) = (gradients(task, examples, 3, size) for size in (4, 3))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5) and parts["unet_forward"] == 4
    for name, gradient in one.items():
        if gradient is not None:
            assert (other[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


def test_where_the_prompt_is_guided_some_images_lose_prompt_and_label(control, examples, monkeypatch):
    """Guidance starts from neither: a model that never saw that would be asked for what it was not taught."""
    asked = []
    monkeypatch.setattr(module, "supervised", lambda *args: {"loss": torch.zeros(())})
    monkeypatch.setattr(control, "denoiser", lambda process, prompts, y: asked.append((prompts, y)))
    for scale in (1.0, 7.5):
        task = Task(control, control.base.process(4), [("coat", 0)], ["{}"], scale, 0)
        supervised_gradient(task, examples, settings(10_000))(3)
    (all_prompted, _), (prompts, y) = asked
    assert None not in all_prompted
    without = torch.tensor([prompt is None for prompt in prompts])
    assert without.float().mean().item() == pytest.approx(0.1, abs=0.01) and (y[without] == control.null).all()
    assert (y[~without] == control.null).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_dropped_labels_teach_the_embedding_nothing(task, examples, monkeypatch):
    name = "class_embedding.weight"
    assert gradients(task, examples, 0)[1][name].abs().sum() > 0
    monkeypatch.setattr(module, "LABEL_DROPOUT", 1.0)
    dropped = gradients(task, examples, 0)[1]
    assert dropped[name] is None or not dropped[name].any()
    assert any(g is not None and g.any() for k, g in dropped.items() if k != name)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([0, 1, 2, 0, 1, 4]), "no label 4"),
        (torch.tensor([0, 1, 2, 0, 1, -1]), "no label -1"),
        (torch.tensor([0, 1, 2]), "one for each of the 6 images"),
        (torch.zeros(6), "not torch.float32"),
    ],
)
def test_examples_with_wrong_labels_are_one_line(task, examples, labels, says):
    with pytest.raises(UserError, match=says):
        supervised_gradient(task, Examples(examples.x_0, examples.prompts, labels), settings(4))


def test_examples_without_a_prompt_are_one_line(task, examples):
    with pytest.raises(UserError, match="5 prompts and 6 labels"):
        supervised_gradient(task, Examples(examples.x_0, examples.prompts[:5], examples.labels), settings(4))


def labels_asked_for(control, examples, monkeypatch, size, update=5):
    """The codes of one update, without a network: what `supervised` would ask the denoiser for."""
    asked = []
    monkeypatch.setattr(control, "denoiser", lambda process, prompts, y: asked.append(y))
    monkeypatch.setattr(module, "supervised", lambda *args: {"loss": torch.zeros(())})
    supervised_gradient(Task(control, control.base.process(4), [("coat", 0)], ["{}"], 1.0, 0), examples, settings(size))(update)
    return asked[0]


def test_one_factor_is_dropped_by_the_numbers_that_it_always_was(control, examples, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    expected = examples.labels[torch.randint(6, (200,), generator=generator)]
    expected[torch.rand(200, generator=generator) < module.LABEL_DROPOUT] = control.null
    assert torch.equal(labels_asked_for(control, examples, monkeypatch, 200), expected)


def test_each_factor_is_dropped_by_itself_and_all_together(base, examples, monkeypatch):
    space = Factors.of([2, 3])
    control = Control(base, space, 4, ["to_q"])
    both = Examples(examples.x_0, examples.prompts, space.check([(0, 1), (1, 2)] * 3))
    free = space.parts[labels_asked_for(control, both, monkeypatch, 10_000)] < 0
    share = torch.tensor([(free == torch.tensor(pattern)).all(1).float().mean() for pattern in ([1, 0], [0, 1], [1, 1], [0, 0])])
    assert share.tolist() == pytest.approx([0.081, 0.081, 0.109, 0.729], abs=0.02)


def test_encoded_images_decode_to_themselves_in_scale(base):
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    x_0 = base.encode_images(images, batch_size=2)
    mean = base.pipe.vae.encode(images / 127.5 - 1).latent_dist.mean
    assert torch.allclose(x_0, mean * base.pipe.vae.config.scaling_factor, atol=1e-5) and not x_0.requires_grad
