#!/usr/bin/env bash
# torch 2.13.0 with transformers 5.23.0: an exported GPT-2 cannot be decomposed to core ATen by
# `run_decompositions()`, although torch.export accepts it and runs it right.
#
# Its attention calls scaled_dot_product_attention, a transposition, `contiguous` and a reshape. In
# the trace the strides are those of the fused kernel, so the reshape is recorded as a `view`. The
# default table decomposes the attention into products whose result has other strides, and the
# `view` fails. One would expect the decomposed program to compute the same as the exported one.
# With `run_decompositions({})` the attention stays whole, and with attn_implementation="eager" the
# default table works.
#
# Seen:
#   sdpa, default table: ValueError: Cannot view a tensor with shape ...
#   sdpa, empty table: largest difference 0
#   eager, default table: largest difference 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import torch
from transformers import GPT2Config, GPT2LMHeadModel


def difference(attention: str, table: dict | None) -> float:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 4}
    net = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation=attention)).eval()
    ids = torch.arange(8)[None].repeat(2, 1)
    program = torch.export.export(net, (ids,), {"use_cache": False})
    tables = () if table is None else (table,)
    decomposed = program.run_decompositions(*tables).module()
    with torch.no_grad():
        want, got = (f(ids, use_cache=False).logits for f in (net, decomposed))
    return float((want - got).abs().max())


try:
    difference("sdpa", None)
    raise SystemExit("the default table works now")
except ValueError as error:
    message = " ".join(str(error).split())[:38]
    print(f"sdpa, default table: ValueError: {message}")
    assert message.startswith("Cannot view a tensor with shape")
for attention, table in (("sdpa", {}), ("eager", None)):
    found = difference(attention, table)
    print(f"{attention}, {'default' if table is None else 'empty'} table: largest difference {found:.0e}")
    assert found < 1e-5
PY
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
