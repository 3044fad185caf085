"""`BayesianNetwork`: an `nn.Module` lifted to a Pyro program, with one site per parameter, named by its module path.

It lifts by parameter, not by layer class, and says what it lifted, what it left, and why (`table`). Next: `guides/mean_field.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from pyro_bmr.errors import ModelError
from pyro_bmr.likelihoods import Likelihood
from pyro_bmr.priors import Gaussian, Prior

_NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class BayesianNetwork(nn.Module):
    """A Pyro program `model(x, y=None)` whose sites are the parameters of `net`.

    Args:
        net: any module; it is used as it is, not copied, and its values are where guides start.
        prior: one prior for every parameter, or a mapping from patterns of parameter names (``"*.weight"``, shell style; an exact name
            counts first, then the first match) to priors, where None leaves the parameter a point estimate. Parameters that no pattern
            names are left too. Gains and offsets of norm layers are left as point estimates unless a mapping has their exact name.
        likelihood: `Categorical()`, `Normal()` or anything with their `observe`.

    Attributes:
        priors: parameter name → prior, for the lifted ones, in the order of the program's sites.
        left: parameter name → why it was left.

    Raises:
        ModelError: a pattern matches no parameter, nothing is lifted, or a value is not a prior.

    Example:
        >>> BayesianNetwork(net, prior={"head.*": Gaussian(1.0), "*": Horseshoe()}, likelihood=Categorical())
    """

    def __init__(self, net: nn.Module, prior: Prior | Mapping[str, Prior | None], likelihood: Likelihood) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise ModelError(f"BayesianNetwork(net={net!r}): a torch.nn.Module is wanted")
        if isinstance(likelihood, type) or not hasattr(likelihood, "observe"):
            raise ModelError(f"BayesianNetwork(likelihood={likelihood!r}): Categorical(), Normal() or anything with their observe is wanted")
        self.net = net
        self.likelihood = likelihood
        self.priors: dict[str, Prior] = {}
        self.left: dict[str, str] = {}
        patterns: Mapping[str, Prior | None] = prior if isinstance(prior, Mapping) else {"*": prior}
        self._check(patterns, may_leave=isinstance(prior, Mapping))
        norms = {
            f"{path}.{name}" if path else name: type(module).__name__
            for path, module in net.named_modules()
            if isinstance(module, _NORM_LAYERS)
            for name, _ in module.named_parameters(recurse=False)
        }
        for name, parameter in net.named_parameters():
            pattern = next((p for p in (name, *patterns) if p in patterns and fnmatchcase(name, p)), None)
            chosen = None if pattern is None else patterns[pattern]
            if not parameter.is_floating_point():
                self.left[name] = f"not a floating-point parameter ({parameter.dtype})"
            elif not parameter.requires_grad:
                self.left[name] = "frozen (requires_grad=False)"
            elif pattern is None:
                self.left[name] = "no pattern names it"
            elif chosen is None:
                self.left[name] = f"pattern '{pattern}' leaves it"
            elif name in norms and pattern != name:
                self.left[name] = f"gain or offset of a norm layer ({norms[name]}); give its exact name to lift it"
            else:
                self.priors[name] = chosen
        if not self.priors:
            raise ModelError(f"no parameter of {type(net).__name__} is lifted: {self.left or 'it has none'}; name one in `prior`")

    def _check(self, patterns: Mapping[str, Any], may_leave: bool) -> None:
        names = [name for name, _ in self.net.named_parameters()]
        for pattern, value in patterns.items():
            if not (value is None and may_leave) and (isinstance(value, type) or not isinstance(value, Prior)):
                raise ModelError(f"prior for '{pattern}': expected a prior such as Gaussian() or Horseshoe(), got {value!r}")
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise ModelError(f"prior pattern '{pattern}' matches no parameter; the parameters are: {', '.join(names)}")

    def copy(self) -> BayesianNetwork:
        """A copy for a fit. It shares the lifted parameters, of which a fit reads the shape and, at its start, the value; where a prior has its mean there, it
        has its own."""
        parameters = dict(self.net.named_parameters())
        shared = [parameters[name] for name, prior in self.priors.items() if not (isinstance(prior, Gaussian) and isinstance(prior.mean, str))]
        return copy.deepcopy(self, {id(parameter): parameter for parameter in shared})

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained as a point estimate: parameters that are no sites."""
        lifted = {id(p) for name, p in self.net.named_parameters() if name in self.priors}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in lifted]

    @property
    def plain_weights(self) -> set[str]:
        """The parameters whose site is the weight itself, under a Gaussian prior that depends on no other site."""
        return {name for name, prior in self.priors.items() if isinstance(prior, Gaussian) and prior.scale != "layer"}

    def weights(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameter name → drawn weight: the `pyro.sample` statements of the program, without the network and the data; none for the weights `given`."""
        given = given or {}
        parameters = dict(self.net.named_parameters()) if len(given) < len(self.priors) else {}
        return {
            name: given[name] if name in given else prior.sample(name, tuple(parameters[name].shape), parameters[name].detach())
            for name, prior in self.priors.items()
        }

    def forward(self, x: Tensor, y: Tensor | None = None, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The observed site; parameters whose values are given as `weights` have no site in this run."""
        return self.likelihood.observe(self._output(self.weights(weights), x), y)

    @property
    def has_log_likelihood(self) -> bool:
        """Whether `log_likelihood` can be had: all sites are plain weights, and the likelihood has a `log_prob`."""
        return self.plain_weights == set(self.priors) and hasattr(self.likelihood, "log_prob")

    def log_likelihood(self, weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Σ log p(y | x, weights) over the rows of a batch, nats: the observed site of `forward`, without the Pyro statements around it."""
        return self.likelihood.log_prob(self._output(weights, x), y)  # type: ignore[attr-defined]

    def _output(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What the network returns, in the precision of the weights: under `torch.autocast` its layers may have less, densities not."""
        return functional_call(self.net, dict(weights), (x,)).to(next(iter(weights.values())).dtype)

    def table(self) -> pd.DataFrame:
        """One row per parameter of the net: name, shape, size, prior (or None) and, if it was left, why."""
        rows = [
            (name, tuple(p.shape), p.numel(), repr(self.priors[name]) if name in self.priors else None, self.left.get(name, ""))
            for name, p in self.net.named_parameters()
        ]
        return pd.DataFrame(rows, columns=["parameter", "shape", "size", "prior", "why left"])
