"""A process of `pyro-bmr fit` killed again and again under torchrun, which starts all of them anew:
the fit ends with the bits of one that nobody disturbed.

    python benchmarks/killed_ranks.py --kills 20
    python benchmarks/killed_ranks.py --kills 20 --shard
    python benchmarks/killed_ranks.py --kills 20 --nodes 2

Digits, 64-50-10, reductions during the fit, a checkpoint every half second. Every other kill hits
a process that is being started, or at its first steps; the others one that has begun to save. Which
process, and after how many seconds, is random (`--seed`). With two nodes there are two torchruns,
which meet on the loopback, with half of the processes each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FIT = "--data digits --model mlp:50 --temperature 0.3 --reduce-to gaussian:0 --quiet --resume"
FILES = ("posterior.safetensors", "network.safetensors")


class Torchrun:
    """`pyro-bmr fit` under one torchrun a node."""

    def __init__(
        self, out: Path, processes: int, nodes: int, restarts: int, epochs: int, shard: bool
    ) -> None:
        self.out = out
        words = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}"]
        words += [f"--nproc-per-node={processes // nodes}", f"--nnodes={nodes}"]
        # of several nodes each restart needs a new store (docs/several_processes.md)
        more = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(nodes > 1))}
        if nodes == 1:
            words += ["--standalone"]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=fit"]
            words += ["--local-addr=127.0.0.1"]
        words += ["-m", "pyro_bmr", "fit", *FIT.split(), "--checkpoint-seconds", "0.5"]
        words += ["--epochs", str(epochs), "--out", str(out), *(["--shard"] if shard else [])]
        self.log = (out.parent / f"{out.name}.log").open("w")
        said = {"stdout": self.log, "stderr": subprocess.STDOUT}
        self.agents = [
            subprocess.Popen(words, cwd=ROOT, env={**os.environ, **more}, **said)  # type: ignore[call-overload]
            for _ in range(nodes)
        ]

    def workers(self) -> list[int]:
        """The processes of the fit that run now."""
        found: list[int] = []
        for agent in self.agents:
            with contextlib.suppress(OSError):
                file = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
                found += map(int, file.read_text().split())
        return found

    @property
    def runs(self) -> bool:
        return any(agent.poll() is None for agent in self.agents)

    def saves(self) -> set[str]:
        return {path.name for path in (self.out / "checkpoints").glob("step-*.safetensors")}

    def wait(self) -> list[int]:
        found = [agent.wait(timeout=600) for agent in self.agents]
        self.log.close()
        return found


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[Torchrun]:
    run = Torchrun(*arguments)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        for agent in run.agents:
            if agent.poll() is None:
                agent.terminate()
                agent.wait(timeout=60)


def wait_for(run: Torchrun, condition: object) -> bool:
    """Whether the condition became true while the fit ran."""
    while run.runs:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def kill(run: Torchrun, processes: int, rng: random.Random, early: bool, last: set[int]) -> str:
    """Kills a process of those started after `last`; says what, or "" if there was none to kill."""
    before = run.saves()
    if not wait_for(run, lambda: len(set(run.workers()) - last) == processes):
        return ""
    fresh = sorted(set(run.workers()) - last)
    if not early and not wait_for(run, lambda: run.saves() - before):
        return ""
    delay, victim = rng.uniform(0, 9 if early else 3), rng.choice(fresh)
    time.sleep(delay)
    last.update(fresh)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    step = max(run.saves(), default="step-0").removeprefix("step-").removesuffix(".safetensors")
    when = "after its start" if early else "after its first save"
    return f"process {fresh.index(victim)} of {processes}, {delay:.1f} s {when}, step {int(step)}"


def killed(
    folder: Path, processes: int, kills: int, epochs: int, shard: bool, nodes: int, seed: int
) -> tuple[list[str], bool]:
    """What was killed, and whether the fit has ended with the bits of an undisturbed one."""
    rng, last, said = random.Random(seed), set[int](), list[str]()
    case = processes, nodes
    with started(folder / "whole", *case, 0, epochs, shard) as run:
        assert run.wait() == [0] * nodes, (folder / "whole.log").read_text()
    # a process that is started while another is killed may be refused its group, and starts again
    with started(folder / "killed", *case, 3 * kills, epochs, shard) as run:
        while len(said) < kills:
            found = kill(run, processes, rng, len(said) % 2 == 1, last)
            if not found and not run.runs:
                break
            if found:
                said.append(found)
                print(found, flush=True)
        assert run.wait() == [0] * nodes, (folder / "killed.log").read_text()
    return said, all(same(folder / "whole" / name, folder / "killed" / name) for name in FILES)


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same bits in all tensors; the order in a header is random."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=600)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where both runs and their logs stay")
    given = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as name:
        folder = given.pop("out") or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        said, equal = killed(folder, **given)
    print(f"{len(said)} kills; the same bits: {equal}")


if __name__ == "__main__":
    main()
