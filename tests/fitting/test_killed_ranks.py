"""`pyro-bmr fit` under torchrun, whose processes are killed and started again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pyro_bmr.fitting.processes import _meeting
from tests.test_benchmarks import load

ROOT = Path(__file__).parents[2]
LATE = """
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from pyro_bmr.fitting.processes import process_group

rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if rank == 1 and start > 0:
    time.sleep(4)  # by then process 0 has read the address that it finds
with process_group():
    dist.barrier()
    if start == 0:
        os._exit(9) if rank == 0 else time.sleep(60)
    # a file each: what two processes print at once may be mixed within a line
    Path(sys.argv[1], f"start {start} process {rank}").touch()
"""


def test_each_start_has_names_of_its_own_in_the_store(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "RANK": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GROUP_WORLD_SIZE": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = {}
    for start in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        found[start] = _meeting()
    assert found["0"] == {}
    assert (found["1"]["rank"], found["1"]["world_size"]) == (1, 2)
    found["1"]["store"].set("address", "of a process that was killed")
    assert found["1"]["store"].check(["address"]) and not found["2"]["store"].check(["address"])
    # the nodes of several may have been started another number of times each
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert _meeting() == {}


@pytest.mark.slow
def test_a_process_that_comes_late_to_a_restart_is_waited_for(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    met = tmp_path / "met"
    met.mkdir()
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, str(script), str(met)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {file.name for file in met.iterdir()} == {"start 1 process 0", "start 1 process 1"}


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "nodes"), [(False, 1), (True, 1), (False, 2)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, shard, nodes):
    """The script kills twenty times; here it is three."""
    kills = load("killed_ranks").killed
    said, equal = kills(tmp_path, 2, 3, 30 if shard else 150, shard, nodes, seed=1)
    assert len(said) == 3 and equal
