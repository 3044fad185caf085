"""The curvature of networks, held against dense matrices that autograd gives."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmr as bmr
from pyro_bmr.curvatures.multiplications import multiplication_of
from pyro_bmr.errors import DataError, ModelError
from tests.curvatures.networks import (
    Functional,
    Mixed,
    Twice,
    dense_block,
    kron,
    softmax_hessian,
)


def seeded(make):
    torch.manual_seed(3)
    return make().double()


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def gauss_newton(net, x, likelihood=None, **options):
    return bmr.curvature(
        net,
        x,
        likelihood or bmr.Categorical(),
        fisher="gauss-newton",
        progress=False,
        **options,
    )


def test_one_linear_layer_with_normal_noise_is_exact():
    net, x = seeded(lambda: nn.Linear(4, 3)), inputs(20, 4)
    found = gauss_newton(net, x, bmr.Normal(noise=0.4), batch_size=7)
    ones = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], 1)
    expected = torch.kron(torch.eye(3, dtype=x.dtype), ones.mT @ ones) / 0.4**2
    layer = found.layers["weight"]
    torch.testing.assert_close(torch.kron(layer.outputs, layer.inputs), expected)
    hessian = torch.eye(3, dtype=x.dtype).expand(20, 3, 3) / 0.4**2
    for name in ("weight", "bias"):
        torch.testing.assert_close(kron(found[name]), dense_block(net, x, name, hessian))
    assert found.rows == 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 6, 2), nn.Flatten(), nn.SiLU(), nn.Linear(6, 3)
        ),
        lambda: Functional(),
    ],
)
def test_each_layer_of_one_row_is_exact(make):
    net = seeded(make)
    x = inputs(1, 3 if isinstance(net, Functional) else 4)
    found = gauss_newton(net, x)
    hessian = softmax_hessian(net(x).detach())
    assert {"first", "second"} <= set(found.layers) or len(found.layers) == 2
    for name in (*found.layers, *(n for n in found if n.endswith("bias"))):
        torch.testing.assert_close(kron(found[name]), dense_block(net, x, name, hessian))


def test_fused_projections_of_one_position_are_exact():
    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x[None], x[None], x[None])[0][0])

    net, x = seeded(Attended), inputs(1, 4)
    found = gauss_newton(net, x)
    hessian = softmax_hessian(net(x).detach())
    assert len(found.layers) == 3 and not found.diagonals
    for name in found:
        torch.testing.assert_close(kron(found[name]), dense_block(net, x, name, hessian))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3), "dilation": (2, 1), "groups": 2},
        {"kernel_size": (3, 2), "padding": "same", "groups": 2, "bias": False},
        {"kernel_size": 2, "padding": 1, "padding_mode": "circular"},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_patches_times_kernel_are_the_convolution(options):
    conv, x = seeded(lambda: nn.Conv2d(4, 6, **options)), inputs(3, 4, 7, 6)
    seen = []

    def noted(function, args, named):
        seen.append(multiplication_of(function, args, named))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_bmr.curvatures.recorder.multiplication_of", noted)
        net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        bmr.curvature(net, x, bmr.Categorical(), progress=False)
    (use,) = [one for one in seen if one is not None]
    weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
    product = use.inputs(use.signal) @ weight.mT
    if conv.bias is not None:
        product = product + conv.bias.unflatten(0, (conv.groups, 1, -1))
    torch.testing.assert_close(product, use.gradients(conv(x)))


def test_factors_of_a_convolution_are_sums_over_positions():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten()))
    x, y = inputs(5, 4, 4, 5), torch.arange(5)
    found = bmr.curvature(net, (x, y), bmr.Categorical(), fisher="empirical", progress=False)
    middle = net[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[1:](middle), y, reduction="sum"), middle)
    g = g.flatten(2).mT.reshape(-1, 2, 3)
    patches = F.unfold(x, 3).mT.reshape(-1, 2, 18)
    expected_g, a, count = torch.zeros(6, 6).double(), torch.zeros(19, 19).double(), 0
    for k in range(2):
        active = (g[:, k] != 0).any(1)
        ones = torch.cat([patches[active, k], torch.ones(int(active.sum()), 1).double()], 1)
        expected_g[3 * k : 3 * k + 3, 3 * k : 3 * k + 3] = g[:, k].mT @ g[:, k]
        a, count = a + ones.mT @ ones, count + len(ones)
    layer = found.layers["0.weight"]
    assert 0 < count < 2 * len(g)
    torch.testing.assert_close(layer.outputs, expected_g)
    torch.testing.assert_close(layer.inputs, a / count)


def test_a_layer_that_is_used_twice_has_the_sums_of_both_uses():
    net, x = seeded(Twice), inputs(6, 3)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    found = bmr.curvature(net, (x, y), bmr.Categorical(), fisher="empirical", progress=False)
    first = net.layer(x)
    second = net.layer(torch.tanh(first))
    loss = F.cross_entropy(net.head(torch.tanh(second)), y, reduction="sum")
    gradients = torch.autograd.grad(loss, (first, second))
    ones = torch.ones(6, 1).double()
    signals = [torch.cat([s, ones], 1) for s in (x, torch.tanh(first).detach())]
    layer = found.layers["layer.weight"]
    assert layer.uses == 2
    torch.testing.assert_close(layer.inputs, sum(s.mT @ s for s in signals) / 12)
    torch.testing.assert_close(layer.outputs, sum(g.mT @ g for g in gradients))


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_diagonals_are_exact(structure):
    net = seeded(Mixed).eval()
    tokens = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(1))
    net.batch_norm.running_mean.normal_(), net.batch_norm.running_var.uniform_(0.5, 2)
    found = gauss_newton(net, tokens, structure=structure, batch_size=2)
    hessian = softmax_hessian(net(tokens).detach())
    assert set(found) == set(dict(net.named_parameters()))
    expected = {"token", "norm.weight", "norm.bias", "batch_norm.weight", "batch_norm.bias"}
    checked = found.diagonals if structure == "diagonal" else expected
    assert set(found.diagonals) == (set(found) if structure == "diagonal" else expected)
    for name in checked:
        dense = dense_block(net, tokens, name, hessian).diagonal()
        torch.testing.assert_close(found[name].flatten(), dense, msg=name)


def test_an_embedding_has_the_counts_of_its_rows():
    net = seeded(lambda: nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    tokens = torch.tensor([1, 4, 1, 0, 1])
    found = gauss_newton(net, tokens)
    counts, gradients = found["0.weight"]
    expected = torch.tensor([1, 3, 0, 0, 1]).double().diag() / 5
    torch.testing.assert_close(counts, expected)
    hessian = softmax_hessian(net(tokens).detach())
    dense = dense_block(net, tokens, "0.weight", hessian)
    # of the gradients of all rows the mean is that of the rows of one word
    blocks = dense.unflatten(0, (5, 4)).unflatten(2, (5, 4))
    torch.testing.assert_close(gradients, sum(blocks[k, :, k] for k in range(5)))


def test_a_network_that_vmap_refuses_has_its_diagonal_row_by_row():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    net, x = seeded(Last), inputs(4, 5, 3)
    found = gauss_newton(net, x, structure="diagonal")
    hessian = softmax_hessian(net(x).detach())
    assert not found.layers
    for name in ("lstm.weight_ih_l0", "lstm.bias_hh_l0"):
        dense = dense_block(net, x, name, hessian).diagonal()
        torch.testing.assert_close(found[name].flatten(), dense)


def test_drawn_targets_have_the_gauss_newton_matrix_as_their_mean():
    net, x = seeded(lambda: nn.Linear(3, 3)), inputs(4, 3)
    exact = gauss_newton(net, x).layers["weight"].outputs
    many = x.repeat(5000, 1)
    found = bmr.curvature(
        net, many, bmr.Categorical(), draws=2, size=4, batch_size=9999, progress=False
    )
    torch.testing.assert_close(found.layers["weight"].outputs, exact, rtol=0.03, atol=0.02)
    once, again, other = (
        bmr.curvature(net, x, bmr.Categorical(), seed=seed, progress=False).layers["weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(once.outputs, again.outputs)
    assert not torch.equal(once.outputs, other.outputs)


@pytest.mark.parametrize(
    ("likelihood", "values", "draw"),
    [
        (bmr.Normal(noise=0.3), None, lambda f: 1 / 0.3**2 + 0 * f),
        (bmr.Normal(), {"noise": 0.5}, lambda f: 1 / 0.5**2 + 0 * f),
        (bmr.Poisson(), None, torch.exp),
        (bmr.Bernoulli(), None, lambda f: torch.sigmoid(f) * torch.sigmoid(-f)),
    ],
)
@pytest.mark.parametrize("fisher", ["true", "gauss-newton"])
def test_likelihoods_have_their_information(likelihood, values, draw, fisher):
    net, x = seeded(lambda: nn.Linear(3, 1)), inputs(6, 3)
    many = x.repeat(3000, 1) if fisher == "true" else x
    found = bmr.curvature(
        net, many, likelihood, fisher=fisher, values=values, size=6, progress=False
    )
    expected = draw(net(x).detach()).sum()
    tolerance = 0.05 if fisher == "true" else 1e-10
    torch.testing.assert_close(
        found.layers["weight"].outputs[0, 0], expected, rtol=tolerance, atol=0
    )


def test_labels_that_are_ignored_have_no_curvature():
    net = seeded(lambda: nn.Linear(3, 4))
    x, y = inputs(5, 6, 3), torch.zeros(5, 6, dtype=torch.long)
    y[:, 4:] = -100
    likelihood = bmr.Categorical(ignore_index=-100, class_axis=-1)
    found = bmr.curvature(net, (x, y), likelihood, progress=False)
    last = bmr.Categorical(class_axis=-1)
    part = bmr.curvature(net, x[:, :4], last, progress=False)
    ones = torch.cat([x[:, :4], torch.ones(5, 4, 1).double()], 2).flatten(0, 1)
    for one in (found, part):
        torch.testing.assert_close(one.layers["weight"].inputs, ones.mT @ ones / 20)


def test_loaders_and_dicts_give_the_same_as_tensors():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, values):
            return self.layer(values)

    net = seeded(Named)
    x, y = inputs(9, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    rows = [{"values": a, "labels": b} for a, b in zip(x, y, strict=True)]
    options = {"fisher": "empirical", "progress": False}
    found = [
        bmr.curvature(net, data, bmr.Categorical(), **options)
        for data in ((x, y), DataLoader(TensorDataset(x, y), 4), DataLoader(rows, 2))
    ]
    for other in found[1:]:
        assert other.rows == 9
        for one, two in zip(found[0]["layer.weight"], other["layer.weight"], strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_a_forward_of_one_dict_has_the_curvature_of_its_tensor(structure):
    class OfDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch):
            return self.layer(batch["values"])

    net = seeded(OfDict)
    x, y = inputs(9, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    options = {"fisher": "empirical", "structure": structure, "progress": False}
    found = bmr.curvature(net, ({"values": x}, y), bmr.Categorical(), **options)
    plain = bmr.curvature(net.layer, (x, y), bmr.Categorical(), **options)
    for one, two in zip(found["layer.weight"], plain["weight"], strict=True):
        torch.testing.assert_close(one, two)


def test_products_that_no_layer_owns_are_seen():
    net, x = seeded(Functional), inputs(5, 3)
    found = gauss_newton(net, x)
    assert set(found.layers) == {"first", "second"} and found.layers["second"].turned
    assert set(found.diagonals) == {"third", "gain"}
    assert found.why["gain"] == "mul" and found.why["third"] == "mul"
    hessian = softmax_hessian(net(x).detach())
    for name in found.diagonals:
        dense = dense_block(net, x, name, hessian).diagonal()
        torch.testing.assert_close(found[name].flatten(), dense)
    rows = found.table().set_index("parameter")
    assert rows.loc["third", "structure"] == "diagonal" and rows.loc["third", "why"] == "mul"


def test_half_precision_has_factors_of_single_precision():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(40, 8).bfloat16()
    half = bmr.curvature(
        net.bfloat16(), x, bmr.Categorical(), fisher="gauss-newton", progress=False
    )
    full = gauss_newton(net.float(), x.float())
    for name in full.layers:
        one, two = half.layers[name], full.layers[name]
        assert one.inputs.dtype == one.outputs.dtype == torch.float32
        torch.testing.assert_close(one.inputs, two.inputs, rtol=0.02, atol=0.02)
        assert float((one.outputs - two.outputs).norm() / two.outputs.norm()) < 0.02


def test_frozen_parts_are_left_out_and_the_network_stays_as_it_was():
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)))
    net[0].requires_grad_(False)
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    found = gauss_newton(net, inputs(5, 3))
    assert set(found) == {"2.weight", "2.bias"}
    assert net.training and net[1].training and all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    named = gauss_newton(net, inputs(5, 3), only=["0.*"])
    assert set(named) == {"0.weight", "0.bias"}
    frozen = gauss_newton(net.requires_grad_(False), inputs(5, 3))
    assert set(frozen) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_posterior_of_it_is_that_of_the_linear_model():
    net, x = seeded(lambda: nn.Linear(4, 1, bias=False)), inputs(30, 4)
    found = gauss_newton(net, x, bmr.Normal(noise=0.5))
    weights = {"weight": net.weight.detach()}
    posterior = bmr.Posterior.from_curvature(weights, found, bmr.Gaussian(1e6), rows=found.rows)
    exact = 0.25 * torch.linalg.inv(x.mT @ x)
    torch.testing.assert_close(posterior["weight"].var[0], exact.diagonal(), rtol=1e-4, atol=0)
    assert posterior.rows == 30


def test_rows_are_scaled_to_the_size_of_the_data():
    net, x = seeded(lambda: nn.Linear(4, 2)), inputs(10, 4)
    part, whole = gauss_newton(net, x), gauss_newton(net, x, size=1000)
    torch.testing.assert_close(whole["weight"][0], 100 * part["weight"][0])
    torch.testing.assert_close(whole["weight"][1], part["weight"][1])
    assert whole.rows == 1000


def test_what_is_refused():
    net, x = seeded(lambda: nn.Linear(4, 2)), inputs(10, 4)
    with pytest.raises(ModelError, match=r"infers 'noise'.*values=.*noise=0\.3"):
        bmr.curvature(net, x, bmr.Normal(), progress=False)
    with pytest.raises(ModelError, match="'head.\\*' matches no parameter"):
        gauss_newton(net, x, only=["head.*"])
    with pytest.raises(DataError, match="pair|targets"):
        bmr.curvature(net, x, bmr.Categorical(), fisher="empirical", progress=False)
    with pytest.raises(ModelError, match="fisher"):
        bmr.curvature(net, x, bmr.Categorical(), fisher="exact", progress=False)
    with pytest.raises(ModelError, match="not finite"):
        bmr.curvature(net, x / 0, bmr.Normal(noise=1.0), progress=False)
    wide = nn.Linear(4, 1, bias=False)
    wide.weight = nn.Parameter(torch.zeros(1).expand(10**7, 1))
    with pytest.raises(ModelError, match="GB.*structure='diagonal'"):
        bmr.curvature(wide, x, bmr.Categorical(), progress=False)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.cells(packed)[1][0][-1])


def test_sequences_of_different_lengths_have_their_diagonal():
    net, x, y = Padded(), torch.randn(12, 7, 4), torch.randint(2, (12,))
    lengths = torch.randint(2, 8, (12,))
    options = {"fisher": "empirical", "progress": False}
    found = bmr.curvature(net, ((x, lengths), y), bmr.Categorical(), "diagonal", **options)
    want = torch.zeros(20, 4)
    for k in range(12):
        net.zero_grad()
        one = net(x[k : k + 1], lengths[k : k + 1])
        nn.functional.cross_entropy(one, y[k : k + 1]).backward()
        want += net.cells.weight_ih_l0.grad.square()
    torch.testing.assert_close(found.diagonals["cells.weight_ih_l0"], want, rtol=1e-4, atol=1e-7)
    factors = bmr.curvature(net, ((x, lengths), y), bmr.Categorical(), **options)
    assert repr(factors) == "Curvature(3 layers, 0 diagonals, 12 rows)"
    inputs = factors.layers["cells.weight_ih_l0"].inputs
    # of the places up to the length of each row
    read = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
    torch.testing.assert_close(inputs[:4, :4], read.T @ read / len(read))


def test_labels_outside_the_classes():
    net, x = nn.Linear(3, 2), torch.randn(8, 3)
    y = torch.tensor([0, 1, 0, -100, 1, 1, 0, 0])
    for fisher in ("true", "empirical"):
        with pytest.raises(bmr.errors.DataError, match="got -100 in row 3.*ignore_index"):
            bmr.curvature(net, (x, y), bmr.Categorical(), fisher=fisher, progress=False)


class Chosen(nn.Module):
    """Uses its gain for some of the rows alone, in a way that vmap cannot take."""

    def __init__(self):
        super().__init__()
        self.gain, self.last = nn.Parameter(torch.ones(3)), nn.Linear(3, 1)
        self.last.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.stack([row * self.gain if row.sum() > 0 else row for row in x]))


def test_rows_that_do_not_use_a_parameter_count_as_nothing():
    net, x = Chosen(), torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    found = bmr.curvature(net, x, bmr.Normal(noise=1.0), fisher="gauss-newton", progress=False)
    want = (x[0] * net.last.weight[0]).square()
    torch.testing.assert_close(found["gain"], want)


class Own:
    """A likelihood of one's own."""

    inferred = ()

    def __init__(self, observe):
        self.observe = observe


def test_a_likelihood_of_ones_own_is_left_alone():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 2)

    def two(output, y=None):
        with pyro.plate("rows", len(output)):
            for k in range(2):
                obs = None if y is None else y[:, k]
                pyro.sample(f"y{k}", dist.Normal(output[:, k], 1.0), obs=obs)

    def transformed(output, y=None):
        with pyro.plate("rows", len(output)):
            yes = None if y is None else (y[:, 0] > 0).float()
            pyro.sample("yes", dist.Bernoulli(logits=output[:, 0]), obs=yes)

    def counts(output, y=None):
        with pyro.plate("rows", len(output)):
            size = torch.arange(len(output)) + 5.0
            number = None if y is None else y[:, 0].abs().round()
            pyro.sample("n", dist.Binomial(size, logits=output[:, 0]), obs=number)

    for observe in (two, transformed, counts):
        found = bmr.curvature(
            nn.Linear(3, 2), (x, y), Own(observe), fisher="empirical", progress=False
        )
        assert found["weight"][0].isfinite().all()
