"""A tiny decoder, and compilers of tests, for the tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.moe import Gate
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import MX_RECIPES
from titan_fp8.quantization.recipes import get_recipe


@pytest.fixture
def tiny_decoder() -> Callable[..., Decoder]:
    """`tiny_decoder(n_layers=3, recipe=None, **dims)` -> a decoder with initial weights, its blocks quantized."""
    return _build


@pytest.fixture
def register_backend() -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """`register_backend(name, backend)` makes `backend` one of torch.compile's for the time of a test."""
    names: list[str] = []

    def register(name: str, backend: Callable[..., Any]) -> None:
        torch._dynamo.reset()
        torch._dynamo.register_backend(backend, name=name)
        names.append(name)

    yield register
    registry = torch._dynamo.backends.registry
    for name in names:
        registry._COMPILER_FNS.pop(name)
        registry._BACKENDS.pop(name, None)
    torch._dynamo.reset()


def _conversion(recipe: str) -> Callable[[nn.Linear], nn.Linear]:
    if recipe in MX_RECIPES:
        mx_config = MXConfig(MX_RECIPES[recipe], emulate=True)
        return lambda linear: MXFP8Linear.from_linear(linear, mx_config)
    config = Float8Config(get_recipe(recipe), emulate=True)
    return lambda linear: Float8Linear.from_linear(linear, config)


def _build(n_layers: int = 3, recipe: str | None = None, **overrides: object) -> Decoder:
    dims: dict[str, object] = {"dim": 48, "n_heads": 3, "n_kv_heads": 1, "ffn_dim": 80}
    if recipe in MX_RECIPES:
        dims |= {"dim": 96, "ffn_dim": 160}  # whole blocks
    dims |= {"vocab_size": 67, "max_seq_len": 16}
    model = Decoder(ModelDims(n_layers=n_layers, **(dims | overrides)), compute_dtype=torch.bfloat16)
    if recipe is not None:
        convert = _conversion(recipe)
        for parent in list(model.layers.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and not isinstance(child, Gate):
                    setattr(parent, name, convert(child))
    initialize(model, seed=3)
    return model
