"""Networks of other libraries, in small configurations with random weights."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.data.inputs import called
from pyro_bmr.shrinking import masked
from pyro_bmr.shrinking.verification import difference, leaves

TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(TOKENS)
PADDING[:, 5:] = 0
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48}

# name → (class, configuration, its arguments, inputs)
TRANSFORMERS = {
    "bert": ("BertModel", "BertConfig", WIDE, {"input_ids": TOKENS, "attention_mask": PADDING}),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "use_cache": False},
        {"input_ids": TOKENS},
    ),
    "llama": (
        "LlamaForCausalLM", "LlamaConfig",
        {**WIDE, "num_key_value_heads": 2, "use_cache": False}, {"input_ids": TOKENS},
    ),
    "vit": (
        "ViTModel", "ViTConfig", {**WIDE, "image_size": 16, "patch_size": 4},
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    ),
    "distilbert": (
        "DistilBertModel", "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, {"input_ids": TOKENS},
    ),
    "t5": (
        "T5EncoderModel", "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        {"input_ids": TOKENS},
    ),
}  # fmt: skip


def filters_and_units(net, pruned):
    """Masks of output units, with their biases, of all layers."""
    generator, masks = torch.Generator().manual_seed(1), {}
    for path, layer in net.named_modules():
        turned = type(layer).__name__ == "Conv1D"  # of transformers: inputs × outputs
        if turned or isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            axis = 1 if turned else 0
            kept = torch.rand(layer.weight.shape[axis], generator=generator) >= pruned
            shape = [-1 if k == axis else 1 for k in range(layer.weight.ndim)]
            masks[f"{path}.weight"] = kept.view(shape).expand(layer.weight.shape).clone()
            if layer.bias is not None:
                masks[f"{path}.bias"] = kept
    return masks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    kind, config, sizes, inputs = TRANSFORMERS[name]
    torch.manual_seed(0)
    vocabulary = {} if "pixel_values" in inputs else {"vocab_size": 50}
    net = getattr(transformers, kind)(getattr(transformers, config)(**sizes, **vocabulary)).eval()
    masks = filters_and_units(net, 0.3)
    plan = bmr.shrinking.shrink_plan(net, masks, inputs)
    with torch.no_grad():
        want, got = (leaves(called(m, inputs)) for m in (masked(net, masks), plan.apply()))
    error, size = difference(want, got)
    assert error <= 1e-5 * max(size, 1)
    before, after = plan.parameters
    assert after < 0.95 * before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "llama", "distilbert"])
def test_from_pretrained_reads_a_smaller_transformer(name, tmp_path):
    """With as many units in each block, and one of two groups of heads where heads can be told."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    kind, config, sizes, inputs = TRANSFORMERS[name]
    cached = {"use_cache": True} if "use_cache" in sizes else {}
    torch.manual_seed(0)
    configuration = getattr(transformers, config)(**{**sizes, **cached, "vocab_size": 50})
    net = getattr(transformers, kind)(configuration).eval()
    masks = {}
    for path, parameter in net.named_parameters():
        if parameter.shape[0] == 48:  # units, of both layers of a gate
            units = torch.arange(48) % 3 > 0
            masks[path] = units.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)
        if path.endswith("o_proj.weight"):
            masks[path] = (torch.arange(32) < 16).expand(parameter.shape)
    plan = bmr.shrinking.shrink_plan(net, masks, inputs)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if name == "llama" else {}
    units = "hidden_dim" if name == "distilbert" else "intermediate_size"
    assert plan.own_class and plan.config == {units: 32, **heads}
    plan.apply().save_pretrained(tmp_path)
    again = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want, got = (leaves(called(m, inputs)) for m in (masked(net, masks), again))
    error, size = difference(want, got)
    assert error <= 1e-5 * max(size, 1)
