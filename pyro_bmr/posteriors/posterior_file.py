"""The file of a posterior: safetensors, with what is no tensor as JSON in its metadata. Nothing is
pickled or unpickled.

Owns `write_posterior` and `read_posterior`. Next: `posterior.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_bmr import formulas, priors
from pyro_bmr.errors import ModelError
from pyro_bmr.files import reading, write_atomically
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.message import Message
from pyro_bmr.guides.latent_sites import SUPPORTS
from pyro_bmr.posteriors.site import Site

_FORMAT = "pyro_bmr posterior 1"
_PRIORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in vars(priors).values()
    if is_dataclass(kind) and isinstance(kind, type)
}
_JOINTS: dict[str | None, Any] = {
    kind.__name__: kind
    for kind in vars(formulas).values()
    if isinstance(kind, type) and hasattr(kind, "unit_count")
}


def write_posterior(
    path: Path, sites: Mapping[str, Site], temperature: float, rows: int | None
) -> None:
    """Writes the sites of a posterior, its temperature and its rows, so that `path` is whole or as
    it was.
    """
    tensors: dict[str, Tensor] = {}
    about = {}
    for name, site in sites.items():
        known = type(site.declared) in vars(priors).values()
        values = dict(vars(site.declared)) if known else {}
        parts = _moments(site) | {
            f"declared_{key}": t for key, t in values.items() if isinstance(t, Tensor)
        }
        tensors |= {f"{name}/{part}": t.contiguous().clone() for part, t in parts.items()}
        numbers = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        about[name] = {
            "support": site.support,
            "given": site.given,
            "declared": {"type": type(site.declared).__name__, **numbers} if known else None,
            "joint": type(site.joint).__name__ if site.joint else None,
            "multiplies": site.multiplies,
            "of_rows": site.of_rows,
        }
    metadata = {
        "format": _FORMAT,
        "posterior": json.dumps({"sites": about, "temperature": temperature, "rows": rows}),
    }
    write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))


def _moments(site: Site) -> dict[str, Tensor]:
    """The tensors of a site by their names on file."""
    parts = {"mean": site.mean, "var": site.var, "mask": site.mask}
    if site.prior:
        parts |= {"prior_mean": site.prior.mean, "prior_var": site.prior.var}
    if site.joint:
        parts |= {f"joint_{part}": value for part, value in vars(site.joint).items()}
    if site.message:
        parts |= {f"message_{part}": value for part, value in site.message._asdict().items()}
    return {part: value for part, value in parts.items() if value is not None}


def read_posterior(path: Path) -> tuple[dict[str, Site], float, int | None]:
    """The sites, the temperature and the rows that `write_posterior` wrote.

    Raises:
        ModelError: the file is not one, or is damaged.
    """
    mend = "give a file that Posterior.save wrote"
    # site → its tensors; nobody looks through those of all sites for one
    parts: dict[str, dict[str, Tensor]] = {}
    with reading(f"{path}: not a readable safetensors file", ModelError, mend):
        opened: AbstractContextManager[Any] = safe_open(path, framework="pt")
        with opened as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                name, _, part = key.rpartition("/")
                parts.setdefault(name, {})[part] = file.get_tensor(key)
    if metadata.get("format") != _FORMAT:
        raise ModelError(
            f"{path}: not a saved posterior (format {metadata.get('format')!r}, expected"
            f" {_FORMAT!r}); {mend}"
        )
    with reading(f"{path}: a damaged posterior", ModelError, mend):
        about = json.loads(metadata["posterior"])
        made: dict[tuple[str, str], Any] = {}
        sites = {
            name: _site_of_file(name, entry, parts[name], made)
            for name, entry in about["sites"].items()
        }
        temperature, rows = about["temperature"], about.get("rows")
        if not sites or not isinstance(temperature, (int, float)):
            raise ValueError("no sites, or no temperature")
    return sites, temperature, rows


def _site_of_file(
    name: str, entry: Mapping[str, Any], part: Mapping[str, Any], made: dict[tuple[str, str], Any]
) -> Site:
    """The site that `write_posterior` described by `entry`, from its tensors by name; raises unless
    they fit each other. `made`: the declared priors so far.
    """
    tensors = {
        key.removeprefix("declared_"): t for key, t in part.items() if key.startswith("declared_")
    }
    # priors of numbers alone are the same object at all sites
    key = (repr(entry["declared"]), name if tensors else "")
    if key not in made:
        values = {**(entry["declared"] or {}), **tensors}
        made[key] = _PRIORS[values.pop("type")](**values) if values else None
    declared = made[key]
    prior = Diagonal(part["prior_mean"], part["prior_var"]) if "prior_var" in part else None
    structure = _JOINTS.get(entry.get("joint"))
    joint = structure and structure(**{f.name: part[f"joint_{f.name}"] for f in fields(structure)})
    message = None
    if "message_h" in part:
        message = Message(*(part[f"message_{field}"] for field in Message._fields))
    given, multiplies = tuple(entry["given"]), tuple(entry.get("multiplies", []))
    about = entry["support"], part.get("mask"), given, joint, message, multiplies
    site = Site(part["mean"], part["var"], prior, declared, *about, entry.get("of_rows"))
    _check_site(name, site)
    return site


def _check_site(name: str, site: Site) -> None:
    """Raises a ValueError unless the parts of a site fit each other."""
    mean, mask, joint = site.mean, site.mask, site.joint
    prior = (site.prior.mean, site.prior.var) if site.prior else ()
    given = [mean, site.var, *prior, *(site.message or ())]
    if site.var.shape != mean.shape or not all(
        t.is_floating_point() and _broadcasts(t, mean) for t in given
    ):
        raise ValueError(f"site '{name}': its moments are not floating numbers of one shape")
    if mask is not None and (mask.shape != mean.shape or mask.dtype != torch.bool):
        raise ValueError(f"site '{name}': its mask is not bool of the shape of its mean")
    if joint is not None and (joint.mean.numel() != mean.numel() or not joint.fits()):
        raise ValueError(f"site '{name}': its covariance does not fit its mean")
    texts = (*site.given, *site.multiplies, *([] if site.of_rows is None else [site.of_rows]))
    if site.support not in SUPPORTS or not all(isinstance(other, str) for other in texts):
        raise ValueError(f"site '{name}': support {site.support!r}, given {site.given!r}")


def _broadcasts(value: Tensor, to: Tensor) -> bool:
    return value.shape == to.shape or torch.broadcast_shapes(value.shape, to.shape) == to.shape
