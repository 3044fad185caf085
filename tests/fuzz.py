"""Fuzzing of every reader of files: whatever is in a file, the reader gives a result or one of the
library's own errors, and runs nothing.

`python -m tests.fuzz READER INPUTS [SEED]` makes inputs from good files: by flipped, cut, doubled
and inserted bytes, by odd values in a JSON header that is put together again properly, and by
archives and signatures that are whole around contents that are not. It ends with a count of what
came of them, or with the first input that gave anything else. Seeded, so that it can be repeated.
`tests/test_fuzz.py` has a short run of each.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load, save

import pyro_bmr as bmr
from pyro_bmr.data.readers import IDX_FILES
from pyro_bmr.experiments.folder import calibration_of, finished_row
from pyro_bmr.experiments.runs import load_run
from pyro_bmr.fitting import checkpoint_file as checkpoint_files
from tests.data.test_data import arrays, idx_bytes, idx_folder

ODD_BYTES = (
    b"",
    b"\0",
    b"\xff" * 4,
    b"\x80",
    b"{",
    b"]",
    b'"',
    b"\\",
    b"nan",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"../../x",
    b"\n",
    b",",
    b"\xf0\x9f\x92\xa5",
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 40, 1 << 70, 1.5, float("nan"), float("inf"), "", "real", "F32", "F64",
    "BOOL", "I64", "../x", "\0", [], [0], [3], [-1], {},
    [[]], "__class__",
)  # fmt: skip


def mutated_bytes(rng: random.Random, raw: bytes) -> bytes:
    """A few changes at random places."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        a = rng.randrange(len(out) + 1)
        b = min(len(out), a + rng.choice((1, 1, 2, 4, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and a < len(out):
            out[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[a:b] = rng.choice(ODD_BYTES)
        elif kind == 2:
            del out[a:b]
        elif kind == 3:
            out[a:a] = out[a:b]
        elif kind == 4:
            out[a:b] = rng.randbytes(b - a)
        elif rng.randrange(4) == 0:
            del out[a:]
    return bytes(out)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """The value with one part of it replaced, removed or doubled."""
    if rng.randrange(6) == 0 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(ODD_VALUES)
    if isinstance(value, list):
        k = rng.randrange(len(value))
        return [
            *value[:k],
            *rng.choice(([mutated_json(rng, value[k])], [], [value[k]] * 2)),
            *value[k + 1 :],
        ]
    key = rng.choice(list(value))
    # JSON within JSON, as in the headers
    if isinstance(value[key], str) and value[key][:1] in "{[" and rng.randrange(8):
        return {**value, key: json.dumps(mutated_json(rng, json.loads(value[key])))}
    kind = rng.randrange(5)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        return {
            **value,
            rng.choice(
                ("x", key + "/", "__tensor__", "__items__", "__tuple__", "../x", "w/mean")
            ): value[key],
        }
    return {**value, key: mutated_json(rng, value[key])}


def mutated_safetensors(rng: random.Random, raw: bytes, sign: bool = False) -> bytes:
    """Bytes, the header alone, or the description and the tensors under a header that fits them,
    signed if asked.
    """
    if rng.randrange(3) == 0:
        return mutated_bytes(rng, raw)
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    if rng.randrange(2):
        text = json.dumps(mutated_json(rng, header)).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + size :]
    tensors, metadata = load(raw), header.get("__metadata__", {})
    if rng.randrange(2):
        name = rng.choice(list(tensors))
        odd = (
            torch.zeros(()),
            torch.zeros(0, 3),
            torch.ones(2, 2, dtype=torch.int64),
            torch.full((3,), torch.nan),
            torch.ones(3, dtype=torch.bool),
        )
        tensors[name] = rng.choice(odd)
        if rng.randrange(2):
            del tensors[name]
    elif metadata:
        metadata = mutated_json(rng, metadata)
        metadata = (
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
            if isinstance(metadata, dict)
            else {}
        )
    if sign and {"settings", "state", "sha256"} <= metadata.keys():
        metadata["sha256"] = checkpoint_files.digest(
            tensors, metadata["settings"], metadata["state"]
        )
    return save(tensors, metadata)


def mutated_npz(rng: random.Random, raw: bytes) -> bytes:
    """Bytes, or an archive that is whole around members that are not, or that have odd names."""
    if rng.randrange(2):
        return mutated_bytes(rng, raw)
    made = io.BytesIO()
    chosen = rng.randrange(4)
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as file,
        zipfile.ZipFile(made, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as out,
    ):
        for k, name in enumerate(file.namelist()):
            content = file.read(name)
            if k == chosen:
                content = (
                    mutated_bytes(rng, content[:128]) + content[128:]
                    if rng.randrange(2)
                    else mutated_bytes(rng, content)
                )
                name = rng.choice((name, name, name, f"../{name}", f"/{name}", "x_train.npy", "x"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out.writestr(name, content)
    return made.getvalue()


def mutated_idx(rng: random.Random, raw: bytes) -> bytes:
    changed = (
        mutated_bytes(rng, raw[:20]) + raw[20:] if rng.randrange(2) else mutated_bytes(rng, raw)
    )
    if rng.randrange(3):
        return changed
    return (
        mutated_bytes(rng, gzip.compress(changed)) if rng.randrange(2) else gzip.compress(changed)
    )


def mutated_text(rng: random.Random, raw: bytes) -> bytes:
    return (
        mutated_bytes(rng, raw)
        if rng.randrange(2)
        else json.dumps(mutated_json(rng, json.loads(raw))).encode()
    )


class Reader(NamedTuple):
    """Good files, what may be done to one, where it is put, and what reads it then."""

    good: list[bytes]
    mutate: Callable[[random.Random, bytes], bytes]
    file: Path
    read: Callable[[], object]


def readers(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Name → what sets the reader up in `folder`."""

    def npz() -> Reader:
        made = io.BytesIO(), io.BytesIO()
        np.savez(made[0], **arrays())
        np.savez_compressed(made[1], **arrays(y_train=np.arange(30) / 7, y_test=np.arange(9) / 7))
        return Reader(
            [m.getvalue() for m in made],
            mutated_npz,
            folder / "f.npz",
            lambda: bmr.load(folder / "f.npz"),
        )

    def csv() -> Reader:
        rows = "".join(f"{k},{k % 3},{k / 7:.3f}\n" for k in range(12))
        return Reader(
            [f"a,b,c\n{rows}".encode(), f'"a",b\n{rows}'.encode()],
            mutated_bytes,
            folder / "f.csv",
            lambda: bmr.load(folder / "f.csv", "b"),
        )

    def idx() -> Reader:
        made = idx_folder(folder / "idx")
        return Reader(
            [idx_bytes(made["x_train"])],
            mutated_idx,
            folder / "idx" / IDX_FILES["x_train"],
            lambda: bmr.load(folder / "idx"),
        )

    def posterior() -> Reader:
        mask = torch.tensor([True, False, True])
        one = bmr.Posterior.from_moments(
            {"w": torch.ones(3), "s": torch.ones(())},
            {"w": torch.ones(3), "s": torch.ones(())},
            {"w": bmr.Gaussian(0.5)},
        )
        draws = {"w": torch.randn(40, 3, generator=torch.Generator().manual_seed(0))}
        two = bmr.Posterior.from_samples(draws, bmr.Gaussian(0.5, mean=torch.ones(3)))
        path = folder / "f.safetensors"
        good = []
        for each in (one.masked({"w": mask}), two):
            each.save(path)
            good.append(path.read_bytes())
        return Reader(good, mutated_safetensors, path, lambda: use(bmr.Posterior.load(path)))

    def use(loaded: bmr.Posterior) -> None:
        loaded.point()

    def checkpoint() -> Reader:
        state = {
            "loop": ([{"kl": 1.5}], 3),
            "run": {"w": torch.ones(3), "state": {0: (torch.zeros(2), None)}},
        }
        path = folder / "step-000000001.safetensors"
        checkpoint_files.write(path, {"seed": 0}, state)
        return Reader(
            [path.read_bytes()],
            partial(mutated_safetensors, sign=True),
            path,
            lambda: checkpoint_files.read(path),
        )

    def reduction(
        file: str = "reduction.json", mutate: Callable[[random.Random, bytes], bytes] = mutated_text
    ) -> Reader:
        posterior = bmr.Posterior.from_moments(
            {"w": torch.ones(3, 2)}, {"w": torch.ones(3, 2)}, bmr.Gaussian(0.5)
        )
        bmr.reduce(posterior, to=bmr.Gaussian(scale=0), per="unit").save(folder)
        return Reader(
            [(folder / file).read_bytes()],
            mutate,
            folder / file,
            lambda: bmr.Reduction.load(folder).table(),
        )

    def decisions() -> Reader:
        made = reduction("sites.safetensors", mutated_safetensors)
        about = json.loads((folder / "reduction.json").read_text())
        # a folder of an older version, whose digests stop nothing
        (folder / "reduction.json").write_text(json.dumps({**about, "files": None}))
        return made

    def report() -> Reader:
        good = json.dumps(
            {"tensors": {}, "warnings": [], "calibration": [[0.1, 0.2, 3.0], [0.6, 0.7, 5.0]]}
        ).encode()
        return Reader(
            [good],
            mutated_text,
            folder / "report.json",
            lambda: calibration_of(folder),
        )

    def run() -> Reader:
        settings = {
            "format": "pyro_bmr run 1",
            "model": "mlp",
            "data": "digits",
            "target": None,
            "prior": "gaussian",
            "seed": 0,
            "temperature": 1.0,
        }
        bmr.Posterior.from_moments(
            {"w": torch.ones(3)}, {"w": torch.ones(3)}, bmr.Gaussian(0.5)
        ).save(folder / "posterior.safetensors")
        return Reader(
            [json.dumps(settings).encode()],
            mutated_text,
            folder / "settings.json",
            lambda: load_run(folder),
        )

    def results() -> Reader:
        data = bmr.load("diabetes")
        settings = bmr.Settings(epochs=1)
        with mock.patch("pyro_bmr.experiments.report.draw", lambda *_: []):  # no pictures
            bmr.compare(
                "linear_regression",
                data,
                priors={"g": bmr.Gaussian(0.5)},
                routes=["map"],
                baselines=(),
                seeds=1,
                settings=settings,
                out=folder / "compared",
                progress=False,
            )
        (path,) = (folder / "compared").rglob("row.json")
        return Reader([path.read_bytes()], mutated_text, path, lambda: finished_row(path.parent))

    made: tuple[Callable[[], Reader], ...] = (
        npz,
        csv,
        idx,
        posterior,
        checkpoint,
        reduction,
        decisions,
        report,
        run,
        results,
    )
    return {make.__name__: make for make in made}


def inputs(reader: Reader, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    while True:
        yield reader.mutate(rng, rng.choice(reader.good))


def fuzz(name: str, count: int, seed: int, folder: Path) -> Counter[str]:
    """Error → how many of the inputs gave it. Stops at one that is not the library's own, with the
    input in `folder`/crash.
    """
    reader = readers(folder)[name]()
    outcomes: Counter[str] = Counter()
    for good in reader.good:
        reader.file.write_bytes(good)
        reader.read()
    for k, raw in zip(range(count), inputs(reader, seed), strict=False):
        reader.file.write_bytes(raw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read()
            outcomes["read"] += 1
        except bmr.PyroBMRError as error:
            outcomes[type(error).__name__] += 1
            assert "\n" not in str(error), f"input {k}: more than one line: {error}"
        except BaseException:
            (folder / "crash").write_bytes(raw)
            print(f"{name}: input {k} of seed {seed}: {raw[:400]!r}", file=sys.stderr)
            raise
    return outcomes


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:
        began = time.perf_counter()
        found = fuzz(
            sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0, Path(made)
        )
        print(
            f"{sys.argv[1]}: {sys.argv[2]} inputs in {time.perf_counter() - began:.0f} s:"
            f" {dict(found)}"
        )
