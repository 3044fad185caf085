#!/usr/bin/env bash
# onnxruntime 1.32.0 on x86: a block of convolutions with 46 channels takes longer than the same
# block with 96.
#
# The block is 1 x 1, depthwise 3 x 3, 1 x 1, as in MobileNet and EfficientNet. onnxruntime has fast
# kernels for layouts in blocks of 8 or 16 channels. A depthwise convolution whose number of channels
# is no multiple of the block falls back to another kernel, without a message. So a network that is
# pruned to an odd number of filters can become slower with half of the operations. One would expect
# padding to the next block.
#
# Seen on one thread of an AMD EPYC with AVX-512, 32 images of 16 x 16: 1.71 ms with 46 channels,
# 0.67 with 48, 1.27 with 96.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SHAPE = ["rows", 24, 16, 16]


def session(channels):
    shapes = {"a": (channels, 24, 1, 1), "b": (channels, 1, 3, 3), "c": (24, channels, 1, 1)}
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.1, shape).astype("float32"), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["i"]),
        helper.make_node("Conv", ["i", "b"], ["j"], group=channels, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["j"], ["k"]),
        helper.make_node("Conv", ["k", "c"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)] for name in "xy"]
    graph = helper.make_graph(nodes, "block", *ends, initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


sessions = {channels: session(channels) for channels in (46, 48, 96)}
rows = np.random.default_rng(0).normal(size=(32, *SHAPE[1:])).astype("float32")
least = dict.fromkeys(sessions, float("inf"))
for _ in range(40):
    for channels, one in sessions.items():
        one.run(None, {"x": rows})
        start = time.process_time()
        one.run(None, {"x": rows})
        least[channels] = min(least[channels], 1e3 * (time.process_time() - start))
print({channels: f"{ms:.2f} ms" for channels, ms in least.items()})
assert least[48] < least[96], "the time does not grow with the channels"
assert least[46] > least[96], "46 channels are faster than 96 now"
PY
"$folder/venv/bin/python" "$folder/check.py"
