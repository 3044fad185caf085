"""What is expected of a package: what an import costs, and what is installed."""

import subprocess
import sys

import pytest

IMPORTED_WHERE_USED = (
    "pandas", "matplotlib", "sklearn", "scipy", "joblib", "dask", "filelock", "onnx", "onnxruntime", "onnxscript", "mnist1d",
)  # fmt: skip


@pytest.fixture(scope="module")
def imported():
    """What `import pyro_bmr` adds to the modules that torch and Pyro import themselves."""
    code = "import sys, torch, pyro; known = set(sys.modules); import pyro_bmr; print(*sorted(set(sys.modules) - known))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout.split())


@pytest.mark.parametrize("package", IMPORTED_WHERE_USED)
def test_an_import_of_the_library_does_not_import(package, imported):
    assert "pyro_bmr" in imported
    assert not {name for name in imported if name.split(".")[0] == package}
