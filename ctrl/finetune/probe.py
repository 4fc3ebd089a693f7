"""The probe: how the same images, of fixed prompts, labels and noise, fare as the training goes on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl.finetune.task import Task
from ctrl.pairs import draw
from ctrl.sampling import noise_of, sample


def probe_function(
    task: Task, score: Callable[[Tensor, Sequence[str], Tensor], dict[str, float]], num_images: int, batch_size: int
) -> Callable[[int], dict[str, float]]:
    """`probe(update)`, for the loop: `score(images, subjects, labels)` of the same prompts, labels and noise each time.

    Its random numbers are its own: the training does not depend on it.
    """
    base, generator = task.control.base, torch.Generator().manual_seed(task.seed)
    prompts, subjects, labels = draw(task.cells, task.templates, num_images, generator)
    noise = noise_of(torch.randint(2**62, (num_images,), generator=generator).tolist(), base.latent_shape, task.process.num_steps)

    def probe(update: int) -> dict[str, float]:
        images = []
        for part in torch.arange(num_images).split(batch_size):
            psi = task.control.denoiser(task.process, [prompts[k] for k in part], labels[part], task.guidance_scale)
            x_0 = sample(task.process, psi, noise[:, part].to(base.device))
            with torch.no_grad():
                images.append(base.decode(x_0).clamp(-1, 1).cpu())
        return score(torch.cat(images), subjects, labels)

    return probe
