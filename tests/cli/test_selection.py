"""`pyro-bmr select`: from a table with texts and gaps to coefficients, a report and a picture."""

import numpy as np
import pandas as pd
import pytest

from pyro_bmr.cli.commands import main

QUICK = ["--steps", "30", "--draws", "100", "--folds", "2"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": rng.normal(50, 10, 60).round(1),
            "site": rng.choice(["north", "south"], 60),
            "noise": rng.standard_normal(60),
        }
    )
    frame["pressure"] = 90 + 0.5 * frame["age"] + rng.standard_normal(60)
    frame["ill"] = np.where(frame["age"] + rng.normal(0, 3, 60) > 50, "yes", "no")
    frame.loc[4, "age"], frame.loc[6, "site"], frame.loc[9, "pressure"] = np.nan, None, np.nan
    frame.to_csv(tmp_path / "study.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_from_a_file_to_a_report(study, capsys):
    assert main(["select", "study.csv", "--target", "pressure", "--out", "out", *QUICK]) == 0
    printed = capsys.readouterr()
    assert "1 rows without pressure are left out" in printed.err
    assert "are kept: age" in printed.out and "% are in their 90 % interval" in printed.out
    table = pd.read_csv(study / "out" / "coefficients.csv", index_col="coefficient")
    assert abs(table.loc["age", "mean"] - 0.5) < 0.1 and table.loc["age", "delta_f"] < -10
    assert {"age missing", "site=missing", "site=south"} <= set(table.index)
    text = (study / "out" / "report.md").read_text(encoding="utf-8")
    page = (study / "out" / "report.html").read_text(encoding="utf-8")
    assert "| age |" in text and "59 rows, family normal" in text and "pictures/fit.png" in text
    assert '<td class="text">site=south</td>' in page and "data:image/png;base64," in page
    assert (study / "out" / "pictures" / "fit.png").stat().st_size > 10_000


@pytest.mark.slow
def test_classes_by_the_kind_of_the_target(study, capsys):
    assert main(["select", "study.csv", "--target", "ill", "--out", "out", *QUICK]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert "family bernoulli" in (study / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "weight"], "--target: expected one of the columns age, site"),
        (["--target", "pressure", "--family", "bernoulli"], "expected 2 classes in pressure"),
        (["--target", "pressure", "--family", "gamma"], "--family: expected one of normal"),
        (["--target", "pressure", "--prior", "lasso"], "prior: expected one of"),
    ],
)
def test_errors_are_one_line(study, capsys, options, said):
    assert main(["select", "study.csv", "--out", "out", *options, *QUICK]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if "warning" not in x]
    assert len(lines) == 1 and said in lines[0]
