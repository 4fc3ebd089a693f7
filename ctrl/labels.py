"""Label spaces: what a control may ask for, and how it indexes an embedding table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl.errors import UserError


@dataclass(frozen=True)
class Categorical:
    """One of `num_classes` labels, 0 to num_classes - 1, each with a name; the null label, "no control", follows them."""

    num_classes: int
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.num_classes < 2:
            raise UserError(f"a control needs at least 2 classes, not {self.num_classes}")
        if self.names and len(self.names) != self.num_classes:
            raise UserError(f"{len(self.names)} label names for {self.num_classes} classes: {list(self.names)}")

    @classmethod
    def from_report(cls, report: dict) -> "Categorical":
        """The label space of a dataset, from its report.json."""
        return cls(report["num_classes"], tuple(report["label_names"]))

    @property
    def null(self) -> int:
        """Index of the null label."""
        return self.num_classes

    @property
    def num_embeddings(self) -> int:
        """Rows of an embedding table: every label, then the null label."""
        return self.num_classes + 1

    def check(self, labels: int | None | Sequence[int | None] | Tensor) -> Tensor:
        """`labels` as int64 with shape (B,), where None becomes the null label; UserError where one is not of this space."""
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        if labels is None or isinstance(labels, int | float | str):
            labels = [labels]
        labels = [y.item() if hasattr(y, "item") else y for y in labels]
        for y in labels:
            if y is not None and (not isinstance(y, int) or isinstance(y, bool) or not 0 <= y < self.num_classes):
                raise UserError(f"no label {y!r}: {self.describe()}")
        return torch.tensor([self.null if y is None else y for y in labels], dtype=torch.int64)

    def describe(self) -> str:
        """The labels in words, for messages and help texts."""
        names = [f"{y} ({name})" for y, name in enumerate(self.names)] or [f"0 to {self.num_classes - 1}"]
        return "the labels are " + ", ".join(names)
