"""Tests in several processes of one group: starting them, and what their script does at its end."""

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch

import pyro_bmr as bmr

ROOT = Path(__file__).parents[1]


def run_group(script, processes, *arguments, timeout=600):
    """Runs a script that ends with `fork_group`; the exit statuses of the processes, and what they
    wrote to the standard error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    last = done.stdout.splitlines()[-1:] or [""]  # before it is what the processes printed
    return [int(status) for status in last[0].split()], done.stdout + done.stderr


def fork_group(main, *arguments):
    """Calls `main(rank, *arguments)` in WORLD_SIZE processes and prints their exit statuses. The
    libraries are imported once; the processes are forked before anything is computed.
    """
    import pandas  # noqa: F401  # of the history of each fit

    # the first optimiser imports what torch leaves for later
    bmr.adam(1e-3)([torch.zeros(1, requires_grad=True)])
    every = [_forked(main, rank, arguments) for rank in range(int(os.environ["WORLD_SIZE"]))]
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in every))


def _forked(main, rank, arguments):
    """The id of a process that runs `main` as one of the group."""
    child = os.fork()
    if child:
        return child
    os.environ["RANK"] = str(rank)
    status = 1
    try:
        main(rank, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)
