"""What the site is made of: each public name is in the reference once, and the gallery runs."""

import importlib
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pytest

DOCS = Path(__file__).parents[1] / "docs"
GALLERY = sorted((DOCS / "gallery").glob("*.py"))


def test_each_public_name_is_in_the_reference_once():
    pages = "".join(
        path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.rst"))
    )
    names = re.findall(r"^\.\. auto\w+:: (pyro_bmr[\w.]*)\.(\w+)$", pages, flags=re.M)
    assert len(set(names)) == len(names)
    for package in ("", ".experiments", ".fitting", ".formulas", ".prediction", ".reduction"):
        public = importlib.import_module(f"pyro_bmr{package}").__all__
        assert {name for module, name in names if module == f"pyro_bmr{package}"} == set(public)


def test_the_reference_has_the_stages_of_the_overview():
    site = (DOCS / "site" / "links.py").read_text(encoding="utf-8")
    stages = re.findall(r"\w+", re.search(r"^STAGES = \((.+)\)$", site, flags=re.M)[1])
    overview = (DOCS / "index.md").read_text(encoding="utf-8")
    table = overview.partition("## From a prior to a plain network")[2].partition("```")[0]
    rows = re.findall(r"^\| (\w+)[\w ]* \| `", table, flags=re.M)
    assert [stage for stage in stages if stage != "errors"] == rows


@pytest.mark.slow
@pytest.mark.parametrize("script", GALLERY, ids=lambda path: path.stem)
def test_an_example_of_the_gallery_runs(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    state = pyro.util.get_rng_state()
    try:
        runpy.run_path(str(script), run_name="example")
        assert plt.get_fignums(), "an example draws something"
    finally:
        plt.close("all")
        pyro.clear_param_store()
        pyro.util.set_rng_state(state)
    assert not list(tmp_path.iterdir())
    assert script.read_text(encoding="utf-8").count("\nassert ") > 0, (
        "an example asserts what it says"
    )


def test_every_example_is_seen():
    names = ["numpyro_model", "pruned_digits", "pymc_model", "pyro_program", "regression_table"]
    assert [path.stem for path in GALLERY] == names
