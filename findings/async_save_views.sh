#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.async_save refuses a DTensor of a view that `save`
# writes.
#
# A parameter of a flat buffer is a view with an offset into its storage. A DTensor of it, on a CPU,
# is written by `save` and read back. `async_save` copies it first by copy.deepcopy, which takes a
# DTensor whose data_ptr() is not 0 for an ordinary tensor; data_ptr() of a DTensor is its offset in
# bytes. Only views that begin at the start of their storage can be saved. The same holds for the
# DefaultStager.
#
# Expected: what `save` writes, `async_save` writes.
# Seen: offset 0: both write; offset 6: `save` writes, `async_save` raises RuntimeError "Attempted to
# call copy_() on an invalid python storage."; a clone of the view is written by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import logging
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter, async_save, load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

logging.disable(logging.ERROR)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh, flat, found = init_device_mesh("cpu", (1,)), torch.arange(12.0), {}
halves = {"offset 0": flat[:6], "offset 6": flat[6:], "offset 6, cloned": flat[6:].clone()}
for name, half in halves.items():
    tensor = DTensor.from_local(half.view(2, 3), mesh, [Shard(0)])
    for how in (save, async_save):
        place = f"{sys.argv[1]}/{name} {how.__name__}"
        try:
            writing = how({"a": tensor}, storage_writer=FileSystemWriter(place))
            if how is async_save:
                writing.result()
            back = {"a": DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)])}
            load(back, checkpoint_id=place)
            assert torch.equal(back["a"].to_local(), half.view(2, 3))
            found[name, how.__name__] = "written and read back"
        except RuntimeError as error:
            found[name, how.__name__] = str(error)
        print(f"{name}, {how.__name__}: {found[name, how.__name__]}")
dist.destroy_process_group()
raised = {case: words for case, words in found.items() if words != "written and read back"}
assert list(raised) == [("offset 6", "async_save")], "other cases raise now"
assert "invalid python storage" in raised["offset 6", "async_save"]
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
