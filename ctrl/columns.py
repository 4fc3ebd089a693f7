"""What a column of the images' table says of each, as scores."""

import numpy as np
import pandas as pd

from ctrl.errors import UserError


def as_text(value: object) -> str:
    """What a cell of a table says; nothing where it is missing, and 2 where a column of whole numbers with gaps was stored as 2.0."""
    if pd.isna(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def scores_of(values: pd.Series, column: str, edges: object) -> tuple[np.ndarray, list[str] | None]:
    """The scores (N,) of what a table's column says, as text, and the names of its classes where `edges` is `values`.

    Then a score is the number of a class, in alphabetical order, or in that of numbers. UserError where it holds no numbers otherwise.
    """
    text = values.str.strip()
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    if edges != "values":
        if not np.isfinite(numbers).all():
            wrong = text[~np.isfinite(numbers)].iloc[0]
            raise UserError(f"the column {column} has {wrong[:50]!r}, which is no number: set label.edges: values, for a label a value")
        return numbers, None
    if np.isfinite(numbers).all():  # 1 and 1.0 are one value
        text = pd.Series([as_text(number) for number in numbers], values.index)
    names = sorted(set(text), key=(lambda name: float(name)) if np.isfinite(numbers).all() else None)
    if wrong := [name for name in names if "," in name or len(name) > 100]:
        raise UserError(f"the column {column} has {wrong[0][:120]!r}: the names of labels hold no comma and 100 characters at most")
    codes = {name: k for k, name in enumerate(names)}
    return text.map(codes).to_numpy(dtype=np.float64), names
