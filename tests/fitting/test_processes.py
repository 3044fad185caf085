"""A fit in two processes: the same mean gradient, the same weights in both, one word for all about
faults, and resumption after one is killed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fitting import two_processes
from tests.process_group import ROOT, run_group

SCRIPT = Path(two_processes.__file__)


def in_two(*arguments):
    """Runs the script in two processes of one group."""
    return run_group(SCRIPT, 2, *arguments)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    statuses, words = in_two("together", folder)
    assert statuses == [0, 0], words
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_end_with_the_same_to_the_bit(together):
    for case in ("natural", "point", "loaded"):
        first, second = together[0][case], together[1][case]
        assert first.keys() == second.keys() and all(
            torch.equal(first[name], second[name]) for name in first
        )
    assert together[0]["history"] == together[1]["history"]
    kept = together[0]["history"][0]["kept"]
    assert kept[-1] < 0.8 < kept[0] == 1


def test_without_noise_two_processes_find_what_one_finds(together):
    fit = two_processes.point()
    alone = two_processes.tensors(fit)
    for name, value in together[0]["point"].items():
        torch.testing.assert_close(value, alone[name], atol=2e-5, rtol=1e-4)
    ours, one = together[0]["history"][1]["elbo"], fit.history["elbo"].tolist()
    assert ours == pytest.approx(one, rel=1e-4)


def test_each_takes_its_part_of_the_batches_of_a_loader(together):
    alone = two_processes.tensors(two_processes.loaded())
    for name, value in together[0]["loaded"].items():
        torch.testing.assert_close(value, alone[name], atol=2e-5, rtol=1e-4)
    for both in together:
        assert "process 1 reads other rows than process 0" in both["other rows"]


def test_the_curvature_is_that_of_all_rows(together):
    alone = two_processes.curved()
    assert len(alone) == 2 * 2 + 2
    for both in together:
        for name, value in alone.items():
            torch.testing.assert_close(both["curved"][name], value, atol=1e-5, rtol=1e-4)
            shuffled = both["curved by a loader"][name]
            torch.testing.assert_close(shuffled, value, atol=1e-5, rtol=1e-4)
        assert "process 1 reads other rows than process 0" in both["curved by others"]
    drawn, other = (both["drawn"] for both in together)
    assert all(torch.equal(drawn[name], other[name]) for name in alone)
    assert not torch.allclose(drawn["3.weight outputs"], alone["3.weight outputs"])
    assert all("a process has no rows" in both["few"] for both in together)
    assert all("process 1 reads other rows" in both["grown"] for both in together)


def test_a_network_is_pruned_as_in_one_process(together):
    alone, ragged = two_processes.pruned(), two_processes.pruned(rows=76)
    assert sum(int(m.sum()) for n, m in alone.items() if n.startswith("mask")) == 29  # of 98
    for both in together:
        whole, nothing, resumed = both["pruned"]
        for name, value in ragged.items():
            torch.testing.assert_close(both["pruned with a batch of one row"][name], value)
        assert whole.keys() == alone.keys() == resumed.keys() and not nothing
        for name, value in alone.items():
            torch.testing.assert_close(whole[name], value, atol=1e-8, rtol=1e-6)
            assert torch.equal(whole[name], together[0]["pruned"][0][name])
            assert torch.equal(whole[name], resumed[name])
        drawn, other = both["pruned by draws"], together[0]["pruned by draws"]
        assert all(torch.equal(drawn[name], other[name]) for name in alone)
        elsewhere, rows = both["pruned otherwise"]
        assert "process 1 sees another state in checkpoint=" in elsewhere
        assert "prune: process 1 reads other rows than process 0" in rows


def test_checkpoints_of_the_first_are_no_difference(together):
    assert [both["saved"] for both in together] == ["no error", "no error"]


def test_each_process_draws_its_own_noise(together):
    assert together[0]["seed"] == 7 != together[1]["seed"]


def test_faults_are_said_in_both(together):
    for rank in range(2):
        nan, start, small, seed = together[rank]["errors"]
        assert (
            nan.startswith("step 10: the loss or its gradient is not finite at ")
            and ", in process 1 of 2; lower" in nan
        ), nan
        assert start == "no error"  # weights that start differently are those of the first
        assert small.startswith("batch_size=1 of 101 rows: 2 processes need at least one row each")
        assert seed.startswith("process 1 calls fit otherwise than process 0") and (
            "seed was 0, is 1" in seed
        ) == (rank == 1)
        stopped, skipped = together[rank]["skipped"]
        assert (
            "step 12" in stopped and "steps skipped before: 2" in stopped and skipped == "no error"
        )


@pytest.mark.slow
def test_one_killed_the_other_says_so_and_both_go_on(tmp_path):
    statuses, words = in_two("killed", tmp_path)
    assert statuses == [0, 9], words
    said = (tmp_path / "0.txt").read_text()
    assert (
        "process 0 of 2 waits for others in vain" in said
        and "the last good checkpoint is" in said
        and "step-000000012" in said
    )
    assert in_two("finished", tmp_path)[0] == [0, 0]
    (tmp_path / "anew").mkdir()
    assert in_two("finished", tmp_path / "anew")[0] == [0, 0]
    resumed, whole = (
        torch.load(folder / "1.pt", weights_only=True) for folder in (tmp_path, tmp_path / "anew")
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_torchrun_gives_the_accuracy_of_one_process(tmp_path):
    words = [
        "-m",
        "pyro_bmr",
        "fit",
        "--data",
        "digits",
        "--model",
        "mlp:50",
        "--epochs",
        "40",
        "--reduce-to",
        "gaussian:0",
        "--quiet",
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    scores = {}
    for name, start in (("one", [sys.executable]), ("two", torchrun)):
        for seed in ("0", "1"):
            command = [*start, *words, "--seed", seed, "--out", str(tmp_path / name / seed)]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=False,
            )
            assert done.returncode == 0, done.stderr
            scores[name, seed] = float(done.stdout.split("accuracy ")[1].split(",")[0])
            assert (
                done.stdout.count("the run is in") == 1
                and (tmp_path / name / seed / "posterior.safetensors").exists()
            )
    assert (
        min(scores.values()) > 0.93
        and abs(sum(v if k[0] == "one" else -v for k, v in scores.items())) / 2 < 0.02
    )
