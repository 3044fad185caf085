"""The log density of a batch, scaled to all N rows of the data, for any Pyro program."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger

from pyro_bmr.errors import ModelError


class WholeData(Messenger):
    """Scales the observed sites of a batch of `rows` rows up to the N = `size` rows of the data,
    unless their plate already does.
    """

    def __init__(self, size: int, rows: int) -> None:
        super().__init__()
        self.size, self.rows = size, rows

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or msg["infer"].get("_deterministic"):
            return
        rows = self.rows
        frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
        plate = next((f for f in frames if f.size == rows), None)
        if plate is None and frames:
            sizes = ", ".join(f"'{f.name}' of {f.size}" for f in frames)
            raise ModelError(
                f"observed site '{msg['name']}': expected a plate with the {rows} rows of the"
                f' batch, got plate {sizes}; put the site in pyro.plate("data", len(x))'
            )
        counted = rows if plate is None or plate.full_size is None else plate.full_size
        if counted not in (rows, self.size):
            name = plate.name if plate else ""
            raise ModelError(
                f"observed site '{msg['name']}': expected a plate of the {self.size} rows of the"
                f" data, got plate '{name}' of {counted}; give the plate the size of the data"
            )
        if counted != self.size:
            msg["scale"] = msg["scale"] * (self.size / rows)
