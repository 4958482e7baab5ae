"""PyTorch's own transformer layers: what they compute with in eval mode is what they were trained with."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import titan_fp8
from tests.tolerances import sqnr_db
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.mx_linear import MXFP8Linear

D = 32
FLOAT8 = partial(titan_fp8.convert_to_float8_training, emulate=True)
MX = partial(titan_fp8.convert_to_mxfp8_training, emulate=True)
CONVERSIONS = pytest.mark.parametrize("convert", [FLOAT8, MX], ids=["float8", "MXFP8"])
EQUAL_DB = 60
"""PyTorch's attention has a fused function of its own in eval mode, whose last bits may move a code of what it gives;
a feed-forward in high precision is 30 dB from one in 8 bits."""


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(D, 4, 2 * D, dropout=0.0, batch_first=True, **options)


def without_gradients(model: nn.Module, *args: Any, training: bool, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model.train(training)(*args, **kwargs)


@CONVERSIONS
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
def test_a_converted_encoder_layer_computes_in_eval_mode_what_it_does_in_training(convert: Any, options: Any) -> None:
    layer, x = encoder_layer(**options), torch.randn(2, 16, D)
    plain = copy.deepcopy(layer)
    convert(layer, filter_fqns=["out_proj"])
    trained = without_gradients(layer, x, training=True)
    assert sqnr_db(trained, without_gradients(layer, x, training=False)) > EQUAL_DB
    assert sqnr_db(trained, without_gradients(plain, x, training=False)) < EQUAL_DB
    copied = copy.deepcopy(layer)
    assert sqnr_db(trained, without_gradients(copied, x, training=False)) > EQUAL_DB


@CONVERSIONS
@pytest.mark.parametrize("converted_first", [False, True])
def test_a_converted_encoder_does_so_with_padding_too(convert: Any, converted_first: bool) -> None:
    layer, x = encoder_layer(), torch.randn(2, 16, D)
    if converted_first:
        convert(layer, filter_fqns=["out_proj"])
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not converted_first)
    if not converted_first:
        convert(encoder, filter_fqns=["out_proj"])
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 11:] = True
    trained, evaluated = (
        without_gradients(encoder, x, src_key_padding_mask=padding, training=training) for training in (True, False)
    )
    assert sqnr_db(trained[~padding], evaluated[~padding]) > EQUAL_DB


def test_layers_of_which_nothing_is_converted_keep_their_fast_path() -> None:
    model = nn.ModuleDict({"one": encoder_layer(), "other": encoder_layer()})
    FLOAT8(model, filter_fqns=["out_proj", "other"])
    assert (model["one"].activation_relu_or_gelu, model["other"].activation_relu_or_gelu) == (0, 1)


class CallsIt(nn.MultiheadAttention):
    """Attention that calls its linear."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.out_proj(x)


@CONVERSIONS
@pytest.mark.parametrize("replaced", [False, True])
def test_the_linear_that_attention_reads_by_its_weight_is_refused(convert: Any, replaced: bool) -> None:
    layer = encoder_layer()
    if replaced:
        layer.self_attn.out_proj = nn.Linear(D, D)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        titan_fp8.ConversionError,
        match=r"^self_attn.out_proj: the nn.MultiheadAttention around it .* never calls it; add it to filter_fqns$",
    ):
        convert(layer)
    assert not any(isinstance(module, Float8Linear | MXFP8Linear) for module in layer.modules())


@CONVERSIONS
def test_the_linear_of_attention_with_a_forward_pass_of_its_own_is_converted(convert: Any) -> None:
    attention = CallsIt(D, 4)
    attention.out_proj = nn.Linear(D, D)  # pyright: ignore[reportAttributeAccessIssue]
    report = convert(attention)
    assert [row.fqn for row in report.converted] == ["out_proj"]
