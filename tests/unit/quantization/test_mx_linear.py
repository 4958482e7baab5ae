"""MXFP8Linear: the three products of the codes that the format gives, in every mode of running, and the native call."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.tolerances import BIAS_GRAD_SQNR_DB, MX_SQNR_DB, sqnr_db
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.kernels import mx
from titan_fp8.quantization import mx_ops
from titan_fp8.quantization.mx_linear import MXConfig, MXFP8Linear
from titan_fp8.quantization.mx_recipes import MX_RECIPES, get_mx_recipe
from titan_fp8.runtime.deferred import DeferredWeights
from titan_fp8.runtime.errors import UserError

K, N = 64, 96
RCEIL = MX_RECIPES["mxfp8_cublas_rceil"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make(k: int = K, n: int = N, *, bias: bool = True, recipe: Any = RCEIL, **config: Any) -> MXFP8Linear:
    torch.manual_seed(0)
    return MXFP8Linear.from_linear(nn.Linear(k, n, bias=bias), MXConfig(recipe, emulate=True, **config))


def run(module: nn.Module, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Output and every gradient by name."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.backward(grad_output)
    gradients = {f"grad_{name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "grad_input": x.grad, **gradients}


def data(tokens: int, dtype: torch.dtype = torch.float32, k: int = K, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, k, generator=generator).to(dtype), torch.randn(tokens, n, generator=generator).to(dtype)


def values(t: Tensor, dim: int, mode: str) -> Tensor:
    """What t `[R, C]` is in MXFP8 by blocks along a dimension, zero-padded to whole blocks, in fp64."""
    padding = -t.shape[dim] % mx.BLOCK
    whole = nn.functional.pad(t, (0, 0, 0, padding) if dim == 0 else (0, padding))
    return mx.from_mx(*mx.to_mx(whole.contiguous(), scaling_mode=mode, dim=dim), torch.float32).double()[: t.shape[0]]


@pytest.mark.parametrize("tokens", [1, 32, 50])
@pytest.mark.parametrize("mode", mx.MODES)
@DTYPES
def test_products_are_those_of_each_operand_in_blocks_along_what_is_summed(
    mode: str, tokens: int, dtype: torch.dtype
) -> None:
    linear = make(recipe=get_mx_recipe("mxfp8_emulated", mode))
    x, grad = data(tokens, dtype)
    weight = linear.weight.detach()
    bias = linear.bias.detach()
    expected = {
        "output": values(x, 1, mode) @ values(weight, 1, mode).t() + bias.double(),
        "grad_input": values(grad, 1, mode) @ values(weight, 0, mode),
        "grad_weight": values(grad, 0, mode).t() @ values(x, 0, mode),
        "grad_bias": grad.double().sum(0),
    }
    for name, result in run(linear, x, grad).items():
        # Sums in fp32, and results in bf16 are rounded: the product, and again with the bias.
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(result.double(), expected[name], rtol=2 * rounding, atol=16 * rounding, msg=name)


@pytest.mark.parametrize(("mode", "weights"), MX_SQNR_DB)
def test_output_and_every_gradient_are_as_exact_as_the_mode_allows(mode: str, weights: str) -> None:
    linear = make(256, 128, recipe=get_mx_recipe("mxfp8_emulated", mode))
    with torch.no_grad():
        linear.weight.normal_() if weights == "normal" else linear.weight.uniform_(-(2.0**-6), 2.0**-6)
    x, grad = data(200, k=256, n=128)
    result = run(linear, x, grad)
    exact = nn.Linear(256, 128).double()
    exact.load_state_dict(linear.state_dict())
    expected = run(exact, x.double(), grad.double())
    minimum = MX_SQNR_DB[mode, weights]
    assert sqnr_db(expected["output"], result["output"]) > minimum.output
    assert sqnr_db(expected["grad_input"], result["grad_input"]) > minimum.grad_input
    assert sqnr_db(expected["grad_weight"], result["grad_weight"]) > minimum.grad_weight
    assert sqnr_db(expected["grad_bias"], result["grad_bias"]) > BIAS_GRAD_SQNR_DB


@DTYPES
def test_compiled_and_checkpointed_layers_give_the_same_bits(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    linear = make()
    x, grad = data(50, dtype)
    expected = run(linear, x, grad)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    for name, result in run(torch.compile(copy.deepcopy(linear), fullgraph=True), x, grad).items():
        assert torch.equal(result, expected[name.replace("_orig_mod.", "")]), name
    for name, result in run(Checkpointed(), x, grad).items():
        assert torch.equal(result, expected[name.replace("inner.", "")]), name


def test_leading_dimensions_and_strides_of_the_input_do_not_matter() -> None:
    linear = make()
    x, grad = data(64)
    flat = run(linear, x, grad)
    shaped = run(linear, x.view(2, 4, 8, K), grad.view(2, 4, 8, N))
    strided = run(linear, x.t().contiguous().t(), grad)
    for name, expected in flat.items():
        assert torch.equal(shaped[name].view(expected.shape), expected), name
        assert torch.equal(strided[name], expected), name
    assert shaped["output"].shape == (2, 4, 8, N)


def test_a_weights_gradient_may_be_that_of_unquantized_tensors() -> None:
    linear = make(grad_weight_in_high_precision=True)
    x, grad = data(50)
    result, plain = run(linear, x, grad), run(make(), x, grad)
    torch.testing.assert_close(result["grad_weight"], grad.t() @ x)
    assert torch.equal(result["output"], plain["output"])
    assert torch.equal(result["grad_input"], plain["grad_input"])


def test_only_what_autograd_asks_for_is_computed() -> None:
    x, grad = data(32)
    linear = make()
    expected = run(linear, x, grad)
    linear.weight.requires_grad_(False)
    frozen = run(linear, x, grad)
    assert linear.weight.grad is None
    assert torch.equal(frozen["grad_input"], expected["grad_input"])
    linear.weight.requires_grad_(True)
    linear.zero_grad()
    linear(x).backward(grad)
    assert torch.equal(linear.weight.grad, expected["grad_weight"])  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert torch.equal(linear(x), expected["output"])


def test_a_sink_gets_the_product_for_the_weights_gradient() -> None:
    x, grad = data(32)
    linear = make(bias=False)
    expected = run(linear, x, grad)["grad_weight"]
    linear.zero_grad()
    queue = DeferredWeights()
    linear.weight_sink = queue.sink_of(linear)
    linear(x).backward(grad)
    assert linear.weight.grad is None
    queue.take()()
    queue.flush()
    assert torch.equal(linear.weight.grad, expected)  # pyright: ignore[reportArgumentType]


def test_nan_reaches_what_it_takes_part_in_and_nothing_else() -> None:
    linear = make()
    x, grad = data(64)
    x[3, 5] = torch.nan
    result = run(linear, x, grad)
    assert torch.equal(result["output"].isnan().all(1), torch.arange(64) == 3)
    assert result["output"].isnan().any(1).sum() == 1
    assert torch.equal(result["grad_weight"].isnan().all(0), torch.arange(K) == 5)
    assert not result["grad_input"].isnan().any()


def test_second_derivatives_are_refused() -> None:
    x = data(32)[0].requires_grad_()
    (grad,) = torch.autograd.grad(make()(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        grad.sum().backward()


def test_sizes_that_are_no_multiple_of_a_block_are_refused() -> None:
    with pytest.raises(UserError, match=r"in_features=48 is not a multiple of 32, which mxfp8_cublas_rceil needs"):
        make(48, 64)
    with pytest.raises(UserError, match="out_features=40"):
        make(64, 40)
    for shape, given in (((4, 32), r"\[4, 32\]"), ((), r"\[\]")):
        message = rf"in_features=64 got input {given}; expected one or more dimensions, \[..., 64\]"
        with pytest.raises(ValueError, match=message):
            make()(torch.ones(shape))


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("mxfp8_cubla", None, 'did you mean "mxfp8_cublas"'),
        (None, None, "known: mxfp8_cublas, mxfp8_cublas_rceil, mxfp8_emulated"),
        ("mxfp8_emulated", "up", "expected one of floor, ceil, even, rceil"),
        ("mxfp8_cublas", "rceil", "leave scaling_mode out"),
    ],
)
def test_unknown_recipes_and_modes_are_refused(name: object, mode: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_mx_recipe(name, mode)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """How many bytes of different tensors are saved for backward."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.seen[tensor.data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.seen.values())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("high_precision", [False, True])
@pytest.mark.parametrize("tokens", [1, 32, 50])
@DTYPES
def test_codes_and_scales_of_the_native_products_are_those_that_are_emulated(
    dtype: torch.dtype, tokens: int, high_precision: bool
) -> None:
    x, grad = data(tokens, dtype)
    linear = make(grad_weight_in_high_precision=high_precision)
    expected = run(linear, x, grad)
    linear.config = replace(linear.config, emulate=False)
    for name, value in run(linear, x, grad).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("native")
def test_linears_that_read_one_tensor_share_its_codes() -> None:
    linears = [make(bias=False) for _ in range(3)]
    for linear in linears:
        linear.config = replace(linear.config, emulate=False)
    x = data(32)[0].requires_grad_()
    read = x * 1  # no leaf
    saved = SavedBytes()
    with CountCalls() as counted, saved:
        outputs = [linear(read) for linear in linears]
    assert counted.calls[mx_ops.both] == 1
    codes_and_scale = 32 * K + 128 * 4  # by columns, with the swizzled scale
    weights = 3 * N * K * 4
    assert saved.bytes == codes_and_scale + weights
    torch.stack(outputs).sum().backward()
    with CountCalls() as counted:
        read.mul_(2)
        linears[0](read)
    assert counted.calls[mx_ops.both] == 1, "what is written to is cast again"


def test_a_native_linear_refuses_tensors_that_are_on_no_such_device() -> None:
    linear = make()
    linear.config = replace(linear.config, emulate=False)
    with pytest.raises(RuntimeError, match="converted with emulate=False got tensors on cpu"):
        linear(data(32)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, linear = data(32)[0], make()
    expected = linear(x.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        result = linear(x)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("high_precision", [False, True])
def test_a_gradient_beyond_the_range_of_fp16_is_kept_where_activations_are_in_fp16(high_precision: bool) -> None:
    linear = make(bias=False, grad_weight_in_high_precision=high_precision)
    # One fp16 above 64, if it is not to be rounded to 8 bits.
    largest = 64.0625 if high_precision else 64.0
    x, grad = torch.full((32, K), largest, dtype=torch.float16), torch.full((32, N), 64.0, dtype=torch.float16)
    linear(x).backward(grad)
    assert torch.equal(linear.weight.grad, torch.full((N, K), 32 * 64 * largest))


def test_no_tokens_give_no_output_and_gradients_of_zero() -> None:
    result = run(make(), *data(0))
    assert result["output"].shape == (0, N)
    assert not result["grad_weight"].any()


def test_a_bias_may_train_alone() -> None:
    linear = make()
    linear.weight.requires_grad_(False)
    x, grad = data(32)
    linear(x).backward(grad)
    torch.testing.assert_close(linear.bias.grad, grad.sum(0))


@pytest.mark.parametrize("tokens", [32, 50, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_native_product_is_called_as_its_operator_wants(tokens: int, dtype: torch.dtype) -> None:
    """What PyTorch checks of a call on a Blackwell GPU, on fake tensors: dtypes, strides, and how many scales."""
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(tokens, 160, dtype=dtype), torch.empty(96, 160)
        codes, scale, codes_t, scale_t = mx_ops.both(x, "rceil", "triton")
        w_codes, w_scale = mx_ops.rows(weight, "rceil")
        output = mx_ops.scaled_mm(codes, w_codes, scale, w_scale, dtype)
        assert (output.shape, output.dtype) == ((tokens, 96), dtype)
        g_codes_t, g_scale_t = mx_ops.columns(output, "rceil", "triton")
        grad_weight = mx_ops.scaled_mm(g_codes_t, codes_t, g_scale_t, scale_t, torch.float32)
        assert (grad_weight.shape, grad_weight.dtype) == ((96, 160), torch.float32)
        w_codes_t, w_scale_t = mx_ops.columns(weight, "rceil", "triton")
        g_codes, g_scale = mx_ops.rows(output, "rceil")
        assert mx_ops.scaled_mm(g_codes, w_codes_t, g_scale, w_scale_t, dtype).shape == (tokens, 160)
        with pytest.raises((RuntimeError, ValueError)):
            mx_ops.scaled_mm(codes, w_codes, scale[:-1].contiguous(), w_scale, dtype)


@pytest.mark.parametrize("tokens", [32, 50])
def test_operators_give_what_the_compiler_is_told_that_they_do(tokens: int) -> None:
    x = data(tokens)[0].bfloat16()
    a = torch.ones(32, 64)
    for op, arguments in (
        (mx_ops.rows, (x, "floor")),
        (mx_ops.columns, (x, "floor", "triton")),
        (mx_ops.both, (x, "floor", "torch")),
        (mx_ops.row_values, (x, "floor")),
        (mx_ops.column_values, (x, "floor", "torch")),
        (mx_ops.values, (x, "floor", "triton")),
        (mx_ops.emulated_mm, (a, a.t().contiguous(), torch.bfloat16)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
