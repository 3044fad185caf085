"""The loaders of a deployed network, as the text of a Python file that needs torch alone.

Owns `python_file` and `loaders_source`. The class of the network is written in `network_source.py`,
which is next.
"""

from __future__ import annotations

from collections.abc import Iterable


def python_file(title: str, version: str, code: str, imports: Iterable[str] = ()) -> str:
    """The text of the file: a heading, `code` with the class of the network, and the loaders."""
    lines = "".join(f"\n{line}" for line in sorted(imports))
    head = _HEAD.format(title=title, version=version, imports=lines)
    return head + code + "\n" + _LOADERS


def loaders_source(reason: str, title: str, version: str) -> str:
    """The text of the file with the loaders alone.

    It is for a network that cannot be written as Python, for this `reason`.
    """
    plain = reason.translate({ord(c): "'" for c in '"\\'})
    return python_file(title, version, _NO_CLASS.replace("{reason}", plain))


_HEAD = '''"""{title}

Written by pyro_bmr {version}; it needs torch and nothing else. `net = load()` gives the network,
ready to predict.
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn{imports}

HERE = Path(__file__).parent


'''

_LOADERS = '''
def load(file="model.safetensors"):
    """The network with the weights of a .safetensors file, such as model-half.safetensors."""
    return with_weights(read(file))


def with_weights(weights):
    net = Network()
    net.load_state_dict(weights, assign=True)
    return net.eval()


def load_state_dict(file="state_dict.pt"):
    """The network with the weights of a state_dict."""
    check(file, (HERE / file).read_bytes())
    return with_weights(torch.load(HERE / file, weights_only=True))


def load_program(file="model.pt2"):
    """The exported program; it does not need the class above."""
    check(file, (HERE / file).read_bytes())
    return torch.export.load(HERE / file).module()


def load_onnx(file="model.onnx"):
    """The network run by onnxruntime, which has to be installed: tensors in, tensors out.

    Inputs are given in order, by name or in a dict. Several outputs are a tuple in their order.
    """
    import onnxruntime

    check(file, (HERE / file).read_bytes())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    cpu = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(HERE / file), options, providers=cpu)
    names = [part.name for part in session.get_inputs()]

    def run(*given, **named):
        parts = [t for x in given for t in (x.values() if isinstance(x, dict) else [x])]
        parts += [t for name, t in named.items() if name not in names]
        known = {name: t for name, t in named.items() if name in names}
        known |= dict(zip([name for name in names if name not in known], parts))
        numbers = {name: known[name].cpu().numpy() for name in names}
        outputs = [torch.from_numpy(y) for y in session.run(None, numbers)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def load_prune(file="prune.safetensors"):
    """The network with weights and masks as torch.nn.utils.prune has them.

    It can be pruned further, or trained with the masks in force.
    """
    from torch.nn.utils import prune

    net, tensors = Network(), read(file)
    for name in [key.removesuffix("_mask") for key in tensors if key.endswith("_mask")]:
        path, _, parameter = name.rpartition(".")
        prune.identity(net.get_submodule(path), parameter)
    net.load_state_dict(tensors, assign=True)
    return net.eval()


class SparseLinear(nn.Module):
    """y = W x + b with W in compressed sparse rows."""

    def __init__(self, shape, crow, col, values, bias):
        super().__init__()
        self.shape = shape
        for name, tensor in {"crow": crow, "col": col, "values": values, "bias": bias}.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        weight = torch.sparse_csr_tensor(
            self.crow, self.col, self.values, self.shape, check_invariants=False
        )
        y = (weight @ x.reshape(-1, self.shape[1]).T).T.reshape(*x.shape[:-1], self.shape[0])
        return y if self.bias is None else y + self.bias


def load_csr(file="csr.safetensors"):
    """The network with its sparsest Linear layers in compressed sparse rows."""
    tensors = read(file)
    sparse = [key.removesuffix(".crow") for key in tensors if key.endswith(".crow")]
    net = Network()
    for path in sparse:
        crow, col, values = (tensors.pop(f"{path}.{part}") for part in ("crow", "col", "values"))
        old = net.get_submodule(path)
        shape, bias = (old.out_features, old.in_features), tensors.get(f"{path}.bias")
        layer = SparseLinear(shape, crow, col, values, bias)
        net.set_submodule(path, layer)
        tensors |= {f"{path}.{name}": buffer for name, buffer in layer.named_buffers()}
    net.load_state_dict(tensors, assign=True)
    return net.eval()


def load_ensemble(file="ensemble.safetensors"):
    """Networks with draws of the posterior for weights.

    Average their probabilities; their spread is the uncertainty.
    """
    stacked = read(file)
    draws = range(len(next(iter(stacked.values()))))
    return [with_weights({key: t[k].clone() for key, t in stacked.items()}) for k in draws]


def read(file):
    """The tensors of a safetensors file: eight bytes of length, a header in JSON, the numbers."""
    raw = (HERE / file).read_bytes()
    check(file, raw)
    size = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != len(raw) - 8 - size:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file} is truncated or no safetensors file") from None
    kinds = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "C64": torch.complex64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
        "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        kind = kinds[entry["dtype"]]
        numbers = bytearray(raw[start:stop])
        flat = torch.frombuffer(numbers, dtype=kind) if numbers else torch.empty(0, dtype=kind)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def check(file, raw):
    """Raises a ValueError unless the file is the one that report.json was written for."""
    report = HERE / "report.json"
    files = json.loads(report.read_text()).get("files", {}) if report.exists() else {}
    if file in files and hashlib.sha256(raw).hexdigest() != files[file]["sha256"]:
        raise ValueError(
            f"{file} is not the file that was written: its sha256 differs from that in "
            "report.json; copy it again"
        )
'''


_NO_CLASS = '''def Network():
    """Not here: {reason}.

    `load_program()` and `load_onnx()` need no class, `read("model.safetensors")` gives the weights.
    The other loaders fill your own class:
    `network.Network = YourNetwork; net = network.load()`.
    """
    raise ValueError(
        "the class of the network is not in this file; set network.Network to it, or use "
        "load_program() or read(file)"
    )
'''
