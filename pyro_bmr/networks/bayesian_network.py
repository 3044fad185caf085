"""`BayesianNetwork`: an `nn.Module` lifted to a Pyro program, with one site per parameter, named by
its module path.

Which parameters are lifted is in `lifting.py`; `table` shows it, and why others were left. Next:
`tracing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_bmr.checks import check_arguments
from pyro_bmr.data.inputs import Inputs, call_arguments
from pyro_bmr.errors import ModelError
from pyro_bmr.likelihoods.likelihood import Likelihood, read_inputs
from pyro_bmr.networks.lifting import check_network, check_patterns, lifted_parameters
from pyro_bmr.networks.placed_weights import PlacedWeights
from pyro_bmr.networks.plain_module import module_copy, plain_module
from pyro_bmr.priors import Gaussian, Prior
from pyro_bmr.priors.weight_form import WeightForm, form_of

if TYPE_CHECKING:
    import pandas as pd


class BayesianNetwork(nn.Module):
    """A Pyro program `model(x, y=None)` whose sites are the parameters of `net`.

    The names are those of the plain module (`plain_module`): a compiled network has no
    `_orig_mod.`, one under `DataParallel` no `module.`. A tensor that `torch.nn.utils.prune` has
    pruned is the site ``weight``, not ``weight_orig``. Its masked entries are pruned from the
    start: 0 in every draw, and in the masks of every fit.

    Weight norm is folded: the site is the weight g·v/‖v‖, which may have any value. Gain and
    direction are no sites, since the data do not determine the length of the direction, and its
    zero is 0/0. Other parametrizations are kept. Their parameters are sites only if zero is a zero
    of the tensor (`constraints_of`), so those of `spectral_norm` and `orthogonal` are point
    estimates.

    Args:
        net: any module; it is used as it is if its parameters are plain, else copied. Its values
            are where guides start. It is never changed.
        prior: one prior for every parameter, or a mapping from patterns of parameter names
            (``"*.weight"``, shell style; an exact name counts first, then the first match) to
            priors, where None leaves the parameter a point estimate. Parameters that no pattern
            matches are left too. Gains and offsets of norm layers, and tensors whose zero is no
            zero, are point estimates unless a mapping has their exact name.
        likelihood: `Categorical()`, `Normal()` or anything with their `observe`.

    Attributes:
        priors: parameter name → prior, for the lifted ones, in the order of the program's sites.
        left: parameter name → why it was left.
        columns: the names of the columns of the table that it was fitted to, if it was one.
        masks: site → bool tensor of the entries that are kept, for the tensors that
            `torch.nn.utils.prune` has pruned.
        left_masks: the same of the parameters that were left.

    Raises:
        ModelError: a pattern matches no parameter, nothing is lifted, or a value is not a prior;
            the network is scripted, exported or quantised, has a parameter without dense values
            (lazy, sparse) or lifted ones of different dtypes; or a prior is given by name to
            a tensor whose zero is 0/0.

    Example:
        >>> BayesianNetwork(net, prior={"head.*": Gaussian(1.0), "*": Horseshoe()},
        ...     likelihood=Categorical())
    """

    def __init__(
        self, net: nn.Module, prior: Prior | Mapping[str, Prior | None], likelihood: Likelihood
    ) -> None:
        super().__init__()
        check_arguments("BayesianNetwork", isinstance(net, nn.Module), "a torch.nn.Module", net=net)
        check_arguments(
            "BayesianNetwork",
            not isinstance(likelihood, type) and hasattr(likelihood, "observe"),
            "Categorical(), Normal() or anything with their observe",
            likelihood=likelihood,
        )
        check_network(net)
        self.net, masks = plain_module(net)
        self.likelihood = likelihood
        self.columns: tuple[str, ...] | None = None
        patterns: Mapping[str, Prior | None] = prior if isinstance(prior, Mapping) else {"*": prior}
        check_patterns(self.net, patterns, may_leave=isinstance(prior, Mapping))
        self.priors, self.left = lifted_parameters(self.net, patterns)
        self.left_masks = {name: mask for name, mask in masks.items() if name not in self.priors}
        self.masks = {name: mask for name, mask in masks.items() if name in self.priors}

    def copy(self) -> BayesianNetwork:
        """A copy for a fit. It shares the lifted parameters, since a fit only reads their shapes
        and start values; a parameter that is the mean of its prior is copied.
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
        """The parameters that are no sites, and are trained as point estimates."""
        lifted = {id(p) for name, p in self.net.named_parameters() if name in self.priors}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in lifted]

    @cached_property
    def forms(self) -> dict[str, WeightForm]:
        """Parameter name → its weight and the densities of its sites, written out, for the priors
        that have a form.
        """
        shapes = {name: tuple(p.shape) for name, p in self.net.named_parameters()}
        return {
            name: form
            for name, prior in self.priors.items()
            if (form := form_of(prior, name, shapes[name])) is not None
        }

    def weights(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameter name → its weight, drawn by the `pyro.sample` statements of the program unless
        it is `given`; neither the network nor the data are used.
        """
        given = given or {}
        parameters = dict(self.net.named_parameters()) if len(given) < len(self.priors) else {}
        weights = {}
        for name, prior in self.priors.items():
            if name in given:
                weights[name] = given[name]
            else:
                start = parameters[name].detach()
                if start.is_meta:
                    raise ModelError(
                        f"parameter '{name}': expected a dense parameter with values, got one that"
                        " is on the device 'meta', from which only sharded_fit can start"
                    )
                weight, mask = (
                    prior.sample(name, tuple(start.shape), start),
                    self.masks.get(name),
                )
                weights[name] = weight if mask is None else weight * mask.to(weight.device)
        return weights

    def forward(
        self, x: Inputs, y: Tensor | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The value of the observed site. The network is called as ``net(x)``, ``net(*x)`` for a
        tuple of tensors, or ``net(**x)`` for a dict. Parameters whose values are given as `weights`
        have no site in this run.
        """
        x, read = read_inputs(self.likelihood, x)
        return self.likelihood.observe(self._output(self.weights(weights), x), y, **read)

    def inputs_of(self, x: Inputs) -> Inputs:
        """The part of x that the network is called with; the likelihood may read another."""
        return read_inputs(self.likelihood, x)[0]

    @property
    def missing_targets(self) -> bool:
        """Whether a target may be NaN, which the likelihood then leaves out."""
        return getattr(self.likelihood, "missing", "refuse") == "ignore"

    @property
    def has_log_likelihood(self) -> bool:
        """Whether `log_likelihood` is defined: all priors have a form, and the likelihood has a
        `log_prob` and no latent sites of its own.
        """
        inferred = getattr(self.likelihood, "inferred", ())
        return self.all_written and hasattr(self.likelihood, "log_prob") and not inferred

    @property
    def all_written(self) -> bool:
        """Whether all priors have a form."""
        return len(self.forms) == len(self.priors)

    def log_likelihood(
        self,
        weights: Mapping[str, Tensor],
        x: Inputs,
        y: Tensor,
        placed: PlacedWeights | None = None,
    ) -> Tensor:
        """Σ log p(y | x, weights) over the rows of a batch, nats: the observed site of `forward`,
        without the Pyro statements around it. Parameters without `weights` are the network's own.
        `placed`: made of `net`, to save the time.
        """
        x, read = read_inputs(self.likelihood, x)
        output = self._output(weights, x, placed)
        return self.likelihood.log_prob(output, y, **read)  # type: ignore[attr-defined]

    def _output(
        self, weights: Mapping[str, Tensor], x: Inputs, placed: PlacedWeights | None = None
    ) -> Any:
        """What the network returns, its floating-point tensors in the dtype of the weights, also in
        tuples, lists and dicts: `torch.autocast` may lower the precision of layers, not of
        densities. Of the named outputs of a Hugging Face model it is the `logits`.
        """
        given = weights
        if self.left_masks:  # point estimates that are pruned
            parameters = {name: self.net.get_parameter(name) for name in self.left_masks}
            masked = {n: p * self.left_masks[n].to(p.device) for n, p in parameters.items()}
            given = {**weights, **masked}
        output = (placed or PlacedWeights(self.net)).call(given, *call_arguments(self.net, x))
        dtype = next(chain(weights.values(), self.net.parameters())).dtype
        if type(output) is Tensor and output.dtype == dtype:
            return output
        if isinstance(output, Mapping) and hasattr(output, "logits"):
            output = output.logits
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

        rows = []
        for name, p in self.net.named_parameters():
            prior = repr(self.priors[name]) if name in self.priors else None
            rows.append((name, tuple(p.shape), p.numel(), prior, self.left.get(name, "")))
        return pd.DataFrame(rows, columns=["parameter", "shape", "size", "prior", "why left"])
