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


@pytest.fixture
def grades(study):
    """Counts for each year, a grade in words and in numbers of two digits, and outliers."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"dose": rng.standard_normal(80), "noise": rng.standard_normal(80)})
    frame["years"] = rng.uniform(0.5, 20, 80)
    frame["cases"] = rng.poisson(frame["years"] * np.exp(0.5 * frame["dose"]))
    level = 1.8 * frame["dose"] + rng.logistic(size=80)
    frame["grade"] = pd.cut(level, [-99, -1, 1, 99], labels=["mild", "middling", "bad"])
    frame["number"] = pd.cut(level, [-99, -1, 1, 99], labels=[2, 9, 10]).astype(int)
    frame["size"] = 2 * frame["dose"] + 0.3 * rng.standard_t(1.5, 80)
    frame.to_csv("grades.csv", index=False)
    return frame


@pytest.mark.parametrize(
    ("target", "options", "left_out"),
    [
        pytest.param("size", "student-t", ["grade", "number"], marks=pytest.mark.slow),
        pytest.param(
            *("cases", "poisson --exposure years", ["grade", "number", "size"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("cases", "negative-binomial --exposure years", ["grade", "number", "size"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("grade", "ordinal --order mild,middling,bad", ["number", "size", "cases"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("number", "ordinal", ["grade", "size", "cases"]), marks=pytest.mark.slow),
    ],
)
def test_every_family_of_the_estimators(grades, capsys, target, options, left_out):
    """The coefficient of dose, within four of its standard deviations; none of the exposure."""
    grades.drop(columns=left_out).to_csv("some.csv", index=False)
    command = ["select", "some.csv", "--target", target, "--family", *options.split()]
    assert main([*command, "--out", "out", *QUICK]) == 0, capsys.readouterr().err
    found = pd.read_csv("out/coefficients.csv", index_col="coefficient")
    true = {"size": 2.0, "cases": 0.5}.get(target, 1.8)
    assert abs(found.loc["dose", "mean"] - true) < 4 * found.loc["dose", "sd"] < 1.4
    assert ("years" in found.index) == ("exposure" not in options)
    with open("out/report.md", encoding="utf-8") as report:
        assert all(word in report.read() for word in [options.split()[-1]])


def test_a_file_with_semicolons_is_refused(study, capsys):
    pd.read_csv("study.csv").to_csv("german.csv", index=False, sep=";", decimal=",")
    assert main(["select", "german.csv", "--target", "pressure", "--out", "out"]) == 2
    assert "got ';' and decimals with a comma; save it in UTF-8" in capsys.readouterr().err


@pytest.mark.slow
def test_columns_that_are_nearly_the_same_are_in_the_report(study, capsys):
    frame = pd.read_csv("study.csv")
    frame.assign(again=frame["age"], days=365 * frame["age"]).to_csv("copies.csv", index=False)
    options = ["--target", "pressure", "--prior", "horseshoe", "--out", "out"]
    assert main(["select", "copies.csv", *options, *QUICK]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("columns are nearly the same, |r| > 0.99: age, again, days") == 1
    report = (study / "out" / "report.md").read_text(encoding="utf-8")
    assert "their probability of being shrunk by less than half" in report  # the caption
    for text in (printed.out, report):
        assert "they share their inclusion: age, again, days; age missing, ag" in text


@pytest.mark.slow
def test_a_constant_target_has_a_warning_and_no_r_squared(study, capsys):
    pd.read_csv("study.csv").assign(ill=3).to_csv("constant.csv", index=False)
    assert main(["select", "constant.csv", "--target", "ill", "--out", "out", *QUICK]) == 0
    printed = capsys.readouterr()
    assert "y is the same in all 60 rows, 3" in printed.err and "invalid value" not in printed.err
    assert "2 folds: RMSE 0;" in printed.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "ill", "--family", "ordinal"], "expected --order with the classes of ill"),
        (
            ["--target", "ill", "--family", "ordinal", "--order", "no,maybe"],
            "--order: expected each class of ill once, ",
        ),
        (["--target", "pressure", "--exposure", "age"], "--exposure: expected --family poisson or"),
        (["--target", "site", "--family", "poisson"], "expected numbers in site, got others"),
        (
            ["--target", "pressure", "--family", "poisson", "--exposure", "weight"],
            "--exposure: expected one of the columns age, site",
        ),
        (["--target", "pressure", "--folds", "70"], "--folds: expected at most 59, the rows with"),
        (["--target", "weight"], "--target: expected one of the columns age, site"),
        (["--target", "pressure", "--family", "bernoulli"], "expected 2 classes in pressure"),
        (["--target", "pressure", "--family", "gamma"], "--family: expected one of normal"),
        (["--target", "pressure", "--prior", "lasso"], "prior: expected one of"),
    ],
)
def test_errors_are_one_line(study, capsys, options, said):
    assert main(["select", "study.csv", "--out", "out", *QUICK, *options]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if "warning" not in x]
    assert len(lines) == 1 and said in lines[0]
