"""MATLAB files of moments: order and names as `spm_vec` has them, and the reduction against the
closed form of Gaussian evidences.
"""

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

import pyro_bmr as bmr
from pyro_bmr.posteriors import read_mat

PRIOR = {"A": [[1.0, 0.25], [0.25, 1.0]], "B": {"c": 0.5, "d": [[0.0, 2.0, 0.3]]}}


def spd(n, seed=0):
    root = np.random.default_rng(seed).standard_normal((n, n))
    return 0.02 * (root @ root.T + 0.5 * np.eye(n))


def moments():
    """A 2×2, B.c a number, B.d 1×3 whose first entry is fixed; numbers tell their place."""
    mean = {"A": np.array([[0.11, 0.12], [0.21, 0.22]]), "B": {"c": 0.3, "d": [[0.0, 0.42, 0.43]]}}
    zero = {"A": np.full((2, 2), 0.05), "B": {"c": 0.0, "d": np.zeros((1, 3))}}
    return mean, spd(8), zero, PRIOR


@pytest.fixture
def file(tmp_path):
    def write(name="DCM", **changed):
        mean, cov, prior_mean, prior_var = moments()
        dcm = {"Ep": mean, "Cp": scipy.sparse.csc_array(cov), "M": {"pE": prior_mean}}
        dcm["M"]["pC"] = prior_var
        dcm |= changed
        scipy.io.savemat(tmp_path / "dcm.mat", {name: dcm, "note": "text"})
        return tmp_path / "dcm.mat"

    return write


def test_entries_come_column_by_column_without_fixed_ones(file):
    found = read_mat(file())
    assert found.names == (
        "A(1,1)", "A(2,1)", "A(1,2)", "A(2,2)", "B.c", "B.d(1,2)", "B.d(1,3)",
    )  # fmt: skip
    site = found.posterior["theta"]
    assert site.mean.tolist() == [0.11, 0.21, 0.12, 0.22, 0.3, 0.42, 0.43]
    free = [0, 1, 2, 3, 4, 6, 7]
    np.testing.assert_allclose(site.joint.cov.numpy(), spd(8)[np.ix_(free, free)], rtol=1e-14)
    assert site.prior.mean.tolist() == [0.05] * 4 + [0.0] * 3
    assert site.prior.var.tolist() == [1.0, 0.25, 0.25, 1.0, 0.5, 2.0, 0.3]


def test_the_reduction_of_a_file_is_that_of_the_formula(file):
    """ΔF = ln p̃(y) − ln p(y) of two parameters at zero, ln q(0) − ln p(0) over these two."""
    posterior = read_mat(file()).posterior
    off = torch.tensor([False, True, False, False, False, True, False])
    site = posterior["theta"]
    gain, rest = bmr.formulas.prune_subset(site.joint, site.prior, off)
    index = [1, 5]
    mean, cov = site.mean[index].numpy(), site.joint.cov.numpy()[np.ix_(index, index)]
    log_q = -0.5 * (np.linalg.slogdet(2 * np.pi * cov)[1] + mean @ np.linalg.solve(cov, mean))
    p, v = np.array([0.05, 0.0]), np.array([0.25, 2.0])
    log_p = -0.5 * (np.log(2 * np.pi * v) + p**2 / v).sum()
    assert float(gain) == pytest.approx(log_q - log_p, rel=1e-12)
    assert rest.mean.shape == (5,)


@pytest.mark.parametrize("form", ["matrix", "vector", "beside"])
def test_other_forms_of_the_prior(file, tmp_path, form):
    cov, prior_mean = moments()[1:3]
    var = np.array([1.0, 0.25, 0.25, 1.0, 0.5, 0.0, 2.0, 0.3])
    expected = read_mat(file()).posterior["theta"]
    if form == "beside":
        path = tmp_path / "flat.mat"
        flat = np.array([0.11, 0.21, 0.12, 0.22, 0.3, 0, 0.42, 0.43])
        start = np.array([0.05] * 4 + [0.0] * 4)
        scipy.io.savemat(path, {"Ep": flat[:, None], "Cp": cov, "pE": start, "pC": var[None]})
    else:
        pc = np.diag(var) if form == "matrix" else var[:, None]
        path = file(M={"pE": prior_mean, "pC": pc})
    site = read_mat(path).posterior["theta"]
    for one, other in [(site.mean, expected.mean), (site.prior.var, expected.prior.var)]:
        assert one.tolist() == other.tolist()
    assert torch.equal(site.joint.cov, expected.joint.cov)


BAD = {
    "no field": ({"Ep": {"a": 1.0}, "Cp": np.ones((1, 1)), "M": {"pE": 0.0}}, "has no pC"),
    "shape": ({"Cp": np.eye(3)}, r"Cp: expected 8 parameters as in Ep, got \(3, 3\)"),
    "NaN": ({"Cp": np.full((8, 8), np.nan)}, "Cp: expected finite"),
    "asymmetric": ({"Cp": np.triu(np.ones((8, 8)))}, "Cp: expected a symmetric matrix"),
    "correlated prior": (
        {"M": {"pE": moments()[2], "pC": np.ones((8, 8))}},
        "pC: expected variances or a diagonal covariance",
    ),
    "text": ({"Cp": "none"}, "expected real numbers"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_files(file, changed, message):
    with pytest.raises(bmr.errors.ModelError, match=message):
        read_mat(file(**changed))


def test_files_that_are_none(tmp_path, file):
    (tmp_path / "no.mat").write_bytes(b"text")
    with pytest.raises(bmr.errors.ModelError, match=r"not a readable \.mat file.*-v7"):
        read_mat(tmp_path / "no.mat")
    with pytest.raises(bmr.errors.ModelError, match="a struct 'other' with a field Ep.* DCM"):
        read_mat(file(), variable="other")
