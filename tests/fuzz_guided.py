"""The readers of `tests.fuzz` under a fuzzer that looks for inputs that reach new lines: `pip
install atheris`, then

`python -m tests.fuzz_guided READER -runs=100000 -max_len=8192 [more options of libFuzzer]`. A crash
ends it with a traceback and the input in a file.
"""

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["pyro_bmr", "safetensors", "numpy.lib", "zipfile", "gzip", "json"]
):
    import pyro_bmr as bmr
from tests.fuzz import readers

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:
        folder = Path(made)
        reader = readers(folder)[sys.argv[1]]()
        (folder / "corpus").mkdir()
        for k, good in enumerate(reader.good):
            (folder / "corpus" / str(k)).write_bytes(good)

        def once(raw: bytes) -> None:
            reader.file.write_bytes(raw)
            with contextlib.suppress(bmr.PyroBMRError):
                reader.read()

        warnings.simplefilter("ignore")
        atheris.Setup([sys.argv[0], str(folder / "corpus"), *sys.argv[2:]], once)
        atheris.Fuzz()
