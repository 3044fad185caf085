"""Checkpoints of a sharded fit, from which it continues with any number of processes.

Owns `ShardedWriter`, `sharded_snapshot`, `sharded_settings` and `restored`. The file
``step-<number>.safetensors`` is that of any fit, with all that the processes share; the folder
``step-<number>`` beside it has their parts. Next: `fit.py`.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pyro_bmr.errors import PyroBMRError
from pyro_bmr.fitting.checkpoints import Checkpoints, CheckpointWriter
from pyro_bmr.fitting.run import Run
from pyro_bmr.fitting.settings import description
from pyro_bmr.sharding.layout import Layout
from pyro_bmr.sharding.parts_files import begin_parts, check_parts, read_parts, written_parts
from pyro_bmr.sharding.sharded_run import ShardedRun


class ShardedWriter(CheckpointWriter):
    """As `CheckpointWriter`; all processes write their parts, and the first one the file, last. A
    folder without its file is of a process that was killed while it wrote, and is not read.

    What is saved is copied, and written in the background. A checkpoint counts once its file is
    there: the one before stays until then. The next one waits for it, and so does the end of the
    fit; the first one of a process is waited for at once.
    """

    def __init__(self, checkpoint: str | Path | Checkpoints | None, layout: Layout) -> None:
        super().__init__(checkpoint, writes=dist.get_rank() == 0)
        self.layout = layout
        self.pending: Future[None] | None = None

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        settings, state = super()._read(path)
        check_parts(path.with_suffix(""), state["parts"]["files"], self.layout)
        state["parts"]["folder"] = str(path.with_suffix(""))
        return settings, state

    def due(self, step: int, last: bool) -> bool:
        """Whether all processes write, by the clock of the first; a call of all of them."""
        if self.rule is None:
            return False
        own = torch.tensor([float(super().due(step, last))], device=self.layout.device)
        dist.broadcast(own, src=0)
        return bool(own.item())

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        self.wait()
        is_first, run = self.saved_at is None, dict(state["run"])
        parts = run.pop("parts")
        folder = self.folder / f"step-{step:09d}"
        begun = begin_parts(folder, parts, self.layout, self.group)
        dtypes = {
            name: str(next(iter(sites.values())).dtype).removeprefix("torch.")
            for name, sites in parts.items()
        }
        file = copy.deepcopy({**state, "run": run}) if self.writes else {}
        self.pending = self.thread.submit(self._finish, begun, folder, file, dtypes)
        if is_first:
            self.wait()
        self.saved_at = time.monotonic()

    def _finish(
        self, begun: Future[Any], folder: Path, state: dict[str, Any], dtypes: dict[str, str]
    ) -> None:
        """Writes the file when all parts are written; runs in the thread, in all processes."""
        try:
            begun.result()
        except CheckpointException as error:
            reason = next(iter(error.failures.values()), (error,))[0]
            raise PyroBMRError(f"cannot write '{folder}' ({reason}); free some space") from None
        files = written_parts(folder, self.group)
        try:
            if self.writes:
                state["parts"] = {"files": files, "dtypes": dtypes}
                super().save(int(folder.name.removeprefix("step-")), state)
                heads = {path.stem for path in self.folder.glob("step-*.safetensors")}
                for old in self.folder.glob("step-*/"):
                    if old.name not in heads:
                        shutil.rmtree(old, ignore_errors=True)
        finally:
            dist.barrier(self.group)

    def wait(self) -> None:
        """Waits until what was begun is written.

        Raises:
            PyroBMRError: it cannot be.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        with super().interrupts():
            if self.rule is None:
                yield
                return
            # messages of the thread, beside those of the fit
            self.group: dist.ProcessGroup = dist.new_group(backend="gloo")
            try:
                with ThreadPoolExecutor(1, "checkpoints") as self.thread:
                    yield
                    self.wait()
            finally:
                dist.destroy_process_group(self.group)

    def last_good(self) -> str:
        with contextlib.suppress(PyroBMRError, RuntimeError):
            self.wait()
        return super().last_good()


@torch.no_grad()
def sharded_snapshot(run: ShardedRun) -> dict[str, Any]:
    """All that the steps so far have changed, but for `Progress`: in ``parts`` what is shared out,
    name → site → this process's part.
    """
    step, optimizer = run.step, dict(run.optimizer.state_dict())
    step.align()
    flat = {"loc": step.loc.detach(), "log_scale": step.log_scale.detach()}
    optimizer["state"] = {key: dict(entry) for key, entry in optimizer["state"].items()}
    for key in (0, 1):  # those of `loc` and of `log_scale`
        entry = optimizer["state"].get(key, {})
        vectors = [k for k, v in entry.items() if isinstance(v, Tensor) and v.ndim == 1]
        flat |= {f"optimizer.{key}.{name}": entry.pop(name) for name in vectors}
    parts = {name: step.spread(vector) for name, vector in flat.items()}
    if run.masks:
        everything = {n: torch.ones_like(t, dtype=torch.bool) for n, t in parts["loc"].items()}
        kept = {**everything, **run.masks}
        parts["kept"] = {name: mask.to(torch.uint8) for name, mask in kept.items()}
    return {
        "parts": parts,
        "masked": list(run.masks),
        "shared": {name: step.shared_values(vector) for name, vector in flat.items()},
        "scales": dict(run.empirical.scales),
        "trained": [p.detach() for p in step.trained],
        "buffers": [buffer for buffer in run.layers.network.buffers()],
        "kl": step.kl,
        "settled": bool(step.declared) and step.priors is step.declared,
        "optimizer": optimizer,
        "scheduler": run.scheduler.state_dict() if run.scheduler else None,
        "faults": run.faults.state(),
        "rows": run.rows.state(),
    }


@torch.no_grad()
def restored(run: Run, saved: Mapping[str, Any]) -> None:
    """Continues from a checkpoint; a call of all processes."""
    assert isinstance(run, ShardedRun)
    step, state, about = run.step, saved["run"], saved["parts"]
    device = run.rows.device
    run.empirical.scales.clear()
    run.empirical.scales.update({n: s.to(device) for n, s in state["scales"].items()})
    dtypes = {name: getattr(torch, dtype) for name, dtype in about["dtypes"].items()}
    like = step.spread(step.loc.detach())
    parts = read_parts(Path(about["folder"]), dtypes, like, run.layout)
    run.masks = {name: parts["kept"][name].bool() for name in state["masked"]}
    step.prune(run.masks, run.optimizer)
    flat = {
        name: step.collected(parts[name], {n: v.to(device) for n, v in values.items()})
        for name, values in state["shared"].items()
    }
    optimizer = dict(state["optimizer"])
    for name in flat.keys() - {"loc", "log_scale"}:
        _, key, inner = name.split(".", 2)
        optimizer["state"].setdefault(int(key), {})[inner] = flat[name]
    run.optimizer.load_state_dict(optimizer)
    if run.scheduler:
        run.scheduler.load_state_dict(state["scheduler"])
    for own, value in zip(step.trained, state["trained"], strict=True):
        own.detach().copy_(value)
    for own, value in zip(run.layers.network.buffers(), state["buffers"], strict=True):
        own.copy_(value)
    step.continue_from(flat["loc"], flat["log_scale"], float(state["kl"]), state["settled"])
    run.faults.restore(state["faults"])
    run.rows.restore(state["rows"])


def sharded_settings(run: ShardedRun) -> dict[str, Any]:
    """What must be the same of the sites and of the guide, whatever the parts are."""
    sites = {
        name: {
            "shape": list(shape),
            "dtype": str(run.guide.loc.dtype),
            "prior": description(run.layers.network.priors[name]),
        }
        for name, shape in run.layout.shapes.items()
    }
    return {"sites": sites, "guide": {"type": "MeanField", "estimator": run.guide.estimator}}
