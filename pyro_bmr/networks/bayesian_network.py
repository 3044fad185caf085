"""`BayesianNetwork`: an `nn.Module` lifted to a Pyro program, with one site per parameter, named by
its module path.

It lifts by parameter, not by layer class, and says what it lifted, what it left, and why (`table`).
Next: `tracing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from pyro_bmr.errors import ModelError, described
from pyro_bmr.likelihoods.likelihood import Likelihood
from pyro_bmr.networks.constraints import Constraint, constraints_of
from pyro_bmr.networks.plain_module import module_copy, plain_module
from pyro_bmr.priors import Gaussian, Prior

if TYPE_CHECKING:
    import pandas as pd

_NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class BayesianNetwork(nn.Module):
    """A Pyro program `model(x, y=None)` whose sites are the parameters of `net`.

    The names are those of the plain module (`plain_module`): a compiled network has no
    `_orig_mod.`, one under `DataParallel` no `module.`, and what `torch.nn.utils.prune` has pruned
    is the site ``weight``, not ``weight_orig``, whose masked entries are pruned from the start: 0
    in every draw, and in the masks of every fit. Weight norm is folded: the site is the weight
    g·v/‖v‖, which may have any value, and not its gain and direction, of which the data cannot tell
    the direction's length and whose zero is 0/0. Other parametrizations stay, and what they are
    made of is a site only where zero is a zero of the tensor (`constraints_of`): the tensors of
    `spectral_norm` and `orthogonal` are point estimates.

    Args:
        net: any module; it is used as it is where its parameters are plain, else a copy is. Its
            values are where guides start. It is never changed.
        prior: one prior for every parameter, or a mapping from patterns of parameter names
            (``"*.weight"``, shell style; an exact name counts first, then the first match) to
            priors, where None leaves the parameter a point estimate. Parameters that no pattern
            names are left too. Gains and offsets of norm layers, and tensors whose zero is no zero,
            are left as point estimates unless a mapping has their exact name.
        likelihood: `Categorical()`, `Normal()` or anything with their `observe`.

    Attributes:
        priors: parameter name → prior, for the lifted ones, in the order of the program's sites.
        left: parameter name → why it was left.
        masks: site → bool tensor of the entries that live, for what `torch.nn.utils.prune` has
            pruned.

    Raises:
        ModelError: a pattern matches no parameter, nothing is lifted, or a value is not a prior;
            the network is scripted, exported or quantised, has a parameter without dense values
            (lazy, meta, sparse) or lifted ones of different dtypes, or asks by name for a tensor of
            which zero is 0/0.

    Example:
        >>> BayesianNetwork(net, prior={"head.*": Gaussian(1.0), "*": Horseshoe()},
        ...     likelihood=Categorical())
    """

    def __init__(
        self, net: nn.Module, prior: Prior | Mapping[str, Prior | None], likelihood: Likelihood
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise ModelError(f"BayesianNetwork(net={described(net)}): a torch.nn.Module is wanted")
        if isinstance(likelihood, type) or not hasattr(likelihood, "observe"):
            raise ModelError(
                f"BayesianNetwork(likelihood={described(likelihood)}): Categorical(), Normal() or"
                " anything with their observe is wanted"
            )
        _refuse(net)
        self.net, masks = plain_module(net)
        net = self.net
        self.likelihood = likelihood
        self.priors: dict[str, Prior] = {}
        self.left: dict[str, str] = {}
        patterns: Mapping[str, Prior | None] = prior if isinstance(prior, Mapping) else {"*": prior}
        self._check(patterns, may_leave=isinstance(prior, Mapping))
        norms, constraints = _norm_parameters(net), constraints_of(net)
        for name, parameter in net.named_parameters():
            pattern = next(
                (p for p in (name, *patterns) if p in patterns and fnmatchcase(name, p)), None
            )
            chosen = None if pattern is None else patterns[pattern]
            reason = _unsuitable(parameter)
            if reason is None and pattern is None:
                reason = "no pattern names it"
            elif reason is None and chosen is None:
                reason = f"pattern '{pattern}' leaves it"
            elif reason is None and name in norms and pattern != name:
                reason = (
                    f"gain or offset of a norm layer ({norms[name]}); give its exact name to"
                    " lift it"
                )
            elif reason is None and name in constraints:
                reason = _left_for(name, constraints[name], pattern == name)
            if reason is None:
                self.priors[name] = cast(Prior, chosen)
            else:
                self.left[name] = reason
        if not self.priors:
            raise ModelError(
                f"no parameter of {type(net).__name__} is lifted: {self.left or 'it has none'};"
                " name one in `prior`"
            )
        dtypes = {
            parameter.dtype for name, parameter in net.named_parameters() if name in self.priors
        }
        if len(dtypes) > 1:
            raise ModelError(
                f"the lifted parameters have dtypes {', '.join(sorted(map(str, dtypes)))}; one is"
                " wanted: cast the network, as in net.float()"
            )
        self._left_masks = {name: mask for name, mask in masks.items() if name not in self.priors}
        self.masks = {name: mask for name, mask in masks.items() if name in self.priors}

    def _check(self, patterns: Mapping[str, Any], may_leave: bool) -> None:
        names = [name for name, _ in self.net.named_parameters()]
        for pattern, value in patterns.items():
            if not (value is None and may_leave) and (
                isinstance(value, type) or not isinstance(value, Prior)
            ):
                raise ModelError(
                    f"prior for '{pattern}': expected a prior such as Gaussian() or Horseshoe(),"
                    f" got {described(value)}"
                )
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise ModelError(
                    f"prior pattern '{pattern}' matches no parameter; the parameters are:"
                    f" {', '.join(names)}"
                )

    def copy(self) -> BayesianNetwork:
        """A copy for a fit. It shares the lifted parameters, of which a fit reads the shape and, at
        its start, the value; where a prior has its mean there, it has its own.
        """
        parameters = dict(self.net.named_parameters())
        shared = [
            parameters[name]
            for name, prior in self.priors.items()
            if not (isinstance(prior, Gaussian) and isinstance(prior.mean, str))
        ]
        return cast(
            BayesianNetwork, module_copy(self, {id(parameter): parameter for parameter in shared})
        )

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained as a point estimate: parameters that are no sites."""
        lifted = {id(p) for name, p in self.net.named_parameters() if name in self.priors}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in lifted]

    @property
    def plain_weights(self) -> set[str]:
        """The parameters whose site is the weight itself, under a Gaussian prior that depends on no
        other site.
        """
        return {
            name
            for name, prior in self.priors.items()
            if isinstance(prior, Gaussian) and prior.scale != "layer"
        }

    def weights(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameter name → drawn weight: the `pyro.sample` statements of the program, without the
        network and the data; none for the weights `given`.
        """
        given = given or {}
        parameters = dict(self.net.named_parameters()) if len(given) < len(self.priors) else {}
        weights = {}
        for name, prior in self.priors.items():
            if name in given:
                weights[name] = given[name]
            else:
                weight, mask = (
                    prior.sample(name, tuple(parameters[name].shape), parameters[name].detach()),
                    self.masks.get(name),
                )
                weights[name] = weight if mask is None else weight * mask.to(weight.device)
        return weights

    def forward(
        self, x: Tensor, y: Tensor | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The observed site; parameters whose values are given as `weights` have no site in this
        run.
        """
        return self.likelihood.observe(self._output(self.weights(weights), x), y)

    @property
    def has_log_likelihood(self) -> bool:
        """Whether `log_likelihood` can be had: all sites are plain weights, and the likelihood has
        a `log_prob`.
        """
        return self.plain_weights == set(self.priors) and hasattr(self.likelihood, "log_prob")

    def log_likelihood(self, weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Σ log p(y | x, weights) over the rows of a batch, nats: the observed site of `forward`,
        without the Pyro statements around it.
        """
        return self.likelihood.log_prob(self._output(weights, x), y)  # type: ignore[attr-defined]

    def _output(self, weights: Mapping[str, Tensor], x: Tensor) -> Any:
        """What the network returns, in the precision of the weights: under `torch.autocast` its
        layers may have less, densities not. Tensors within tuples, lists and dicts are treated
        alike; whole numbers and what is no tensor stay as they are.
        """
        dtype, given = next(iter(weights.values())).dtype, dict(weights)
        for name, mask in self._left_masks.items():  # pruned point estimates stay pruned
            parameter = self.net.get_parameter(name)
            given[name] = parameter * mask.to(parameter.device)
        output = functional_call(self.net, given, (x,))
        if isinstance(output, Tensor):
            return output if output.is_complex() else output.to(dtype)
        return tree_map(
            lambda part: (
                part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part
            ),
            output,
        )

    def table(self) -> pd.DataFrame:
        """One row per parameter of the net: name, shape, size, prior (or None) and, if it was left,
        why.
        """
        import pandas as pd

        rows = [
            (
                name,
                tuple(p.shape),
                p.numel(),
                repr(self.priors[name]) if name in self.priors else None,
                self.left.get(name, ""),
            )
            for name, p in self.net.named_parameters()
        ]
        return pd.DataFrame(rows, columns=["parameter", "shape", "size", "prior", "why left"])


def _norm_parameters(net: nn.Module) -> dict[str, str]:
    """Parameter of a norm layer → the layer's class."""
    return {
        f"{path}.{name}" if path else name: type(module).__name__
        for path, module in net.named_modules()
        if isinstance(module, _NORM_LAYERS)
        for name, _ in module.named_parameters(recurse=False)
    }


def _unsuitable(parameter: nn.Parameter) -> str | None:
    """Why no prior can be over a parameter, if so."""
    if parameter.is_complex():
        return (
            f"complex ({parameter.dtype}); priors are over real numbers: keep its parts in a real"
            " parameter, torch.view_as_complex(w) inside the network"
        )
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"not a floating-point parameter to compute with ({parameter.dtype})"
    if not parameter.requires_grad:
        return "frozen (requires_grad=False)"
    return None if parameter.numel() else f"it has no entries (shape {tuple(parameter.shape)})"


def _left_for(name: str, constraint: Constraint, by_name: bool) -> str | None:
    mend = "torch.nn.utils.parametrize.remove_parametrizations makes it a plain weight"
    if by_name and constraint.never:
        raise ModelError(f"prior for '{name}': {constraint.why}, so it cannot be a site; {mend}")
    return (
        None
        if by_name
        else f"{constraint.why}; {mend if constraint.never else 'give its exact name to lift it'}"
    )


def _refuse(net: nn.Module) -> None:
    """Raises ModelError for a network whose weights cannot be given from outside, or are not
    there.
    """
    for path, module in net.named_modules():
        where = f"'{path}' ({type(module).__name__})" if path else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{where}: a scripted module takes no weights from outside; give the"
                " torch.nn.Module that it was made of"
            )
        if "train" in vars(module):  # torch.export puts a refusal there
            raise ModelError(
                f"{where}: an exported program has no training mode; give the torch.nn.Module that"
                " it was made of"
            )
        if ".quantized" in type(module).__module__:
            name = type(net).__name__
            raise ModelError(
                f"no parameter of {name} is lifted: {where} is a quantised layer, which has none;"
                " give the network as it was before"
            )
    for name, parameter in net.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(
                f"parameter '{name}' has no shape yet; run the network once on a row of data"
            )
        if parameter.is_meta or parameter.layout != torch.strided:
            kind = (
                "on the device 'meta', without values"
                if parameter.is_meta
                else f"of layout {parameter.layout}"
            )
            raise ModelError(
                f"parameter '{name}' is {kind}; a dense parameter with values is wanted"
            )
