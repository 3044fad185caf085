#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts 0 FLOPs for an attention layer in evaluation mode without
# gradients.
#
# Without gradients, nn.TransformerEncoderLayer and nn.MultiheadAttention run as one fused operation
# each, which the counter does not know. So it misses the products of the attention and the linear
# layers too. With gradients enabled, it counts the same layer, input and mode. A table of costs is
# usually made with net.eval() under no_grad, and then says that the encoder is free. With the fused
# path off, torch.backends.mha.set_fastpath_enabled(False), the layer is counted.
#
# Seen with a layer of 16 channels, 4 heads and 32 hidden units on 2 x 7 tokens: 57344 FLOPs with
# gradients, 0 without, and 57344 without gradients and with the path off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode

layer, x = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 7, 16)


def flops() -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


with_gradients = flops()
with torch.no_grad():
    without = flops()
    torch.backends.mha.set_fastpath_enabled(False)
    unfused = flops()
print(f"with gradients {with_gradients}, without {without}, without and unfused {unfused}")
assert with_gradients == unfused > 0, "the counts with and without the fused path differ"
assert without == 0, "the fused path is counted now"
PY
"$folder/venv/bin/python" "$folder/check.py"
