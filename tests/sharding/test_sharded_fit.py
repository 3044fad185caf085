"""A sharded fit in three processes, and in four: gradients, noise, masks and reductions are those
of one process.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from scipy.stats import ks_2samp
from torch.nn.functional import cross_entropy

import pyro_bmr as bmr
from tests.process_group import run_group
from tests.sharding import group

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="needs torch 2.9"
)
SCRIPT = Path(group.__file__)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) for n in (3, 4)])
def together(tmp_path_factory, request):
    """What each of the processes has found, and their folder."""
    processes = request.param
    folder = tmp_path_factory.mktemp("together")
    statuses, words = run_group(SCRIPT, processes, folder, timeout=560)
    assert statuses == [0] * processes, words
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    return found, folder


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_all_processes_and_two_runs_have_the_same_to_the_bit(together):
    found = together[0]
    for each in found:
        assert same(each["first"], found[0]["first"]) and same(each["first"], each["second"])
        assert same(each["pruned"], found[0]["pruned"])
        assert each["history"] == [found[0]["history"][0]] * 2 and each["untouched"]
        assert each["scales"] == found[0]["scales"]


@pytest.mark.slow
@pytest.mark.parametrize("together", [4], indirect=True)
def test_processes_with_copies_have_the_same(together):
    found = together[0]
    for each in found:
        assert same(each["copies"], found[0]["copies"])
        assert each["copies scales"] == found[0]["copies scales"]
    assert not same(found[0]["first"], found[0]["copies"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has not converged")
@pytest.mark.parametrize("together", [4], indirect=True)
def test_over_seeds_it_has_the_law_of_fit(together):
    """By the test of Kolmogorov and Smirnov, of the bound and of six moments each."""
    found, alone = together[0][0]["law"], group.law(bmr.fit, range(100, 130))
    for kind, rows in found.items():
        for ours, others in zip(
            zip(*rows, strict=True), zip(*alone[kind], strict=True), strict=True
        ):
            assert len(set(ours)) == 30 and ks_2samp(ours, others).pvalue > 1e-3


def test_layers_that_are_gathered_ahead_have_the_weights_of_their_step(together):
    for each in together[0]:
        (*ahead, tensors), (*not_ahead, others) = each["branched"]
        assert ahead == not_ahead and same(tensors, others)


def test_micro_batches_are_the_batch_but_for_the_order_of_sums(together):
    (elbo, whole), (other, parts) = together[0][0]["in parts"]
    assert elbo == pytest.approx(other, rel=1e-9)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)
    assert not same(whole, parts)


def test_each_process_has_its_rows(together):
    first, last = (
        [each["shapes"][f"{layer}.weight"][0] for each in together[0]] for layer in (0, 3)
    )
    assert (first, last) in (([4, 4, 2], [1, 1, 0]), ([3, 3, 3, 1], [1, 1, 0, 0]))
    assert all(each["shapes"]["0.weight_precision"] == () for each in together[0])


@pytest.mark.parametrize("estimator", ["weight", "antithetic"])
def test_a_step_finds_what_autograd_finds_at_the_gathered_draw(together, estimator):
    found = together[0][0][estimator]
    names = [key.removeprefix("noise ") for key in found if key.startswith("noise ")]
    loc, log_scale = (
        {name: found[f"{key} {name}"].clone().requires_grad_() for name in names}
        for key in ("loc", "log_scale")
    )
    loss, likelihoods, kls = 0.0, [], []
    for sign in (1, -1) if estimator == "antithetic" else (1,):
        noise = {name: sign * found[f"noise {name}"] for name in names}
        likelihood, kl = terms(loc, log_scale, noise)
        loss = loss + (0.7 * kl - likelihood) / len(group.X)
        likelihoods.append(likelihood)
        kls.append(kl)
    (loss / len(kls)).backward()
    for name in names:
        torch.testing.assert_close(found[f"loc.grad {name}"], loc[name].grad)
        torch.testing.assert_close(found[f"log_scale.grad {name}"], log_scale[name].grad)
    mean, kl = (float(sum(found).detach()) / len(kls) for found in (likelihoods, kls))
    assert float(found["likelihood"]) == pytest.approx(mean, rel=1e-9)
    assert float(found["kl"]) == pytest.approx(kl, rel=1e-9)


def terms(loc, log_scale, noise):
    """log p(y|θ) of the whole data from its first ten rows, and the KL, at a draw; the density of
    the precision at the draw, by torch's own distributions.
    """
    draw = {name: loc[name] + log_scale[name].exp() * noise[name] for name in loc}
    precision = draw["0.weight_precision"].exp()
    net = group.network()
    weights = {name: draw[name] for name, _ in net.named_parameters() if name in draw}
    weights["0.weight"] = draw["0.weight"] / math.sqrt(6) / precision.sqrt()
    output = torch.func.functional_call(net, weights, (group.X[:10],))
    likelihood = -cross_entropy(output, group.Y[:10]) * len(group.X)
    normal, kl = torch.distributions.Normal, 0.0
    for name, prior in {
        "0.weight": (0.0, 1.0),
        "0.bias": (0.3, 0.4),
        "3.weight": (0.0, 1.0),
        "3.bias": (0.0, 1.0),
    }.items():
        q = normal(loc[name], log_scale[name].exp())
        kl = (
            kl
            + torch.distributions.kl_divergence(
                q, normal(*torch.tensor(prior, dtype=torch.float64))
            ).sum()
        )
    name = "0.weight_precision"
    q = normal(loc[name], log_scale[name].exp()).log_prob(draw[name])
    gamma = torch.distributions.Gamma(*torch.tensor([2.0, 2.0]).double())
    return likelihood, kl + q - gamma.log_prob(precision) - draw[name]


def test_noise_is_new_in_each_part_and_one_for_what_is_shared(together):
    found = [each["weight"] for each in together[0]]
    rows = found[0]["noise 0.weight"]
    assert len(rows.flatten().unique()) == rows.numel()
    assert all(
        torch.equal(each["noise 0.weight_precision"], found[0]["noise 0.weight_precision"])
        for each in found
    )


def test_lowest_is_the_order_of_all_parts(together):
    _, _, sites = whole_scores()
    pooled = torch.cat([site.reshape(-1) for site in sites.values()])
    order = pooled.sort(stable=True)
    for each in together[0]:
        found = each["least"]
        assert found["kth"] == found["kth double"] and len(found["kth"]) > 7
        assert all(value == order.values[k - 1] for k, value in found["kth"])
        for count in (0, 1, 7, 20, 33, len(pooled)):
            expected = torch.zeros(len(pooled), dtype=torch.bool)
            expected[order.indices[:count]] = True
            chosen = torch.cat([mask.reshape(-1) for mask in found[count].values()])
            assert torch.equal(chosen, expected), count


def whole_scores():
    """The scores of all processes, made without a group."""
    real, group.init_device_mesh = group.init_device_mesh, lambda *_: One()
    try:
        return group.scores(0)
    finally:
        group.init_device_mesh = real


class One:
    """A mesh of one process, as far as its parts go."""

    ndim = 1

    def size(self, axis=0):
        return 1

    def get_local_rank(self, axis=0):
        return 0


@pytest.mark.parametrize("name", ["first", "pruned"])
def test_reductions_are_those_of_the_gathered_posterior(together, name):
    found, folder = together
    file = folder / ("0.safetensors" if name == "first" else "pruned-0.safetensors")
    posterior = bmr.Posterior.load(file)
    key = "reductions" if name == "first" else "again"
    for each in found:
        for case, arguments in group.REDUCTIONS.items():
            expected, ours = quiet(posterior, **arguments), each[key][case]
            assert ours["gains"].keys() == expected.sites.keys()
            for site, result in expected.sites.items():
                assert torch.equal(ours["tensors"][f"kept {site}"], result.site.kept), case
                assert ours["gains"][site] == pytest.approx(result.delta_f, rel=1e-9, abs=1e-9)
            assert same(ours["tensors"], group.tensors(expected.posterior))
            assert ours["kept"] == pytest.approx(expected.kept)
    kept = {case: found[0][key][case]["kept"] for case in group.REDUCTIONS}
    assert 0.1 < kept["evidence"] < 1 and kept["narrow"] <= 1


def quiet(posterior, to, **arguments):
    from pyro_bmr.reduction.reduce import quiet_reduction

    return quiet_reduction(posterior, to, **arguments)


def test_pruned_entries_are_zero_and_as_many_as_asked_for(together):
    found = together[0][0]["pruned"]
    names = ["0.weight", "0.bias", "3.weight", "3.bias"]
    kept = sum(int(found[f"kept {name}"].sum()) for name in names)
    assert kept == round(0.5 * sum(found[f"kept {name}"].numel() for name in names))
    for key in ("mean", "var"):
        assert not any(found[f"{key} {name}"][~found[f"kept {name}"]].any() for name in names)
    assert together[0][0]["pruned history"]["kept"][-1] == pytest.approx(0.5, abs=0.01)


def test_a_stopped_fit_continues_to_the_bit(together):
    for each in together[0]:
        found = each["resumed"]
        kinds = [kind for kind in group.OPTIMIZERS if kind in found]
        for kind in kinds:
            assert same(found[kind], found[f"{kind} again"])
            files = ["step-000000012", "step-000000012.safetensors", "step-000000015"]
            assert found[f"{kind} files"] == [*files, "step-000000015.safetensors"]
    assert kinds == list(group.OPTIMIZERS)[: 1 + (len(together[0]) == 4)]
    assert len(kinds) == 1 or not same(found["natural"], found["adam"])


@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_one_process_reads_what_all_have_written(alone, together):
    """At the end of the fit, so that no step changes what was read."""
    found, folder = together
    for kind in found[0]["resumed"].keys() & group.OPTIMIZERS.keys():
        words = rf"not to the bit \(environment.processes was {len(found)}"
        with pytest.warns(bmr.PyroBMRWarning, match=words):
            read = group.saved(folder / kind, -1, group.OPTIMIZERS[kind])
        assert same(group.tensors(read.posterior.gathered()), found[0]["resumed"][kind])
        assert len(read.history) == 6


def test_no_file_of_a_checkpoint_is_a_pickle(together):
    files = [path for path in (together[1] / "natural").rglob("*") if path.is_file()]
    assert len(files) == 2 * (len(together[0]) + 1)
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert list(file.keys())
