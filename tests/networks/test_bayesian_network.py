"""`BayesianNetwork` lifts by parameter, says what it left and why, and runs the network that the
user gave; likelihoods refuse outputs that do not fit.
"""

import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import pyro_bmr as bmr

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
G, H = bmr.Gaussian(0.7), bmr.Horseshoe()


def plain():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def normed():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3)
    )


def lift(net, prior=G, likelihood=None):
    return bmr.BayesianNetwork(net, prior, likelihood or bmr.Categorical())


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict(
            {"conv": nn.Conv1d(2, 3, 3), "heads": nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 1)])}
        )
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        z = self.body["conv"](x).flatten(1)
        return torch.cat([head(z) for head in self.body["heads"]], 1) + self.shift


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        return self.linear(x) + self.steps


def test_sites_are_named_by_module_path():
    net = Nested()
    names = [name for name, _ in net.named_parameters()]
    program = lift(net)
    trace = poutine.trace(program).get_trace(torch.randn(5, 2, 4), torch.zeros(5, dtype=torch.long))
    assert len(names) == 7 and "body.heads.1.weight" in names and "shift" in names
    assert (
        list(program.priors) == names == [node for node in trace.stochastic_nodes if node != "data"]
        and program.left == {}
    )
    assert trace.observation_nodes == ["y"]
    assert {name: trace.nodes[name]["value"].shape for name in names} == {
        name: p.shape for name, p in net.named_parameters()
    }


def test_norm_layers_are_left_with_a_reason():
    program = lift(normed())
    assert list(program.priors) == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert set(program.left) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert (
        "BatchNorm1d" in program.left["1.weight"]
        and "LayerNorm" in program.left["3.bias"]
        and "exact name" in program.left["1.bias"]
    )


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),
        nn.GroupNorm(3, 3),
        nn.LayerNorm(3),
        nn.RMSNorm(3),
        nn.InstanceNorm2d(3, affine=True),
    ],
    ids=repr,
)
def test_every_norm_layer(norm):
    program = lift(nn.Sequential(nn.Linear(3, 3), norm))
    assert (
        list(program.priors) == ["0.weight", "0.bias"]
        and set(program.left) == {f"1.{name}" for name, _ in norm.named_parameters()} != set()
    )


def test_frozen_parameters_are_left():
    net = plain()
    net[0].weight.requires_grad_(False)
    program = lift(net)
    assert (
        list(program.priors) == ["0.bias", "2.weight", "2.bias"]
        and "frozen" in program.left["0.weight"]
    )


def test_integer_parameters_are_left():
    program = lift(Counted())
    assert (
        list(program.priors) == ["linear.weight", "linear.bias"]
        and "floating-point" in program.left["steps"]
        and "int64" in program.left["steps"]
    )


class Spectral(nn.Module):
    """A Fourier layer: complex weights between real ones."""

    def __init__(self):
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(3, dtype=torch.cfloat)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))


def test_complex_parameters_are_point_estimates_and_keep_their_imaginary_part(tmp_path):
    net = Spectral()
    program = lift(net)
    assert (
        list(program.priors) == ["out.weight", "out.bias"]
        and "complex64" in program.table().set_index("parameter").loc["filter", "why left"]
    )
    fit = bmr.fit(program, (X, Y), epochs=3, batch_size=8, progress=False)
    exported = bmr.export(
        fit.program, bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0)).posterior
    )
    moved = exported.filter - net.filter
    assert (
        exported.filter.dtype == torch.cfloat and moved.real.abs().min() > 0 and moved.imag[1] != 0
    ), "the other two frequencies have no imaginary part"
    bmr.save(exported, tmp_path)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["filter"], exported.filter.detach()
    )
    with pytest.raises(bmr.errors.DataError, match="Categorical.*real.*complex64"):
        lift(nn.Sequential(nn.Linear(4, 3), Complex()))(X, Y)


class Complex(nn.Module):
    def forward(self, x):
        return torch.complex(x, x)


def test_a_parameter_without_entries_is_left():
    net = plain()
    net.extra = nn.Parameter(torch.zeros(0, 3))
    assert "no entries" in lift(net).left["extra"]
    assert (
        "extra"
        not in bmr.fit(lift(net), (X, Y), epochs=1, batch_size=8, progress=False).posterior.sites
    )


def sparse():
    net = nn.Linear(4, 3)
    net.weight = nn.Parameter(net.weight.detach().to_sparse())
    return net


def mixed():
    net = plain()
    net[2].double()
    return net


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.trace(plain(), X), "a scripted module.*give the torch.nn.Module"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 3))), r"'0' .*a scripted module"),
        (
            lambda: torch.export.export(plain(), (X,)).module(),
            "an exported program.*give the torch.nn.Module",
        ),
        (
            lambda: torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}),
            r"is lifted: '0' .* is a quantised layer.*as it was before",
        ),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            r"'0\.weight' has no shape yet; run the network once",
        ),
        (
            sparse,
            "'weight': expected a dense parameter.*got one that is of layout torch.sparse_coo",
        ),
        (mixed, r"one dtype, got torch.float32, torch.float64.*net\.float\(\)"),
    ],
    ids=["traced", "scripted", "exported", "quantised", "lazy", "sparse", "mixed"],
)
def test_a_network_without_weights_of_its_own_is_refused_by_name(make, message):
    with pytest.raises(bmr.errors.ModelError, match=message):
        lift(make())


def test_a_network_without_values_is_taken_and_does_not_run():
    program = lift(nn.Linear(4, 3, device="meta"))
    assert list(program.priors) == ["weight", "bias"]
    with pytest.raises(bmr.errors.ModelError, match="'weight': expected a dense .* 'meta'"):
        program(X, Y)
    with pytest.raises(bmr.errors.FitError, match="on the device 'meta'"):
        bmr.fit(program, (X, Y), epochs=1, progress=False)


def test_a_graph_module_and_a_frozen_half_are_taken():
    net = torch.fx.symbolic_trace(plain())
    assert list(bmr.fit(lift(net), (X, Y), epochs=1, batch_size=8, progress=False).posterior) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    net = mixed()
    net[2].requires_grad_(False)
    assert list(lift(net).priors) == ["0.weight", "0.bias"]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.box, self.label = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"box": self.box(h), "labels": [self.label(h), len(x)], "indices": torch.arange(3)}


class Labels:
    """A likelihood of an output that is no single tensor."""

    def observe(self, output, y):
        assert output["indices"].dtype == torch.int64 and output["labels"][1] == len(output["box"])
        with pyro.plate("data", len(output["box"])):
            return pyro.sample(
                "y", pyro.distributions.Categorical(logits=output["labels"][0]), obs=y
            )


def test_a_likelihood_may_take_an_output_of_several_tensors():
    fit = bmr.fit(
        lift(Heads(), likelihood=Labels()), (X, Y), epochs=2, batch_size=8, progress=False
    )
    assert bmr.predict(fit.program, fit.posterior, X, draws=2).probs.shape == (24, 3)
    with pytest.raises(bmr.errors.DataError, match="Categorical.*one tensor.*dict"):
        lift(Heads())(X, Y)


def test_the_first_pattern_that_matches_counts():
    program = lift(plain(), {"2.weight": H, "*.weight": G, "2.*": None})
    assert program.priors == {"0.weight": G, "2.weight": H}
    assert "no pattern" in program.left["0.bias"] and "'2.*'" in program.left["2.bias"]


def test_none_leaves_a_parameter():
    program = lift(plain(), {"0.*": None, "*": G})
    assert program.priors == {"2.weight": G, "2.bias": G} and set(program.left) == {
        "0.weight",
        "0.bias",
    }


def test_the_exact_name_of_a_gain_lifts_it():
    program = lift(normed(), {"1.weight": H, "1.*": G, "*": G})
    assert (
        program.priors["1.weight"] == H and "1.bias" in program.left and "3.weight" in program.left
    )


def test_table():
    table = lift(normed(), {"1.weight": H, "4.*": None, "*": G}).table().set_index("parameter")
    assert list(table.index) == [name for name, _ in normed().named_parameters()] and list(
        table.columns
    ) == ["shape", "size", "prior", "why left"]
    assert (table.loc["0.weight", "shape"], table.loc["0.weight", "size"]) == ((6, 4), 24)
    assert (
        table.loc["0.weight", "prior"] == repr(G)
        and table.loc["1.weight", "prior"] == repr(H)
        and table["prior"].notna().sum() == 3
    )
    assert (table.loc[table["prior"].notna(), "why left"] == "").all() and (
        table.loc[table["prior"].isna(), "why left"] != ""
    ).all()


def test_an_unknown_pattern_is_named_with_the_parameters():
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"'fc\.\*' matches no parameter.*0\.weight, 0\.bias, 2\.weight, 2\.bias",
    ):
        lift(plain(), {"fc.*": G, "*": G})


def test_what_is_no_prior():
    with pytest.raises(
        bmr.errors.ModelError, match=r"'2\.\*'.*expected a prior such as Gaussian\(\).*0\.5"
    ):
        lift(plain(), {"2.*": 0.5, "*": G})
    with pytest.raises(bmr.errors.ModelError, match="got None"):
        lift(plain(), None)


def test_nothing_lifted():
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"no parameter of Sequential is lifted.*0\.weight.*name one in `prior`",
    ):
        lift(plain(), {"*": None})
    with pytest.raises(bmr.errors.ModelError, match=r"ReLU is lifted.*none"):
        lift(nn.ReLU())
    with pytest.raises(bmr.errors.ModelError, match="norm layer"):
        lift(nn.BatchNorm1d(3))


def test_a_tied_parameter_is_one_site():
    net = Tied()
    program = lift(net)
    assert list(program.priors) == ["encode.weight", "encode.bias", "decode.bias"]
    values = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(X, Y % 4)
    w, b, c = values.values()
    want = (torch.tanh(X @ w.T + b) @ w.T + c).log_softmax(1)
    assert torch.allclose(trace.nodes["y"]["fn"].logits, want, atol=1e-5)


def test_a_tied_parameter_is_fitted_and_exported_as_one():
    net = Tied()
    fit = bmr.fit(lift(net), (X, Y), epochs=3, batch_size=8, progress=False)
    exported = bmr.export(fit.program, fit.posterior)
    assert exported.decode.weight is exported.encode.weight and torch.equal(
        exported.encode.weight, fit.posterior["encode.weight"].mean
    )
    assert not torch.equal(exported.encode.weight, net.encode.weight)


def condition(program, values, x, y=None):
    return poutine.trace(poutine.condition(program, data=values)).get_trace(x, y)


def test_the_program_is_the_network_at_the_drawn_weights():
    net = plain()
    values = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
    trace = condition(lift(net), values, X, Y)
    want = functional_call(net, values, (X,)).log_softmax(1)
    assert torch.allclose(trace.nodes["y"]["fn"].logits, want, atol=1e-6)
    assert torch.allclose(trace.nodes["y"]["fn"].log_prob(Y), want[torch.arange(24), Y], atol=1e-6)
    assert not torch.allclose(want, net(X).log_softmax(1), atol=0.1)


def test_a_standardised_site_is_scaled_before_the_network():
    net = plain()
    program = lift(
        net, {"0.weight": bmr.Horseshoe(tau0=0.5), "2.weight": bmr.Gaussian("layer"), "*": G}
    )
    bare = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
    tau, lam, precision = torch.tensor(0.8), torch.rand(6, 4) + 0.2, torch.tensor(1.7)
    trace = condition(
        program,
        {**bare, "0.weight_tau": tau, "0.weight_lambda": lam, "2.weight_precision": precision},
        X,
        Y,
    )
    psi = tau * lam
    gamma = (4 * psi**2 / (4 + psi**2)).sqrt() / math.sqrt(4)
    weights = {
        **bare,
        "0.weight": gamma * bare["0.weight"],
        "2.weight": bare["2.weight"] / math.sqrt(6 * 1.7),
    }
    want = functional_call(net, weights, (X,)).log_softmax(1)
    assert torch.allclose(trace.nodes["y"]["fn"].logits, want, atol=1e-5)


def test_left_parameters_keep_their_values():
    net = plain()
    values = {"2.weight": torch.randn(3, 6)}
    trace = condition(lift(net, {"2.weight": G}), values, X, Y)
    want = (torch.tanh(net[0](X)) @ values["2.weight"].T + net[2].bias).log_softmax(1)
    assert torch.allclose(trace.nodes["y"]["fn"].logits, want, atol=1e-6)


def test_the_real_likelihood_and_its_noise():
    net = nn.Linear(4, 1)
    values = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
    target = torch.randn(24)
    trace = condition(
        lift(net, likelihood=bmr.Normal(noise_scale=0.5)),
        {**values, "noise": torch.tensor(0.3)},
        X,
        target,
    )
    loc = X @ values["weight"][0] + values["bias"]
    want = -0.5 * ((target - loc) / 0.3) ** 2 - math.log(0.3) - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(trace.nodes["y"]["fn"].log_prob(target), want, atol=1e-4)
    assert float(trace.nodes["noise"]["fn"].log_prob(torch.tensor(0.3))) == pytest.approx(
        math.log(2 / (0.5 * math.sqrt(2 * math.pi))) - 0.5 * 0.6**2, abs=1e-5
    )


def test_an_output_without_a_column_is_taken_too():
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    trace = poutine.trace(lift(net, likelihood=bmr.Normal())).get_trace(X, torch.randn(24))
    assert trace.nodes["y"]["fn"].loc.shape == (24,)


@pytest.mark.parametrize(
    "likelihood", [bmr.Categorical(size=240), bmr.Normal(size=240)], ids=["classes", "reals"]
)
def test_the_size_scales_the_likelihood(likelihood):
    y = Y if isinstance(likelihood, bmr.Categorical) else torch.randn(24)
    trace = poutine.trace(
        lift(
            nn.Linear(4, 3 if isinstance(likelihood, bmr.Categorical) else 1), likelihood=likelihood
        )
    ).get_trace(X, y)
    trace.compute_log_prob()
    site = trace.nodes["y"]
    assert float(site["log_prob_sum"]) == pytest.approx(
        10 * float(site["fn"].log_prob(y).sum()), rel=1e-5
    )


@pytest.mark.parametrize("shape", [(3,), (2, 5)])
def test_several_numbers_a_row(shape):
    net = nn.Sequential(nn.Linear(4, math.prod(shape)), nn.Unflatten(1, shape))
    y = torch.randn(24, *shape)
    values = {
        **{name: torch.randn(p.shape) for name, p in net.named_parameters()},
        "noise": torch.tensor(0.6),
    }
    trace = condition(lift(net, likelihood=bmr.Normal(size=240)), values, X, y)
    trace.compute_log_prob()
    residuals = (
        y - functional_call(net, {k: v for k, v in values.items() if k != "noise"}, (X,))
    ).double() / 0.6
    want = -0.5 * residuals.square().sum() - y.numel() * math.log(0.6 * math.sqrt(2 * math.pi))
    assert float(trace.nodes["y"]["log_prob_sum"]) == pytest.approx(
        10 * float(want), rel=1e-4
    ) and trace.nodes["y"]["log_prob"].shape == (24,)
    fit = bmr.fit(
        lift(net, likelihood=bmr.Normal()), (X, y), epochs=2, batch_size=8, progress=False
    )
    prediction = bmr.predict(fit.program, fit.posterior, X[:5], draws=3)
    assert prediction.mean.shape == (5, *shape) and prediction.log_prob(y[:5]).shape == (5,)
    assert lift(net, likelihood=bmr.Normal())(X).shape == y.shape
    with pytest.raises(
        bmr.errors.DataError,
        match=r"Normal.*the shape of y, got shape \(8, .* and y of shape \(8, 3, 3\)",
    ):
        bmr.fit(
            lift(net, likelihood=bmr.Normal()), (X, torch.zeros(24, 3, 3)), epochs=1, progress=False
        )


def test_without_y_it_draws():
    drawn = lift(plain())(X)
    assert drawn.shape == (24,) and drawn.dtype == torch.int64 and set(drawn.tolist()) <= {0, 1, 2}


def test_batch_norm_is_trained_in_a_copy():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    before, twin = state(net), copy.deepcopy(net)
    program = lift(net)
    assert program.net is net
    fit = bmr.fit(program, (X, Y), epochs=3, batch_size=8, progress=False)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert not torch.equal(getattr(fit.program.net[1], name), getattr(net[1], name))
    assert fit.program.net[1].num_batches_tracked == 9 and "1.weight" not in list(fit.posterior)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and net.training == twin.training


def test_a_frozen_parameter_is_not_trained():
    net = plain()
    net[0].weight.requires_grad_(False)
    fit = bmr.fit(
        lift(net, {"*.bias": None, "*": G}), (X, Y), epochs=2, batch_size=8, progress=False
    )
    assert torch.equal(fit.program.net[0].weight, net[0].weight) and list(fit.posterior) == [
        "2.weight"
    ]
    assert not torch.equal(fit.program.net[0].bias, net[0].bias), (
        "what no prior has is a point estimate, which is trained"
    )


@pytest.mark.parametrize(
    ("net", "likelihood", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
            bmr.Categorical(),
            r"Categorical.*\(rows, classes\).*\(24,\)",
        ),
        (
            nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))),
            bmr.Categorical(),
            r"Categorical.*\(rows, classes\).*\(24, 2, 3\)",
        ),
        (nn.Linear(4, 2), bmr.Normal(), r"Normal.*\(rows,\) or \(rows, 1\).*\(24, 2\)"),
        (
            nn.Sequential(nn.Linear(4, 1), nn.Unflatten(1, (1, 1))),
            bmr.Normal(),
            r"Normal.*\(24, 1, 1\)",
        ),
    ],
)
def test_an_output_of_the_wrong_shape(net, likelihood, message):
    y = Y if isinstance(likelihood, bmr.Categorical) else torch.randn(24)
    with pytest.raises(bmr.errors.DataError, match=message):
        lift(net, likelihood=likelihood)(X, y)
    with pytest.raises(bmr.errors.DataError, match=likelihood.__class__.__name__):
        bmr.fit(lift(net, likelihood=likelihood), (X, y), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("net", "likelihood", "y"),
    [(nn.Linear(4, 1), bmr.Normal(), X[:, :1]), (nn.Linear(4, 3), bmr.Categorical(), Y[:, None])],
)
def test_targets_in_a_column_are_not_broadcast_to_all_pairs_of_rows(net, likelihood, y):
    with pytest.raises(bmr.errors.DataError, match=r"\(8, 1\)|\(24, 1\)"):
        bmr.fit(lift(net, likelihood=likelihood), (X, y), epochs=1, batch_size=8, progress=False)


def test_the_param_store_stays_empty():
    bmr.fit(lift(plain()), (X, Y), epochs=1, batch_size=8, progress=False)
    assert len(pyro.get_param_store()) == 0


def test_a_prior_class_is_no_prior():
    with pytest.raises(bmr.errors.ModelError, match="expected a prior such as Gaussian"):
        bmr.BayesianNetwork(nn.Linear(2, 2), bmr.Gaussian, bmr.Categorical())
