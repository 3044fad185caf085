"""A call of the library is the same whatever is set around it: handlers, inference mode, default
devices, other threads, another call.
"""

import _thread
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.isolation import give_way, isolated, seed_generators

NOISE = torch.tensor([0.3, -1.0, 0.6])
GENERATOR = torch.Generator().manual_seed(4)
X = torch.randn(40, 3, generator=GENERATOR)
Y = X @ torch.tensor([1.5, 0.0, -1.0]) + 0.4 * torch.randn(40, generator=GENERATOR)


def regression(x, y=None):
    w = bmr.Gaussian().sample("w", (3,), x.new_zeros(3))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.4), obs=y)


def fitted(guide=bmr.MeanField, x=X, y=Y, **settings):
    return bmr.fit(
        regression,
        (x, y),
        guide=guide,
        epochs=2,
        batch_size=20,
        reduce=settings.pop("reduce", None),
        progress=False,
        **settings,
    )


@cache
def first_fit():
    return fitted()


REFIT = {"epochs": 1, "batch_size": 40, "draws": 2, "progress": False}
CALLS = {
    "fit": lambda: fitted().posterior["w"].mean,
    "fit of another guide": lambda: fitted(AutoNormal).posterior["w"].mean,
    "fit with reductions": (
        lambda: fitted(bmr.FullRank, reduce=bmr.Every(0.5, stop=1.0)).posterior["w"].mean
    ),
    "predict": lambda: bmr.predict(regression, first_fit().posterior, X, draws=3).locs,
    "elbo_terms": (
        lambda: bmr.fitting.elbo_terms(
            regression, first_fit().guide, X, Y, noise=NOISE
        ).expected_log_likelihood.detach()
    ),
    "from_guide": lambda: bmr.Posterior.from_guide(first_fit().guide, regression, X, Y)["w"].mean,
    "a guide": lambda: bmr.MeanField(regression, X, Y).loc.detach(),
    "refit": lambda: (
        bmr.refit(
            first_fit(),
            bmr.reduce(first_fit().posterior, to=bmr.Gaussian(scale=0)),
            (X, Y),
            **REFIT,
        ).observed
    ),
    "best_widening": lambda: bmr.prediction.best_widening(
        regression, first_fit().posterior, (X, Y), draws=2
    ),
    "reduce": lambda: bmr.reduce(first_fit().posterior, to=bmr.Horseshoe()).posterior["w"].mean,
}


@cache
def results():
    """Those of every call, alone."""
    return {name: call() for name, call in CALLS.items()}


@pytest.fixture(scope="module", autouse=True)
def called_alone():
    """Before a test sets anything around the calls."""
    results()


@contextmanager
def handlers():
    """Each would change what a program means, or be refused twice."""
    data = {"w": torch.ones(3), "y": torch.zeros(40)}
    with (
        poutine.condition(data=data),
        poutine.trace(),
        poutine.scale(scale=0.1),
        poutine.mask(mask=False),
        pyro.plate("data", 5),
        poutine.seed(rng_seed=3),
    ):
        yield


@contextmanager
def settings():
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(True):
        yield


WORLDS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "handlers": handlers,
    "block": poutine.block,
    "meta": lambda: torch.device("meta"),
    "settings": settings,
}


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_set_around_a_call_does_not_reach_it(world):
    for name, call in CALLS.items():
        with WORLDS[world]():
            around = pyro.settings.get()
            got = call()
            assert pyro.settings.get() == around, name
        torch.testing.assert_close(
            torch.as_tensor(got), torch.as_tensor(results()[name]), rtol=1e-6, atol=1e-6, msg=name
        )
    assert not pyro.poutine.runtime._PYRO_STACK and not pyro.poutine.runtime._DIM_ALLOCATOR._stack


@pytest.mark.parametrize("name", ["reduce", "from_guide", "fit with reductions"])
def test_moments_keep_their_precision_under_autocast(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = CALLS[name]()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, results()[name], atol=0.02 if "fit" in name else 1e-6, rtol=0)


def test_covariances_keep_their_precision_under_autocast():
    def covariances():
        reduced = bmr.reduce(fit.posterior, to=bmr.Gaussian(0.3)).posterior
        read = bmr.Posterior.from_guide(fit.guide, regression, X, Y)
        return [posterior["w"].joint.cov for posterior in (read, fit.posterior, reduced)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit = fitted(bmr.FullRank)
        inside = covariances()
    alone = covariances()
    assert torch.equal(alone[0], alone[1])
    torch.testing.assert_close(inside, alone, rtol=1e-6, atol=0)


def test_a_default_dtype_that_is_not_the_datas():
    torch.set_default_dtype(torch.float64)
    try:
        for name, call in CALLS.items():
            got, expected = call(), results()[name]
            if isinstance(expected, torch.Tensor):
                assert got.dtype == expected.dtype == torch.float32, name
            torch.testing.assert_close(
                torch.as_tensor(got).float(),
                torch.as_tensor(expected).float(),
                rtol=1e-4,
                atol=1e-4,
                msg=name,
            )
    finally:
        torch.set_default_dtype(torch.float32)


def test_tensors_and_networks_made_in_inference_mode():
    with torch.inference_mode():
        x, y = X * 1.0, Y * 1.0
        data = bmr.Data("d", X * 1.0, Y * 1.0, X * 1.0, Y * 1.0)
        torch.manual_seed(0)
        net = bmr.BayesianNetwork(nn.Linear(3, 1), bmr.Gaussian(), bmr.Normal())
        moments = bmr.Posterior.from_moments(
            {"w": torch.ones(3)}, {"w": torch.full((3,), 0.01)}, bmr.Gaussian(1.0)
        )
    for given in ((x, y), data):
        assert torch.equal(
            bmr.fit(regression, given, epochs=2, batch_size=20, progress=False).posterior["w"].mean,
            results()["fit"],
        )
    assert torch.equal(fitted(validation=(x, y)).posterior["w"].mean, results()["fit"])
    torch.testing.assert_close(
        bmr.predict(regression, first_fit().posterior, x, draws=3).locs, results()["predict"]
    )
    guide = bmr.MeanField(regression, x, y)
    bmr.fitting.elbo_terms(regression, guide, x, y).expected_log_likelihood.backward()
    assert guide.loc.grad.abs().min() > 0
    assert (
        bmr.reduce(moments, to=bmr.Horseshoe()).kept
        == bmr.reduce(moments.masked({}), to=bmr.Gaussian(scale=0)).kept
        == 1.0
    )
    result = bmr.fit(net, (x, y), epochs=1, progress=False)
    assert (
        result.posterior["weight"].mean.isfinite().all()
        and bmr.export(result.program, result.posterior)(X).isfinite().all()
    )


def test_calls_in_threads_are_those_of_one_thread():
    names = [name for name in CALLS if name not in ("refit", "best_widening")]
    found = Counter()

    def work(offset):
        for k in range(len(names)):
            name = names[(k + offset) % len(names)]
            try:
                found[
                    "equal" if torch.equal(CALLS[name](), results()[name]) else f"{name} differs"
                ] += 1
            except Exception as error:
                found[f"{name}: {error!r}"] += 1

    threads = [threading.Thread(target=work, args=(3 * k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"equal": 2 * len(names)} and not pyro.poutine.runtime._PYRO_STACK
    assert torch.equal(CALLS["predict"](), results()["predict"])


def test_a_long_call_gives_way_between_its_steps_and_finds_its_world_again():
    order, inside, waiting = [], threading.Event(), threading.Event()

    @isolated(steps=True)
    def long():
        torch.manual_seed(1)
        pyro.settings.set(module_local_params=True)
        inside.set()
        waiting.wait()
        with poutine.scale(scale=0.5) as handler:
            first = torch.rand(1)
            while thread.is_alive():
                give_way()
            order.append("long")
            assert [handler] == pyro.poutine.runtime._PYRO_STACK and pyro.settings.get(
                "module_local_params"
            )
        pyro.settings.set(module_local_params=False)
        return torch.cat([first, torch.rand(1)])

    @isolated()
    def short():
        assert not pyro.poutine.runtime._PYRO_STACK and not pyro.settings.get("module_local_params")
        torch.rand(100)
        order.append("short")

    def other():
        inside.wait()
        waiting.set()
        short()

    thread = threading.Thread(target=other)
    thread.start()
    state = torch.get_rng_state()
    drawn = long()
    thread.join()
    torch.manual_seed(1)
    assert order == ["short", "long"] and torch.equal(drawn, torch.rand(2))
    torch.set_rng_state(state)


@pytest.mark.parametrize("waits", ["at its start", "between its steps", "and is woken"])
def test_ctrl_c_as_a_call_has_its_turn_leaves_the_turn_to_others(waits):
    entered, asked, order = threading.Event(), threading.Event(), []

    @isolated()
    def hold():
        entered.set()
        time.sleep(0.02)  # the main thread is at the door by now
        if waits == "and is woken":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)  # it waits again: what it has to undo needs a turn
        else:
            _thread.interrupt_main()  # noticed when it has the room
        order.append("held")

    @isolated(steps=True)
    def steps():
        asked.set()
        while True:
            give_way()

    def other():
        if waits != "at its start":
            asked.wait()
        hold()

    thread, before = (
        threading.Thread(target=other, daemon=True),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            if waits == "at its start":
                entered.wait()
            steps()
        order.append("left")
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert order == ["held", "left"]
    equal = []
    for _ in range(2):
        after = threading.Thread(
            target=lambda: equal.append(torch.equal(CALLS["predict"](), results()["predict"])),
            daemon=True,
        )
        after.start()
        after.join(20)
    assert equal == [True, True] and torch.equal(CALLS["predict"](), results()["predict"])


def test_a_fit_within_a_fit_and_within_a_program():
    seen = []

    def nested(x, y=None):
        state = torch.get_rng_state()
        seen.append(torch.equal(CALLS["fit"](), results()["fit"]))
        seen.append(torch.equal(state, torch.get_rng_state()))
        return regression(x, y)

    result = bmr.fit(nested, (X, Y), epochs=1, batch_size=20, progress=False)
    assert all(seen) and len(seen) > 8
    assert torch.equal(
        result.posterior["w"].mean,
        bmr.fit(regression, (X, Y), epochs=1, batch_size=20, progress=False).posterior["w"].mean,
    )


def test_an_error_leaves_nothing_behind():
    def wrong(x, y=None):
        with poutine.scale(scale=2.0), pyro.plate("data", len(x)):
            raise RuntimeError("no luck")

    state = torch.get_rng_state()
    with pytest.raises(bmr.errors.FitError, match="no luck"):
        bmr.fit(wrong, (X, Y), progress=False)
    with pytest.raises(bmr.errors.ModelError, match="no luck"):
        bmr.predict(wrong, first_fit().posterior, X)
    assert not pyro.poutine.runtime._PYRO_STACK and torch.equal(state, torch.get_rng_state())
    assert torch.equal(CALLS["fit"](), results()["fit"])


def test_the_callers_random_state_goes_on_in_elbo_terms_alone():
    state = torch.get_rng_state()
    for name, call in CALLS.items():
        call()
        assert torch.equal(state, torch.get_rng_state()), name
    assert bmr.fitting.elbo_terms(regression, first_fit().guide, X, Y) != bmr.fitting.elbo_terms(
        regression, first_fit().guide, X, Y
    )


def test_a_child_of_a_fork_does_not_wait_for_a_thread_it_has_not():
    import multiprocessing

    started, done = threading.Event(), threading.Event()

    @isolated()
    def hold():
        started.set()
        done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    started.wait()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(
        target=lambda: queue.put(bool(torch.equal(CALLS["predict"](), results()["predict"])))
    )
    child.start()
    child.join(60)
    done.set()
    thread.join()
    assert child.exitcode == 0 and queue.get()


def test_seeds_are_those_of_torch():
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        want = torch.rand(5)
        seed_generators(1234)
        assert torch.equal(torch.rand(5), want)
        seed_generators(1235)
        assert not torch.equal(torch.rand(5), want)
