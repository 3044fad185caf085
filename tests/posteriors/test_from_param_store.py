"""Param stores: what is read out of one, its state and other mappings, and what is refused as not
known to be a scale.
"""

import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoGaussian,
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoRegressiveMessenger,
    AutoStructured,
)

import pyro_bmr as bmr

STD = torch.tensor([0.3, 1.7, 2.4])


def program():
    return pyro.sample("w", dist.Normal(torch.full((3,), 0.2), 1.5).to_event(1))


def read(store, **names):
    return bmr.Posterior.from_param_store(
        store, program, **({"names": {"w": tuple(names.values())}} if names else {})
    )


@pytest.fixture
def store():
    """A store as AutoNormal leaves it, with scales that no constraint leaves as they are."""
    pyro.clear_param_store()
    guide = AutoNormal(program)
    guide()
    store = pyro.get_param_store()
    store["AutoNormal.scales.w"] = STD
    store["AutoNormal.locs.w"] = torch.tensor([0.5, -0.7, 2.0])
    yield store
    pyro.clear_param_store()


def test_a_live_store_its_state_and_its_items_have_the_same_scales(store):
    file = io.BytesIO()
    torch.save(store.get_state()["params"], file)
    state = {
        "params": torch.load(io.BytesIO(file.getvalue()), weights_only=True),
        "constraints": store.get_state()["constraints"],
    }
    for given in (store, store.get_state(), state, dict(store.items())):
        torch.testing.assert_close(read(given)["w"].var, STD.square())
        assert read(given)["w"].mean.tolist() == pytest.approx([0.5, -0.7, 2.0])
    # softplus⁻¹ of two of them is positive, and no scale
    assert (store.get_state()["params"]["AutoNormal.scales.w"] > 0).sum() == 2


def test_unconstrained_values_are_refused(store):
    raw = store.get_state()["params"]
    guide = AutoNormal(program)
    guide()
    key = "AutoNormal.scales.w"
    plain = {k: v.detach() for k, v in raw.items()}
    positive = {**plain, key: plain[key].abs()}
    for given, names, words in (
        (raw, {}, "cannot be seen in a dict; pass pyro.get_param_store"),
        (raw, {"loc": "AutoNormal.locs.w", "scale": key}, "cannot be seen in a dict"),
        (positive, {}, "cannot be seen in a dict"),
        (positive, {"loc": "AutoNormal.locs.w", "scale": key}, "cannot be seen in a dict"),
        # a parameter, under a name of one's own
        ({"l": plain[key], "s": raw[key]}, {"loc": "l", "scale": "s"}, "cannot be seen in a dict"),
        (
            guide.state_dict(),
            {},
            "'locs.w_unconstrained' is an unconstrained parameter.*from_guide",
        ),
        (
            dict(guide.named_parameters()),
            {},
            "'locs.w_unconstrained' is an unconstrained parameter",
        ),
        (
            guide.state_dict(),
            {"loc": "locs.w_unconstrained", "scale": "scales.w_unconstrained"},
            "cannot be seen in a OrderedDict",
        ),
        (guide, {}, "got AutoNormal"),
        ({"params": raw, "constraints": {}}, {}, "a constraint for each of its params"),
    ):
        with pytest.raises(bmr.errors.ModelError, match=words):
            read(given, **names)


def test_values_that_are_no_location_and_scale_are_refused():
    three = torch.ones(3)
    for loc, scale, words in (
        (
            three,
            -three,
            "got 3 of 3 that are not; an unconstrained parameter or a logarithm is no scale",
        ),
        (three, torch.tensor([1.0, 0.0, 1.0]), "got 1 of 3"),
        (three, torch.tensor([1.0, torch.nan, 1.0]), "'s' is infinite or NaN"),
        (three * torch.inf, three, "'l' is infinite or NaN"),
        (torch.ones(4), torch.ones(4), r"'l' has shape \(4,\), expected \(3,\) as in the program"),
        (three, torch.ones(2), r"expected 's' as one number or of shape \(3,\), got \(2,\)"),
        (
            three.long(),
            three,
            "expected a tensor of floating-point numbers as 'l', got torch.int64",
        ),
        (three, 0.3, "as 's', got float"),
    ):
        with pytest.raises(bmr.errors.ModelError, match=words):
            read({"l": loc, "s": scale}, loc="l", scale="s")
    assert read({"l": three, "s": torch.tensor(0.4)}, loc="l", scale="s")[
        "w"
    ].var.tolist() == pytest.approx([0.16] * 3)


def test_two_guides_in_one_store_and_names_of_no_site(store):
    store["other.locs.w"], store["other.scales.w"] = torch.zeros(3), torch.ones(3)
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"several locations and scales for it, AutoNormal.locs.w, other.locs.w",
    ):
        read(store)
    del store["other.scales.w"]
    # a location alone is no second guide
    torch.testing.assert_close(read(store)["w"].var, STD.square())
    with pytest.raises(
        bmr.errors.ModelError, match="names: the program has no site 'v'; its sites are: w"
    ):
        bmr.Posterior.from_param_store(
            store,
            program,
            names={"w": ("AutoNormal.locs.w", "AutoNormal.scales.w"), "v": ("a", "b")},
        )


@pytest.mark.parametrize(
    "kind",
    [
        AutoHierarchicalNormalMessenger,
        AutoRegressiveMessenger,
        AutoGaussian,
        lambda program: AutoStructured(program, conditionals="mvn"),
    ],
)
def test_guides_that_keep_more_than_a_location_and_a_scale_are_refused(kind):
    pyro.clear_param_store()
    kind(program)()
    store = pyro.get_param_store()
    loc, scale = (
        next(key for key in store if key.endswith(f"{part}.w")) for part in ("locs", "scales")
    )
    with pytest.raises(
        bmr.errors.ModelError,
        match=f"'{loc}' and '{scale}' may be only part of its posterior.*from_guide",
    ):
        read(store)
    # its names are those of AutoNormalMessenger, so that names= must be believed
    if kind is not AutoRegressiveMessenger:
        with pytest.raises(bmr.errors.ModelError, match="it also keeps"):
            read(store, loc=loc, scale=scale)
    pyro.clear_param_store()


def test_a_scale_without_a_constraint_is_read_with_a_warning():
    pyro.clear_param_store()
    pyro.param("l", torch.zeros(3)), pyro.param("log_s", torch.full((3,), 0.4))
    with pytest.warns(bmr.PyroBMRWarning, match="no positive constraint for 'log_s'"):
        read(pyro.get_param_store(), loc="l", scale="log_s")
    pyro.clear_param_store()
