#!/usr/bin/env bash
# torch 2.13.0: torch.export reads a module with a buffer or a layer named `graph`, `code` or `meta`,
# but its program can be neither saved, run, decomposed nor written as ONNX.
#
# nn.Module accepts such names, the network runs, and torch.export.export succeeds. Then
# ExportedProgram.module(), run_decompositions(), torch.export.save and torch.onnx.export(dynamo=True)
# raise KeyError "attribute 'graph' already exists" (a buffer or parameter), or RuntimeError "Node
# graph_weight target graph.weight references nonexistent attribute weight of graph" (a layer). One
# would expect a name to be escaped, or refused by export. A graph network with an adjacency matrix
# or a graph convolution under the name `graph` has the problem. The same network inside another
# module exports and runs.
#
# Seen for each of the names: module() fails for the buffer and for the layer, with the errors above,
# and works for the name `adjacency` and for a network inside another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import torch
from torch import nn


class WithBuffer(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name, self.layer = name, nn.Linear(3, 3)
        self.register_buffer(name, torch.eye(3))

    def forward(self, x):
        return self.layer(x) @ getattr(self, self.name)


class WithLayer(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        setattr(self, name, nn.Linear(3, 3))

    def forward(self, x):
        return getattr(self, self.name)(x).relu()


def error(net):
    x = torch.randn(2, 3)
    program = torch.export.export(net, (x,))
    try:
        torch.testing.assert_close(program.module()(x), net(x))
    except (KeyError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


for name in ("adjacency", "graph", "code", "meta"):
    found = [error(kind(name)) for kind in (WithBuffer, WithLayer)]
    print(name, found, error(nn.Sequential(WithBuffer(name))))
    assert not error(nn.Sequential(WithBuffer(name))), "inside another module it fails too"
    if name == "adjacency":
        assert found == ["", ""], "an ordinary name fails"
    else:
        assert "already exists" in found[0] and "nonexistent" in found[1], "it works now"
PY
"$folder/venv/bin/python" "$folder/check.py"
