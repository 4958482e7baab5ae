"""Values narrower and wider than queries and keys, as latent attention has them, in every kernel."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from titan_fp8.models import attention_backends
from titan_fp8.models.attention_backends import BACKENDS, Backend, attention_mask, causal_attention, kernel_widths
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.runtime.device import DeviceCapabilities
from titan_fp8.runtime.errors import UserError

CPU = torch.device("cpu")


def _heads(values: int, kv_heads: int = 4, width: int = 20) -> list[Tensor]:
    """q, k, v `[2, H or G, 33, D]` with D = `width` but for values, leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, width), (kv_heads, width), (kv_heads, values))
    return [torch.randn(2, heads, 33, width, generator=generator).requires_grad_() for heads, width in shapes]


OF_33 = torch.tensor([[0] * 9 + [1] * 24, [0] * 30 + [1] * 3])


def assert_is_the_formula(inputs: list[Tensor], backend: Backend, ids: Tensor | None, scale: float | None) -> None:
    """Output and gradients of causal attention of q, k, v, within documents if there are any."""
    q, k, v = inputs
    visible = attention_mask("math", 33, CPU, torch.zeros(2, 33, dtype=torch.int32) if ids is None else ids)
    assert isinstance(visible, Tensor)
    repeats = q.shape[1] // k.shape[1]
    products = q @ k.repeat_interleave(repeats, 1).mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    expected = products.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(repeats, 1)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    mask = attention_mask(backend, 33, CPU, ids)
    actual = causal_attention(*inputs, backend=backend, mask=mask, scale=scale)
    assert actual.shape == (2, 4, 33, v.shape[-1])
    torch.testing.assert_close(actual, expected)
    for name, gradient, reference in zip(
        "qkv", torch.autograd.grad((actual * weight).sum(), inputs), wanted, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("values", [4, 12, 20, 27, 40])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("ids", [None, OF_33], ids=["plain", "masked"])
@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_over_values_of_any_width_and_its_gradients_are_those_of_the_formula(
    backend: Backend, ids: Tensor | None, scale: float | None, values: int
) -> None:
    assert_is_the_formula(_heads(values), backend, ids, scale)


@pytest.mark.parametrize(("width", "values"), [(12, 14), (12, 10), (24, 32), (32, 24)])
@pytest.mark.parametrize("backend", ["efficient", "cudnn", "flex"])
def test_what_kernels_of_a_gpu_are_given_makes_the_output_and_gradients_of_the_formula(
    backend: Backend, width: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reference in the place of each kernel."""
    monkeypatch.setitem(attention_backends._SDPA_BACKENDS, backend, SDPBackend.MATH)

    def flex(*heads: Tensor, block_mask: Any, kernel_options: Any, **options: Any) -> Tensor:
        assert kernel_options is None, "blocks are PyTorch's choice where heads are narrow"
        assert min(x.shape[-1] for x in heads) >= 16
        return F.scaled_dot_product_attention(*heads, attn_mask=attention_mask("math", 33, CPU, OF_33), **options)

    monkeypatch.setattr(attention_backends, "flex_attention", flex)
    monkeypatch.setattr(attention_backends, "_compiled", lambda function: function)
    ids = None if backend == "cudnn" else OF_33
    for scale in (None, 0.7):
        assert_is_the_formula(_heads(values, 2, width), backend, ids, scale)


@given(st.sampled_from(BACKENDS), st.integers(1, 300), st.integers(1, 300))
def test_a_kernel_is_given_head_widths_that_it_can_do_and_none_narrower(
    backend: Backend, width: int, values: int
) -> None:
    given_width, given_values = kernel_widths(backend, width, values)
    assert given_width >= width
    assert given_values >= values
    if backend in ("math", "flash4"):
        assert (given_width, given_values) == (width, values)
    elif backend in ("flash", "cudnn"):
        assert given_width == given_values == max(width, values)
    elif backend == "efficient":
        assert given_width % 8 == given_values % 8 == 0
    else:
        assert min(given_width, given_values) >= 16
    if backend not in ("math", "flash4"):
        assert given_width >= given_values
        assert kernel_widths(backend, given_width, given_values) == (given_width, given_values)


def test_the_wider_of_keys_and_values_decides_whether_a_kernel_can_do_a_model() -> None:
    hopper = DeviceCapabilities("cuda", "NVIDIA H200", (9, 0), False, None, None, None)

    def chosen(values: int, backend: str = "auto", dtype: torch.dtype = torch.bfloat16) -> str:
        with torch.device("meta"):
            dims = ModelDims(
                dim=48,
                n_layers=1,
                n_heads=4,
                vocab_size=61,
                kv_lora_rank=24,
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=values,
            )
            return Decoder(dims, attention_backend=backend, compute_dtype=dtype, device=hopper).attention_backend

    assert [chosen(values) for values in (32, 128, 136, 256, 264)] == ["cudnn", "cudnn", "flash", "flash", "efficient"]
    assert chosen(264, dtype=torch.float32) == "efficient"
    for backend, values in (("cudnn", 136), ("flash", 264), ("flash", 28)):
        with pytest.raises(UserError, match=f'"{backend}" cannot run here.*and the model\'s is {values}'):
            chosen(values, backend)
    with pytest.raises(UserError, match=r'"flash4" cannot run here.*latent attention'):
        chosen(32, "flash4")
