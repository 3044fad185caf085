"""The folder of a reduction: safetensors and JSON. Nothing is pickled or unpickled.

Owns `write_reduction` and `read_reduction`. Next: `result.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_bmr.errors import ReductionError
from pyro_bmr.files import check_digests, digests, read_json, reading, replacing, write_atomically
from pyro_bmr.posteriors.posterior import Posterior
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.reduced_site import SiteReduction

_FORMAT = "pyro_bmr reduction 1"
_NAME_ON_FILE = {"drop_log_odds": "drop"}  # of a field of a `SiteReduction`, where they differ
_Parts = tuple[
    dict[str, SiteReduction], Posterior, Posterior, dict[str, Tensor] | None, tuple[str, ...]
]


def write_reduction(
    folder: Path,
    sites: Mapping[str, SiteReduction],
    after: Posterior,
    before: Posterior,
    groups: Mapping[str, Tensor] | None,
    warnings: tuple[str, ...],
) -> None:
    """Writes the parts of a `Reduction` so that `folder` is whole or as it was."""
    tensors: dict[str, Tensor] = {f"{name}/groups": group for name, group in (groups or {}).items()}
    about: dict[str, dict[str, Any]] = {name: {} for name in sites}
    for name, result in sites.items():
        for field in (f.name for f in fields(result) if f.name != "site"):
            value, part = getattr(result, field), _NAME_ON_FILE.get(field, field)
            if isinstance(value, Tensor):
                tensors[f"{name}/{part}"] = value
            else:
                about[name][part] = value
    with replacing(folder, "reduction.json") as stage:
        before.save(stage / "before.safetensors")
        after.save(stage / "after.safetensors")
        own = {key: t.detach().contiguous().clone() for key, t in tensors.items()}
        write_atomically(stage / "sites.safetensors", lambda path: save_file(own, path))
        head = {
            "format": _FORMAT,
            "groups": groups is not None,
            "warnings": warnings,
            "sites": about,
            "files": digests(stage),
        }
        content = json.dumps(head)  # with NaN, as they are
        write_atomically(
            stage / "reduction.json", lambda path: path.write_text(content, encoding="utf-8")
        )


def read_reduction(folder: Path) -> _Parts:
    """The sites, the posteriors after and before, the groups and the warnings that
    `write_reduction` wrote.

    Raises:
        ReductionError: the folder does not hold a reduction, or a file of it is damaged, or of
            another reduction than the rest.
    """
    head = folder / "reduction.json"
    fault = f"{folder}: not a saved reduction"
    mend = "give the folder that Reduction.save wrote, or reduce and save again"
    about = read_json(head, fault, ReductionError, mend)
    if about.get("format") != _FORMAT:
        raise ReductionError(
            f"{fault}: expected the format {_FORMAT!r}, got {about.get('format')!r}; {mend}"
        )
    parts: dict[str, dict[str, Any]] = {}
    with reading(fault, ReductionError, mend):
        for key, tensor in load_file(folder / "sites.safetensors").items():
            name, _, part = key.rpartition("/")
            parts.setdefault(name, {})[part] = tensor
    before, after = (Posterior.load(folder / f"{part}.safetensors") for part in ("before", "after"))
    check_digests(head, about.get("files"), ReductionError, "reduce and save again")
    with reading(f"{folder}: a damaged reduction", ReductionError, "reduce and save again"):
        groups = (
            {name: parts[name].pop("groups") for name in about["sites"]}
            if about["groups"]
            else None
        )
        sites = {
            name: _site_of_file(name, {**numbers, **parts.get(name, {})}, after[name])
            for name, numbers in about["sites"].items()
        }
        warned = tuple(map(str, about.get("warnings", ())))
    return sites, after, before, groups, warned


def _site_of_file(name: str, parts: Mapping[str, Any], site: Site) -> SiteReduction:
    """What a reduction says of one site; raises unless its parts fit each other."""
    fields_of = {on_file: field for field, on_file in _NAME_ON_FILE.items()}
    values = {fields_of.get(part, part): value for part, value in parts.items() if part != "groups"}
    result = SiteReduction(**values, site=site)
    if not all(isinstance(x, (int, float)) for x in (result.delta_f, result.wider)) or any(
        t.shape != site.mean.shape for t in (result.drop_log_odds, result.spike_delta_f)
    ):
        raise ValueError(f"site '{name}': its decisions do not fit its moments")
    return result
