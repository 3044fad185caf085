#!/usr/bin/env bash
# torch 2.13.0: after a restart by `torchrun --max-restarts`, a gloo group may read the addresses of
# the killed processes, and fail to connect.
#
# With the default rendezvous (c10d, --standalone) torchrun keeps one TCPStore for all restarts, and
# init_process_group() uses the same keys in it each time, in spite of the comment in
# torch/distributed/rendezvous.py, "We create a new TCPStore for every retry so no need to add prefix
# for each attempt". A process that comes to its group before another one has overwritten its
# address reads the old one: "Connection refused" after four seconds, and the restart is used up.
# One would expect each restart to have a store, or keys, of its own.
#
# Seen: process 0 dies once; process 1 of the next start is two seconds late, and process 0 is
# refused. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or with a PrefixStore by
# TORCHELASTIC_RESTART_COUNT, it connects.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/worker.py" <<'PY'
import os
import sys
import time

import torch.distributed as dist

rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if rank == 1 and start > 0:
    time.sleep(2)
try:
    if sys.argv[1] == "prefix":
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start {start}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group("gloo")
except RuntimeError as error:
    if rank == 0:
        print("start", start, "refused" if "refused" in str(error) else error, flush=True)
    raise
dist.barrier()
if start == 0:
    os._exit(9) if rank == 0 else time.sleep(60)
if rank == 0:
    print("start", start, "connected", flush=True)
PY
run() { OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --standalone \
    --nproc-per-node 2 --max-restarts 1 "$folder/worker.py" "$1" 2> "$folder/errors" || true; }
usual=$(run usual)
prefix=$(run prefix)
apart=$(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 run usual)
echo "as it is: $usual; with a prefix: $prefix; with a store a restart: $apart"
test "$usual" = "start 1 refused" && test "$prefix" = "start 1 connected" \
    && test "$apart" = "start 1 connected"
