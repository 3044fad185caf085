#!/usr/bin/env bash
# torch 2.13.0, CPU only: torch.manual_seed formats the whole Python stack three times a call.
#
# The seed is queued for CUDA, XPU and MTIA, which this machine lacks, and each queue entry keeps
# the formatted stack of the call. The cost grows with the depth of the stack, so a seed per step,
# as in pyro.poutine.seed or in code that makes step k reproducible, is slow inside a test runner or
# a framework. Seeding the CPU generator alone, torch.default_generator.manual_seed, has none of it.
#
# Seen: 3 calls of traceback.format_stack a seed; 130 microseconds a seed at the top of a script,
# 582 under 50 frames, against 1.4 for the generator alone at both depths.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import time
import traceback

import torch

assert not (torch.cuda.is_available() or torch.xpu.is_available()), "meant for a machine with a CPU alone"
original, calls = traceback.format_stack, 0


def counted(*args, **kwargs):
    global calls
    calls += 1
    return original(*args, **kwargs)


traceback.format_stack = counted
torch.manual_seed(0)
traceback.format_stack = original


def under(frames, work):
    return work() if frames == 0 else under(frames - 1, work)


def microseconds(seed, count=300):
    start = time.process_time()
    for k in range(count):
        seed(k)
    return (time.process_time() - start) / count * 1e6


found = {
    (name, depth): under(depth, lambda: microseconds(seed))
    for name, seed in (("seed", torch.manual_seed), ("generator", torch.default_generator.manual_seed))
    for depth in (0, 50)
}
print(f"format_stack {calls} times a seed;", *(f"{n} under {d} frames {t:.1f} us;" for (n, d), t in found.items()))
assert calls == 3, "the number of formatted stacks has changed"
assert found["seed", 50] > 2 * found["seed", 0] > 10 * found["generator", 0], "the cost has changed"
PY
"$folder/venv/bin/python" "$folder/check.py"
