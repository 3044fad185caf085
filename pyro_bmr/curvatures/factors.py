r"""`Curvature`: the curvature of the negative log likelihood of a network, parameter by parameter.

Owns `Curvature` and `LayerCurvature`. Next: `multiplications.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_bmr.errors import described

if TYPE_CHECKING:
    import pandas as pd

SiteCurvature = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerCurvature:
    r"""H ≈ outputs ⊗ inputs of one weight (n, m) and the bias that is added to its product.

    `outputs`: G (n, n), summed over the rows of the data and the positions of each, nats.
    `inputs`: A, the mean of a aᵀ over rows and positions, (m, m); with a `bias` (m + 1, m + 1), the
    last column for the bias. `turned`: the weight is (in, out), so that the factor of its rows is
    `inputs`. `uses`: how often a forward pass multiplies by the weight.
    """

    weight: str
    bias: str | None
    outputs: Tensor
    inputs: Tensor
    shape: tuple[int, ...]
    turned: bool = False
    uses: int = 1

    __repr__ = described

    @property
    def is_zero(self) -> bool:
        """Whether the loss does not depend on the weight at all."""
        return not bool(self.outputs.diagonal().any() & self.inputs.any())

    def of_weight(self) -> SiteCurvature:
        """The block of the weight: (rows, columns), or zeros of its shape."""
        if self.is_zero:
            return self.outputs.new_zeros(self.shape)
        inputs = self.inputs if self.inputs.ndim == 2 else self.inputs.diag()
        inputs = inputs if self.bias is None else inputs[:-1, :-1]
        return (inputs, self.outputs) if self.turned else (self.outputs, inputs)

    def of_bias(self) -> SiteCurvature:
        """The block of the bias."""
        if self.is_zero:
            return self.outputs.new_zeros(len(self.outputs))
        return self.outputs, self.inputs[-1:, -1:]


@dataclass(frozen=True)
class Curvature(Mapping[str, SiteCurvature]):
    """Parameter → its curvature, as `Posterior.from_curvature` takes it: a pair of Kronecker
    factors (rows, columns), or a diagonal in the shape of the parameter. Summed over the data, nats
    per squared unit.

    A weight and its bias share the factors of their layer (`layers`); the two blocks here are those
    of H, without the covariance between weight and bias.

    `layers`: weight → `LayerCurvature`. `diagonals`: parameter → tensor. `why`: for the parameters
    with a diagonal, the function that uses them. `rows`: N.
    """

    layers: Mapping[str, LayerCurvature]
    diagonals: Mapping[str, Tensor]
    why: Mapping[str, str]
    rows: int

    def __repr__(self) -> str:
        said = [f"{len(self.layers)} layers", f"{len(self.diagonals)} diagonals"]
        return f"Curvature({', '.join(said)}, {self.rows:,} rows)"

    def __getitem__(self, name: str) -> SiteCurvature:
        if name in self.layers:
            return self.layers[name].of_weight()
        if name in self.diagonals:
            return self.diagonals[name]
        return self.layers[self._of_bias[name]].of_bias()

    def __iter__(self) -> Iterator[str]:
        return iter([*self.layers, *self._of_bias, *self.diagonals])

    def __len__(self) -> int:
        return len(self.layers) + len(self._of_bias) + len(self.diagonals)

    @property
    def _of_bias(self) -> dict[str, str]:
        """Bias → the weight whose layer it belongs to."""
        return {layer.bias: name for name, layer in self.layers.items() if layer.bias is not None}

    def table(self) -> pd.DataFrame:
        """One row per parameter: parameter, structure, factors (their sides), uses (in a forward
        pass), and why it has a diagonal.
        """
        import pandas as pd

        rows = []
        for name, layer in self.layers.items():
            sides = f"{len(layer.outputs)}, {len(layer.inputs)}"
            rows.append((name, "kronecker", sides, layer.uses, ""))
            if layer.bias is not None:
                rows.append((layer.bias, "kronecker", f"of {name}", layer.uses, ""))
        for name in self.diagonals:
            rows.append((name, "diagonal", "", 0, self.why[name]))
        return pd.DataFrame(rows, columns=["parameter", "structure", "factors", "uses", "why"])
