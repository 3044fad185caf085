"""The network of a fit without its dead units: the same numbers as with them, and when there is
none.
"""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting import live_network
from pyro_bmr.fitting.live_network import Cut
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.priors.tiers import TIERS
from tests.fitting.test_mean_field_step import alive, moved
from tests.fitting.test_written_weights import ROWS, TEMPERATURE
from tests.parameters import others_slow

# one of each way in which weights share scales
KINDS = [
    bmr.Gaussian(0.6, mean=0.2),
    bmr.Gaussian(0.6, mean="init"),
    *(bmr.Gaussian("layer", per=tier) for tier in TIERS),
    bmr.Gaussian("layer", per="unit", block=3),
    bmr.Horseshoe(0.4, 1.3, TIERS, 3.5),
    bmr.Horseshoe(0.4, None, ("layer", "input"), block=2),
    bmr.Laplace(0.4),
    bmr.SpikeAndSlab(temperature=0.6, per="input"),
    bmr.SpikeAndSlab(),
]
X, Y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
EXACT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Small networks have a live network too."""
    monkeypatch.setattr(live_network, "_WORTH", 0)


class Net(nn.Module):
    """Units that blocks of 2 and 3 divide, a norm whose gains are no sites, and a parameter that
    the data do not reach.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 2)
        self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3, bias=False)
        self.unread = nn.Parameter(torch.ones(6, 4))

    def forward(self, x):
        h = torch.tanh(self.conv(torch.stack([x, x.flip(1)], 2))[..., 0])
        return self.out(self.norm(self.two(torch.relu(self.one(h)))))


def network(prior, net=None):
    torch.manual_seed(1)
    return bmr.BayesianNetwork((net or Net)().double(), prior, bmr.Categorical(size=ROWS))


def masks_for(program):
    """Half of all entries. Unit 0 and 2 of `conv` are dead with their bias, unit 1 has a bias;
    nobody reads unit 3. Of `one` 4 units are left.
    """
    generator = torch.Generator().manual_seed(3)
    masks = {
        name: torch.rand(p.shape, generator=generator) < 0.5
        for name, p in program.net.named_parameters()
        if name in program.priors
    }
    masks["conv.weight"][:3] = False
    masks["conv.bias"][:] = torch.tensor([False, True, False, True, True, True])
    masks["conv.weight"][3:] |= torch.eye(4, dtype=torch.bool)[:3, :, None]
    masks["one.weight"][:, 3] = False
    masks["one.weight"][:, [1, 4]] |= True
    masks["one.weight"][4:] = masks["one.bias"][4:] = False
    masks["two.weight"][:, :4] |= True
    return masks


def stepping(program, masks, estimator="weight", y=Y):
    guide = moved(bmr.MeanField(program, X, y, estimator=estimator))
    step = MeanFieldStep(
        program, guide, ROWS, TEMPERATURE, seed=4, network=program, trained=program.trained
    )
    step.prune(masks)
    step.run((X, y), 0)
    return guide, step


@pytest.mark.parametrize(
    "prior",
    others_slow(KINDS, KINDS[0], bmr.Gaussian("layer", per="unit"), *KINDS[-4:-1]),
    ids=lambda prior: repr(prior)[:120],
)
def test_value_and_gradient_are_those_of_the_whole_network(prior):
    program = network(prior)
    masks = masks_for(program)
    estimator = "antithetic" if isinstance(prior, bmr.Gaussian) else "weight"
    guide, step = stepping(program, masks, estimator)
    for parameter in step.trained:
        parameter.grad = None
    draw = step.run((X, Y), 1)
    cuts = {name: cut.small for name, cut in step.live.live.cuts.items()}
    assert cuts["conv.weight"] == (3, 4, 2) and cuts["one.weight"] == (4, 3)
    assert cuts["two.weight"] == (6, 4) and cuts["unread"] == (0, 4)
    living, noise = alive(guide, masks), torch.randn_like(guide.loc)
    noise[living] = draw.sign * draw.noise
    draws = [
        bmr.fitting.elbo_terms(program, guide, X, Y, masks=masks, noise=n)
        for n in ((noise, -noise) if estimator == "antithetic" else (noise,))
    ]
    likelihood, kl = (sum(terms) / len(draws) for terms in zip(*draws, strict=True))
    loss = (TEMPERATURE * kl - likelihood) / ROWS
    of = [guide.loc, guide.log_scale, *step.trained]
    loc, log_scale, *trained = torch.autograd.grad(loss, of)
    given = [parameter.grad for parameter in step.trained]
    step.write_gradients(draw)
    assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)
    assert draw.kl == pytest.approx(kl.item(), rel=1e-10)
    torch.testing.assert_close(step.loc.grad, loc[living], **EXACT)
    torch.testing.assert_close(step.log_scale.grad, log_scale[living], **EXACT)
    assert trained, "the gains of the norm"
    for own, other in zip(given, trained, strict=True):
        torch.testing.assert_close(own, other, **EXACT)


def test_it_follows_a_second_pruning_and_the_mode():
    class Dropped(Net):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.9)

        def forward(self, x):
            return super().forward(self.drop(x))

    program = network(bmr.Gaussian(0.7), Dropped)
    masks = masks_for(program)
    guide, step = stepping(program, masks)
    program.eval()
    values = [step.run((X, Y), 1).expected_log_likelihood for _ in range(2)]
    assert values[0] == values[1]
    program.train()
    assert step.run((X, Y), 1).expected_log_likelihood != values[0]
    program.eval()
    masks["one.weight"][2:] = masks["one.bias"][2:] = False
    step.prune(masks)
    step.run((X, Y), 2)
    draw = step.run((X, Y), 3)
    assert step.live.live.cuts["two.weight"].small == (6, 2)
    noise = torch.randn_like(guide.loc)
    noise[alive(guide, masks)] = draw.sign * draw.noise
    likelihood, _ = bmr.fitting.elbo_terms(program, guide, X, Y, masks=masks, noise=noise)
    assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)


class Normed(Net):
    """A batch norm over the 12 units of `one`, and a table of constants."""

    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm1d(12)
        self.register_buffer("table", torch.linspace(0.5, 2, 12))

    def forward(self, x):
        h = torch.tanh(self.conv(torch.stack([x, x.flip(1)], 2))[..., 0])
        h = torch.relu(self.batch(self.one(h))) * self.table
        return self.out(self.norm(self.two(h)))


def test_batch_norms_and_constants_are_cut_with_their_units():
    """Units 6 to 8 of `one` are not read. Of those that are pruned and read, the batch norm makes
    its offset, which is 0 when the network is cut, and is moved then.
    """
    program = network(bmr.Gaussian(0.7), Normed)
    masks = masks_for(program)
    masks["two.weight"][:, 6:9] = False
    masks["two.weight"][0, [4, 5, 9, 10, 11]] = True
    program.train()
    guide, step = stepping(program, masks)
    step.run((X, Y), 1)
    sizes = {name: cut.small for name, cut in step.live.live.cuts.items()}
    assert sizes["one.weight"] == (9, 3) and sizes["two.weight"] == (6, 9)
    assert sizes["batch.weight"] == sizes["table"] == sizes["batch.running_mean"] == (9,)
    generator = torch.Generator().manual_seed(5)
    for tensor in (
        program.net.batch.weight,
        program.net.batch.bias,
        program.net.batch.running_mean,
    ):
        tensor.data.add_(torch.randn(12, generator=generator, dtype=torch.float64))
    other = program.copy().train()
    for parameter in step.trained:
        parameter.grad = None
    draw = step.run((X, Y), 1)
    noise = torch.randn_like(guide.loc)
    noise[alive(guide, masks)] = draw.sign * draw.noise
    likelihood, kl = bmr.fitting.elbo_terms(other, guide, X, Y, masks=masks, noise=noise)
    assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)
    of = [guide.loc, *other.trained]
    loc, *trained = torch.autograd.grad((TEMPERATURE * kl - likelihood) / ROWS, of)
    given = [parameter.grad for parameter in step.trained]
    step.write_gradients(draw)
    torch.testing.assert_close(step.loc.grad, loc[alive(guide, masks)], **EXACT)
    assert len(given) == 4, "gains and offsets"
    for own, want in zip(given, trained, strict=True):
        torch.testing.assert_close(own, want, **EXACT)
    read = [k for k in range(12) if not 6 <= k < 9]
    for name in ("running_mean", "running_var"):
        own, want = (getattr(p.net.batch, name)[read] for p in (program, other))
        torch.testing.assert_close(own, want, **EXACT)
    assert program.net.batch.num_batches_tracked == other.net.batch.num_batches_tracked
    program.eval()
    likelihood, _ = bmr.fitting.elbo_terms(program, guide, X, Y, masks=masks, noise=noise)
    got = step.run((X, Y), 1).expected_log_likelihood
    assert got == pytest.approx(likelihood.item(), rel=1e-10)


class Offset(Net):
    """A norm of groups of two units that may die."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(3, 6)

    def forward(self, x):
        h = torch.tanh(self.conv(torch.stack([x, x.flip(1)], 2))[..., 0])
        return self.out(torch.tanh(self.norm(torch.relu(h))))


def test_the_offset_of_a_norm_whose_inputs_are_dead_is_trained():
    program = network(bmr.Gaussian(0.7), Offset)
    masks = masks_for(program)
    masks["conv.bias"][1] = False
    masks["out.weight"][:] = True
    guide, step = stepping(program, masks)
    step.run((X, Y), 1)
    assert step.live is not None
    program.net.norm.bias.data.add_(torch.linspace(-1, 2, 6).double())
    draw = step.run((X, Y), 1)
    noise = torch.randn_like(guide.loc)
    noise[alive(guide, masks)] = draw.sign * draw.noise
    likelihood, _ = bmr.fitting.elbo_terms(program, guide, X, Y, masks=masks, noise=noise)
    assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)


class Counting(Net):
    """A buffer that a forward changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return super().forward(x)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.two = nn.Linear(12, 6)
        self.back = nn.Linear(6, 12)
        self.back.weight = self.one.weight

    def forward(self, x):
        return super().forward(x) + self.back(x.repeat(1, 2)[:, :6])[:, :3]


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x[:, :3]


@pytest.mark.parametrize("net", [Counting, Tied, Branching])
def test_a_network_that_cannot_be_cut_stays_whole(net):
    program = network(bmr.Gaussian(0.7), net)
    masks = masks_for(program)
    guide, step = stepping(program, masks)
    program.eval()
    draw = step.run((X, Y), 1)
    assert step.live is None and not step.live_networks.possible
    noise = torch.randn_like(guide.loc)
    noise[alive(guide, masks)] = draw.sign * draw.noise
    likelihood, _ = bmr.fitting.elbo_terms(program, guide, X, Y, masks=masks, noise=noise)
    assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)


def test_there_is_none_where_little_is_saved(monkeypatch):
    program = network(bmr.Gaussian(0.7))
    masks = masks_for(program)
    saved = live_network._saved(masks)
    monkeypatch.setattr(live_network, "_WORTH", saved * len(X) + 1)
    assert stepping(program, masks)[1].live_networks.graph is None
    monkeypatch.setattr(live_network, "_WORTH", saved * len(X))
    _, step = stepping(program, masks)
    step.run((X, Y), 1)
    assert step.live_networks.graph is not None


def test_weights_that_lie_in_dead_rows_and_columns_are_counted():
    linear, conv = torch.ones(5, 4, dtype=torch.bool), torch.ones(3, 2, 2, 2, dtype=torch.bool)
    linear[1:3], linear[:, 3] = False, False
    conv[0] = False
    conv[1, 1, 0, 0] = False
    masks = {"bias": torch.zeros(7, dtype=torch.bool), "linear": linear, "conv": conv}
    assert live_network._saved(masks) == 20 - 3 * 3 + 16 * 8


def test_places_of_entries_in_a_smaller_tensor():
    cut = Cut((4, 3), (torch.tensor([0, 2]), torch.tensor([1, 2])))
    assert cut.small == (2, 2)
    # entries (0, 1), (1, 1), (2, 0) and (2, 2) of the whole tensor
    assert cut.places(torch.tensor([1, 4, 6, 8])).tolist() == [0, 4, 4, 3]
    column, row = torch.arange(4.0)[:, None], torch.arange(3.0)[None]
    assert cut.taken(column).tolist() == [[0], [2]] and cut.taken(row).tolist() == [[1, 2]]
    assert cut.grown(torch.tensor([[5.0], [7.0]]), (4, 1)).flatten().tolist() == [5, 0, 7, 0]
    assert cut.summed_shape((4, 1)) == (2, 1) and cut.summed_shape((1, 3)) == (1, 2)


@pytest.mark.slow
def test_a_fit_goes_on_to_the_bit_after_a_stop(tmp_path):
    """Half of the units of the teacher are 0, so that reductions remove units."""
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 2))
    program = bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Categorical())
    every = bmr.Every(to=bmr.Gaussian(scale=0), per="unit")

    class Stopped(Exception):
        pass

    def run(folder=None, stop=None):
        count = [0]

        def schedule(optimizer, steps):
            def rate(step):
                count[0] += 1
                if count[0] == stop:
                    raise Stopped
                return 1.0

            return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

        return bmr.fit(
            program, (x, y), epochs=200, batch_size=100, reduce=every, progress=False,
            scheduler=schedule, checkpoint=folder,
        )  # fmt: skip

    whole = run()
    kept = whole.masks["0.weight"]
    assert 0 < int(kept.any(1).sum()) < 20, "some units are dead"
    with pytest.raises(Stopped):
        run(bmr.Checkpoints(tmp_path, every_steps=50), 330)
    again = run(bmr.Checkpoints(tmp_path, every_steps=50))
    for name, site in whole.posterior.sites.items():
        assert torch.equal(site.mean, again.posterior.sites[name].mean)
        assert torch.equal(site.var, again.posterior.sites[name].var)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_units_of_recurrent_layers_are_cut(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = kind(5, 6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(self.cell(x)[0][:, -1])

    torch.manual_seed(0)
    net, x, y = Recurrent().double(), torch.randn(16, 4, 5).double(), torch.randn(16, 3).double()
    program = bmr.BayesianNetwork(net, bmr.Gaussian(0.7), bmr.Normal(noise=0.5))
    masks = {name: torch.rand(p.shape) < 0.8 for name, p in net.named_parameters()}
    for name, mask in masks.items():
        if name.startswith("cell."):  # two units without any row in each layer
            mask.unflatten(0, (-1, 6))[:, [0, 3] if "_l0" in name else [2, 5]] = False
    guide = moved(bmr.MeanField(program, x, y))
    step = MeanFieldStep(program, guide, 16, TEMPERATURE, seed=4, network=program)
    step.prune(masks)
    step.run((x, y), 0)
    draw = step.run((x, y), 1)
    cuts = {name: cut.small for name, cut in step.live.live.cuts.items()}
    assert cuts["cell.weight_hh_l0"][1] == cuts["cell.weight_ih_l1"][1] == 4
    assert cuts["out.weight"] == (3, 4)
    noise, living = torch.randn_like(guide.loc), alive(guide, masks)
    noise[living] = draw.sign * draw.noise
    likelihood, kl = bmr.fitting.elbo_terms(program, guide, x, y, masks=masks, noise=noise)
    (loc,) = torch.autograd.grad((TEMPERATURE * kl - likelihood) / 16, [guide.loc])
    step.write_gradients(draw)
    assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)
    torch.testing.assert_close(step.loc.grad, loc[living], **EXACT)
