"""What is expected of a package: what an import costs, and what is installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_bmr as bmr

ROOT = Path(__file__).parents[1]
IMPORTED_WHERE_USED = (
    "pandas", "matplotlib", "sklearn", "scipy", "joblib", "dask", "filelock", "onnx",
    "onnxruntime", "onnxscript", "mnist1d",
)  # fmt: skip


@pytest.fixture(scope="module")
def imported():
    """What `import pyro_bmr` adds to the modules that torch and Pyro import themselves, and what
    loading the digits adds to those.
    """
    code = (
        "import sys, torch, pyro; known = set(sys.modules); import pyro_bmr;"
        " print(*sorted(set(sys.modules) - known));"
        " pyro_bmr.load('digits'); print(*sorted(set(sys.modules) - known))"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=600
    ).stdout.splitlines()
    return [set(line.split()) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("package", IMPORTED_WHERE_USED)
def test_an_import_of_the_library_does_not_import(package, imported):
    first, _ = imported
    assert "pyro_bmr" in first
    assert not {name for name in first if name.split(".")[0] == package}


@pytest.mark.slow
def test_the_digits_are_read_without_scikit_learn(imported):
    first, loaded = imported
    assert loaded >= first and not {name for name in loaded if name.split(".")[0] == "sklearn"}


def test_every_folder_with_code_is_a_package_that_is_installed():
    folders = {path.parent for path in (ROOT / "pyro_bmr").rglob("*.py")}
    assert not {folder for folder in folders if not (folder / "__init__.py").is_file()}, (
        "setup.py does not find it"
    )
    assert (ROOT / "pyro_bmr" / "py.typed").is_file()
    assert importlib.util.find_spec("pyro_bmr.models.mlp") is not None


def test_the_citation_is_of_this_version():
    assert re.findall(
        r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.M
    ) == [bmr.__version__]
