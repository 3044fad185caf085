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
    """What `import pyro_bmr` adds to the modules that torch and Pyro import themselves."""
    code = (
        "import sys, torch, pyro; known = set(sys.modules); import pyro_bmr;"
        " print(*sorted(set(sys.modules) - known))"
    )
    return set(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
        ).stdout.split()
    )


@pytest.mark.parametrize("package", IMPORTED_WHERE_USED)
def test_an_import_of_the_library_does_not_import(package, imported):
    assert "pyro_bmr" in imported
    assert not {name for name in imported if name.split(".")[0] == package}


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
