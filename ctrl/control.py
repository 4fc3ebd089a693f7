"""The augmented model: LoRA and a label embedding on a pretrained network, which at the start *is* the pretrained model, bit for bit.

Both live in the pretrained network itself, and `lora_on` switches them off: there is no second copy of the base.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ctrl.adapter_files import EMBEDDING_FILE, LORA_FILE, check_adapter, space_of_adapter
from ctrl.base import Base
from ctrl.embedding import FourierEmbedding, LabelEmbedding
from ctrl.errors import UserError
from ctrl.io import canonical, save_tensors, write_bytes
from ctrl.labels import Continuous, Factors
from ctrl.lora import ADAPTER, install
from ctrl.process import Denoiser, Pair, Process, Unguided


class Control:
    """LoRA layers and a zero-initialised label embedding, installed in the class-embedding slot of `base.network`.

    `num_classes` is the number of labels, or with several factors their `Factors`, or a `Continuous` space. Labels are those of
    ctrl.labels; `null` is "no label". Its embedding, and that of a factor left free, stays zero and gets no gradient.

    Below the timestep `min_timestep` the pretrained model finishes the image alone. There sigma_t is so small that the optimum hardly
    differs from it, and the weight of the KL so large that whatever else the adapter does there costs many nats; 0: nowhere.
    """

    def __init__(
        self, base: Base, num_classes: int | Factors | Continuous, rank: int, target_modules: Sequence[str], seed: int = 0,
        min_timestep: float = 0,
    ):  # fmt: skip
        network = base.network
        if network.class_embedding is not None:
            raise UserError(f"base: its {base.part} has a class embedding already; CTRL needs that slot for the new label")
        space = num_classes if isinstance(num_classes, Continuous) else Factors.of(num_classes)
        self.base, self.space, self.null = base, space, space.null
        self.settings = {**described_space(space), "rank": rank, "target_modules": list(target_modules), "min_timestep": min_timestep}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(target_modules))
            try:
                network.add_adapter(lora, ADAPTER)
            except ValueError as error:
                raise UserError(f"finetune.lora.target_modules: {error}") from error
        if isinstance(space, Continuous):
            network.class_embedding = FourierEmbedding(space.mean, space.sd, base.time_width, seed).to(base.device)
        else:
            network.class_embedding = LabelEmbedding(space, base.time_width, base.device)
        self._layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer) and ADAPTER in m.lora_A]
        self._lora = install(self._layers)
        self._merged: list[tuple[nn.Module, dict[str, Tensor]]] = []
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name."""
        return {name: p for name, p in self.base.network.named_parameters() if p.requires_grad}

    def groups(self, learning_rate: float, embedding_learning_rate: float) -> list[dict]:
        """Parameter groups for an optimizer: LoRA, and the label embedding with its own learning rate."""
        embedding = list(self.base.network.class_embedding.parameters())
        lora = [p for name, p in self.parameters().items() if not name.startswith("class_embedding.")]
        return [{"params": lora, "lr": learning_rate}, {"params": embedding, "lr": embedding_learning_rate}]

    @contextmanager
    def lora_on(self, rows: Literal["none", "half"]) -> Iterator[None]:
        """Inside, LoRA is off for all rows of a batch, or for the first half: there the network is the pretrained one."""
        self._switch(rows)
        try:
            yield
        finally:
            self._switch("all")

    def recompute_blocks(self) -> None:
        """From now on a pass keeps what goes into each of the network's blocks alone; what is inside is computed again on the way back.

        By then the LoRA may be on that was off in the pass, or trained that was held: each block is computed again as it was.
        """
        parameters = list(self.parameters().values())

        def checkpoint(block: nn.Module, *arguments):
            was = self._lora.on, parameters[0].requires_grad

            def again(*arguments):
                now = self._lora.on, parameters[0].requires_grad
                self._restore(parameters, *was)
                try:
                    return block(*arguments)
                finally:
                    self._restore(parameters, *now)

            return torch.utils.checkpoint.checkpoint(again, *arguments, use_reentrant=False)

        self.base.network.enable_gradient_checkpointing(checkpoint)

    def _restore(self, parameters: Sequence[nn.Parameter], on: str, trained: bool) -> None:
        if on != self._lora.on:
            self._switch(on)
        if trained != parameters[0].requires_grad:
            for parameter in parameters:
                parameter.requires_grad_(trained)

    def _switch(self, on: str) -> None:
        self._lora.on = on
        for module, weights in self._merged:
            module.weight.data = weights[on]

    @torch.no_grad()
    def merge(self) -> "Control":
        """For sampling alone: LoRA added to the weights once, so that a pass costs what the pretrained model's costs; returns itself.

        The pretrained weights are kept beside the merged ones, and take turns with them: inside `lora_on("none")` the model is still the
        pretrained one, bit for bit. The LoRA layers themselves are gone from the network: there is nothing left to train or to save.
        """
        for name, layer in [(n, m) for n, m in self.base.network.named_modules() if isinstance(m, BaseTunerLayer)]:
            module, delta = layer.get_base_layer(), layer.get_delta_weight(ADAPTER)
            self._merged.append((module, {"none": module.weight.data, "all": module.weight.data + delta.to(module.weight)}))
            self.base.network.set_submodule(name, module)
        self._layers = []
        self._switch("all")
        return self

    def base_denoiser(self, process: Process, prompts: Sequence[str | None], guidance_scale: float = 1.0) -> Denoiser:
        """The pretrained model with its prompt guidance: LoRA off, null label."""
        labels = torch.full((len(prompts),), self.null, device=self.base.device)
        eps = self.base.guided(process, prompts, guidance_scale, labels, self.null)

        def denoiser(x_t: Tensor, i: int) -> Tensor:
            with self.lora_on("none"):
                return eps(x_t, i)

        return denoiser

    def denoiser(
        self, process: Process, prompts: Sequence[str], labels: Tensor, guidance_scale: float = 1.0, strength: float = 1.0
    ) -> Denoiser:
        """The augmented model for `labels` with shape (B,): eps_pre + strength · (eps_psi − eps_pre).

        A strength of 1 costs what the pretrained model costs, and 0 is the pretrained model; others need both. UserError where the labels
        are not codes of the control's space, one for each prompt.
        """
        labels = self.space.check_codes(labels, len(prompts))
        pre = self.base_denoiser(process, prompts, guidance_scale)
        if strength == 0:
            return pre
        psi, active = self.base.guided(process, prompts, guidance_scale, labels.to(self.base.device), self.null), self.active(process)

        def denoiser(x_t: Tensor, i: int | Tensor) -> Tensor:
            if not isinstance(i, Tensor) and not active[i]:  # images with steps of their own are asked for at active ones
                return pre(x_t, i)
            if strength == 1:
                return psi(x_t, i)
            eps_pre = pre(x_t, i)
            return eps_pre + strength * (psi(x_t, i) - eps_pre)

        return denoiser

    def unguided(self, process: Process, prompts: Sequence[str], guidance_scale: float) -> Unguided:
        """The pretrained model in two parts: under the prompts alone, and how the empty prompt makes that the guided one."""
        prompted, empty = (self.base_denoiser(process, which) for which in (prompts, [None] * len(prompts)))

        def guide(x_t: Tensor, i: int, eps: Tensor) -> Tensor:
            eps_empty = empty(x_t, i)
            return eps_empty + guidance_scale * (eps - eps_empty)

        return Unguided(prompted, guide)

    def both(self, process: Process, prompts: Sequence[str], labels: Tensor, guidance_scale: float = 1.0) -> Pair:
        """The augmented and the pretrained model at the same x_t, in one batch: eps_psi and eps_pre, at a step where the control acts.

        ValueError after `merge`: merged weights are those of one model at a time.
        """
        if self._merged:
            raise ValueError("LoRA is merged into the weights: the two models have no batch in common")
        labels = self.space.check_codes(labels, len(prompts)).to(self.base.device)
        labels = torch.cat([torch.full_like(labels, self.null), labels])
        eps = self.base.guided(process, [*prompts, *prompts], guidance_scale, labels, self.null)

        def denoisers(x_t: Tensor, i: int) -> tuple[Tensor, Tensor]:
            with self.lora_on("half"):
                eps_pre, eps_psi = eps(torch.cat([x_t, x_t]), i).chunk(2)
            return eps_psi, eps_pre

        return denoisers

    def guided_denoiser(
        self, process: Process, prompts: Sequence[str], labels: Tensor, scale: float, guidance_scale: float = 1.0
    ) -> Denoiser:
        """Classifier-free guidance on the label: eps_psi(∅) + scale · (eps_psi(y) − eps_psi(∅)), both in one batch (Ho & Salimans 2022)."""
        labels = self.space.check_codes(labels, len(prompts)).to(self.base.device)
        both = torch.cat([torch.full_like(labels, self.null), labels])
        psi = self.base.guided(process, [*prompts, *prompts], guidance_scale, both, self.null)
        pre, active = self.base_denoiser(process, prompts, guidance_scale), self.active(process)

        def denoiser(x_t: Tensor, i: int) -> Tensor:
            if not active[i]:
                return pre(x_t, i)
            free, labelled = psi(torch.cat([x_t, x_t]), i).chunk(2)
            return free + scale * (labelled - free)

        return denoiser

    def active(self, process: Process) -> list[bool]:
        """At which steps the control acts."""
        return [t >= self.settings["min_timestep"] for t in process.timesteps.tolist()]

    def save(self, folder: Path) -> None:
        """Writes the LoRA as diffusers reads it, and the label embedding beside it, into an existing folder."""
        network, part = self.base.network, self.base.part
        lora = get_peft_model_state_dict(network, adapter_name=ADAPTER)
        metadata = network.peft_config[ADAPTER].to_dict()  # carries lora_alpha, which is lost without it
        metadata["target_modules"] = sorted(metadata["target_modules"])  # a set's order changes from process to process
        with TemporaryDirectory() as temporary:  # diffusers writes in place: a killed run would leave half a file
            self.base.pipe.save_lora_weights(temporary, **{f"{part}_lora_layers": lora, f"{part}_lora_adapter_metadata": metadata})
            write_bytes(Path(folder) / LORA_FILE, canonical((Path(temporary) / LORA_FILE).read_bytes()))
        save_tensors(Path(folder) / EMBEDDING_FILE, network.class_embedding.state_dict())


def described_space(space: Factors | Continuous) -> dict:
    """What adapter.json holds of the labels: their number (of each factor), or the fields of a continuous label."""
    if isinstance(space, Continuous):
        return {"continuous": asdict(space)}
    sizes = [f.num_classes for f in space.factors]
    return {"num_classes": sizes[0] if len(sizes) == 1 else sizes}


def load(base: Base, folder: str | Path) -> Control:
    """The trained control in `folder`, on `base`. Raises UserError as `check_adapter` does."""
    folder = Path(folder)
    described, lora, embedding = check_adapter(base, folder)
    space = space_of_adapter(described)
    control = Control(base, space, described["rank"], described["target_modules"], min_timestep=described["min_timestep"])
    state = {key.removeprefix(f"{base.part}."): value for key, value in lora.items()}
    unexpected = set_peft_model_state_dict(base.network, state, adapter_name=ADAPTER).unexpected_keys
    if unexpected or len(state) != 2 * len(control._layers):
        raise UserError(f"{folder / LORA_FILE}: its layers are not those that {folder / 'adapter.json'} describes; train it again")
    base.network.class_embedding.load_state_dict(embedding)
    return control


def describe(control: Control, base_path: str, sampler: dict, label_names: Sequence[str], extra: dict) -> dict:
    """What adapter.json holds: how to load and to sample, and what the adapter was made for; with several factors, their names too.

    `sampler` is the config's section with the `timesteps` that it amounts to.
    """
    space = control.space
    named = isinstance(space, Factors) and len(space.factors) > 1
    return {
        "base": str(base_path),
        "base_kind": control.base.source.kind,
        "base_files": control.base.source.how,
        "base_fingerprint": control.base.fingerprint(),
        "base_fingerprint_bfloat16": control.base.fingerprint(torch.bfloat16),
        "dtype": str(control.base.dtype).removeprefix("torch."),
        **control.settings,
        "null_label": space.label(space.null) if isinstance(space, Continuous) else control.null,
        "label_names": list(label_names),
        **({"factors": {key: list(f.names) for key, f in zip(space.keys, space.factors, strict=True)}} if named else {}),
        "sampler": {key: sampler[key] for key in ("num_steps", "spacing", "timesteps", "eta", "guidance_scale")},
        **json.loads(json.dumps(extra)),
    }
