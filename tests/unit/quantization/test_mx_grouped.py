"""Experts in MXFP8: each computes, in every product, what blocks of its own rows and weights stand for."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import MX_GROUPED_SQNR_DB, sqnr_db
from tests.unit.quantization.test_ops import CountCalls
from titan_fp8.kernels import mx
from titan_fp8.quantization import mx_grouped_ops as ops
from titan_fp8.quantization.mx_grouped import MXGroupedConfig, mx_grouped_feed_forward
from titan_fp8.quantization.mx_recipes import GROUPED_RECIPE

K, H, BEHIND = 64, 96, 64
MODE = GROUPED_RECIPE.mode
EMULATED = MXGroupedConfig(MODE, emulate=True)
SIZES = {
    "even": [32, 32, 32],
    "one has all": [0, 96, 0],
    "empty first, between and last": [0, 32, 0, 64, 0],
    "one expert": [64],
    "none": [0, 0],
}
"""Rows of each expert; in the tests there are 64 more behind them."""
LAYOUTS = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """x and weights of other magnitudes for each expert, ends, and the gradient of the output."""
    experts, rows = len(sizes), sum(sizes) + BEHIND
    leaves = {"x": random(rows, K, seed=1, dtype=dtype)}
    for seed, (name, shape) in enumerate({"w1": (H, K), "w3": (H, K), "w2": (K, H)}.items(), 3):
        leaves[name] = random(experts, *shape, seed=seed) * random(experts, 1, 1, seed=9).exp() / 8
    ends = torch.tensor(list(accumulate(sizes)), dtype=torch.int32)
    return leaves, ends, random(rows, K, seed=2, dtype=dtype)


def run(leaves: dict[str, Tensor], ends: Tensor, grad: Tensor, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The output and every gradient by name, None of what is frozen."""
    leaves = {name: t.detach().clone().requires_grad_(name not in frozen) for name, t in leaves.items()}
    x, *weights = leaves.values()
    output = mx_grouped_feed_forward(x, weights, ends, EMULATED)
    output.backward(grad)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        yield expert, slice(begin, end)


def values(t: Tensor, dim: int) -> Tensor:
    """What t is in MXFP8 by blocks along a dimension, in fp32."""
    return mx.from_mx(*mx.to_mx(t.contiguous(), scaling_mode=MODE, dim=dim), torch.float32)


def one_expert(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The seven products of one expert, each of its operands in blocks along what it sums over."""
    dtype = x.dtype
    gate, up = ((values(x, 1) @ values(w, 1).t()).to(dtype) for w in (w1, w3))
    hidden = (F.silu(gate.float()) * up.float()).to(dtype)
    of_hidden = (values(grad, 1) @ values(w2, 0)).to(dtype)
    of_gate = torch.ops.aten.silu_backward(of_hidden.float() * up.float(), gate.float()).to(dtype)
    of_up = (of_hidden.float() * F.silu(gate.float())).to(dtype)
    parts = [(values(g, 1) @ values(w, 0)).to(dtype) for g, w in ((of_gate, w1), (of_up, w3))]
    return {
        "output": (values(hidden, 1) @ values(w2, 1).t()).to(dtype),
        "x": parts[0] + parts[1],
        "w1": values(of_gate, 0).t() @ values(x, 0),
        "w3": values(of_up, 0).t() @ values(x, 0),
        "w2": values(grad, 0).t() @ values(hidden, 0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@LAYOUTS
def test_each_expert_computes_as_if_it_were_alone(sizes: list[int], dtype: torch.dtype) -> None:
    leaves, ends, grad = inputs(sizes, dtype)
    result = run(leaves, ends, grad)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    for expert, rows in groups(ends):
        if rows.start == rows.stop:
            assert not any(result[name][expert].any() for name in ("w1", "w3", "w2"))
            continue
        weights = [leaves[name][expert] for name in ("w1", "w3", "w2")]
        for name, expected in one_expert(leaves["x"][rows], *weights, grad[rows]).items():
            actual = result[name][rows] if name in ("output", "x") else result[name][expert]
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                actual.float(), expected.float(), rtol=2 * rounding, atol=2 * rounding * scale, msg=f"{name} {expert}"
            )


def test_experts_are_near_those_in_fp64() -> None:
    leaves, ends, grad = inputs([64, 32, 0, 128])
    here = int(ends[-1])
    result = run(leaves, ends, grad)
    result["output"], result["x"] = result["output"][:here], result["x"][:here]
    exact = {name: t.double().requires_grad_() for name, t in leaves.items()}
    outputs = []
    for expert, rows in groups(ends):
        x, (w1, w3, w2) = exact["x"][rows], (exact[name][expert] for name in ("w1", "w3", "w2"))
        outputs.append((F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t())
        outputs[-1].backward(grad[rows].double())
    expected: dict[str, Any] = {"output": torch.cat(outputs).detach(), **{n: t.grad for n, t in exact.items()}}
    expected["x"] = expected["x"][:here]
    for name, minimum in asdict(MX_GROUPED_SQNR_DB).items():
        assert sqnr_db(expected[name], result[name]) > minimum, name


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_what_is_behind_the_last_group_reaches_nothing(garbage: float) -> None:
    leaves, ends, grad = inputs([32, 0, 64])
    expected, here = run(leaves, ends, grad), int(ends[-1])
    leaves["x"][here:], grad[here:] = garbage, garbage
    result = run(leaves, ends, grad)
    for name, value in expected.items():
        rows = slice(here) if name in ("output", "x") else slice(None)
        assert torch.equal(result[name][rows], value[rows]), name


def test_gradients_beyond_the_range_of_fp16_are_kept_where_activations_are_in_fp16() -> None:
    leaves = {"x": torch.ones(64, K, dtype=torch.float16)}
    leaves |= {name: torch.full((1, H, K), 8.0 / K) for name in ("w1", "w3")} | {"w2": torch.full((1, K, H), 2.0**-12)}
    grad = torch.full((64, K), 1024.0, dtype=torch.float16)
    result = run(leaves, torch.tensor([64], dtype=torch.int32), grad)
    expected = torch.full((1, K, H), 64 * 1024 * 64.0)  # silu(8) is 7.997, which 8 bits cannot tell from 8
    torch.testing.assert_close(result["w2"], expected, rtol=2**-7, atol=0)


def test_a_bad_row_spoils_its_own_expert_alone() -> None:
    leaves, ends, grad = inputs([32, 32, 64])
    leaves["x"][40, 3] = torch.nan
    result = run(leaves, ends, grad)
    bad = result["output"].isnan().any(1)[: int(ends[-1])].nonzero().flatten()
    assert bad.tolist() == [40]
    for name in ("w1", "w3", "w2"):
        assert result[name].isnan().flatten(1).any(1).tolist() == [False, True, False], name


@pytest.mark.parametrize("frozen", [("x",), ("w1",), ("w1", "w3", "w2"), ("w2", "x")], ids=" ".join)
def test_only_what_autograd_asks_for_is_computed(frozen: tuple[str, ...]) -> None:
    leaves, ends, grad = inputs([32, 64])
    expected, result = run(leaves, ends, grad), run(leaves, ends, grad, frozen)
    for name, value in result.items():
        if name in frozen:
            assert value is None
        else:
            here = slice(int(ends[-1])) if name in ("output", "x") else slice(None)
            assert torch.equal(value[here], expected[name][here]), name


def test_compiled_experts_compute_the_same() -> None:
    torch._dynamo.reset()
    leaves, ends, grad = inputs([32, 0, 96], torch.bfloat16)
    expected = run(leaves, ends, grad)
    mine = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}

    @torch.compile(fullgraph=True)
    def call(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, ends: Tensor) -> Tensor:
        return mx_grouped_feed_forward(x, (w1, w3, w2), ends, EMULATED)

    output = call(*mine.values(), ends)
    output.backward(grad)
    # But for exponentials, in the last bit of fp32.
    here = int(ends[-1])
    assert sqnr_db(expected["output"][:here], output[:here].detach()) > 50
    for name in ("w1", "w3", "w2"):
        assert sqnr_db(expected[name], mine[name].grad) > 50, name  # pyright: ignore[reportArgumentType]


def up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def checked_product(a: Tensor, b: Tensor, scale_a: Tensor, *recipe_and_scale: Any, **options: Any) -> Tensor:
    """What PyTorch's `_scaled_grouped_mm_v2` checks on a Blackwell GPU (GroupedBlas.cpp): operands and their strides,
    the groups' ends, scales (`_check_scales_blocked`); and beyond that, that scales are no larger than they need be."""
    recipe_a, scale_b, recipe_b = recipe_and_scale
    assert recipe_a == recipe_b == torch.nn.functional.ScalingType.BlockWise1x32
    assert options["swizzle_a"] == options["swizzle_b"] == torch.nn.functional.SwizzleType.SWIZZLE_32_4_4
    assert options["offs"].dtype == torch.int32
    assert options["offs"].dim() == 1
    assert options["output_dtype"] == torch.bfloat16
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert scale_a.dtype == scale_b.dtype == torch.float8_e8m0fnu
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    assert a.stride(-1) == 1, "the left operand has rows one after the other"
    assert b.stride(-2) == 1, "the right operand has columns one after the other"
    assert (a.dim(), b.dim()) in ((2, 2), (2, 3))
    assert a.shape[-1] == b.shape[-2], "they sum over as many"
    assert not any(size % 16 for size in (a.shape[-1], *b.shape[-2:])), "sizes are multiples of 16"
    assert not any(stride % 16 for stride in (a.stride(0), b.stride(-1))), "rows begin at multiples of 16 bytes"
    assert not any(each.data_ptr() % 16 for each in (a, b))
    experts = options["offs"].shape[0]
    if b.dim() == 3:
        assert b.shape[0] == experts
        assert scale_a.dim() == 2
        assert scale_a.shape[0] >= a.shape[0]
        assert scale_a.shape[1] == up_to(a.shape[1] // 32, 4)
        assert scale_b.shape == (experts, up_to(b.shape[2], 128) * up_to(b.shape[1] // 32, 4))
        return a.new_empty((a.shape[0], b.shape[2]), dtype=torch.bfloat16)
    assert (scale_a.shape[0], scale_b.shape[0]) == (up_to(a.shape[0], 128), up_to(b.shape[1], 128))
    assert scale_a.shape[1] == scale_b.shape[1] >= a.shape[1] // 32
    return a.new_empty((experts, a.shape[0], b.shape[1]), dtype=torch.bfloat16)


def test_the_native_products_are_called_as_their_operator_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(ops, "scaled_grouped_mm", lambda *a, **k: called.append(1) or checked_product(*a, **k))
    leaves, ends, grad = inputs([32, 0, 64], torch.bfloat16)
    x, *weights = (tensor.requires_grad_() for tensor in leaves.values())
    output = mx_grouped_feed_forward(x, weights, ends, MXGroupedConfig(MODE))
    assert (output.shape, output.dtype, len(called)) == (x.shape, x.dtype, 3)
    output.backward(grad)
    assert len(called) == 9
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in leaves.values())


@LAYOUTS
def test_codes_and_scales_of_the_native_products_are_those_that_are_emulated(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products of blocks on a CPU which, as those of a GPU, write nothing where an expert has no rows."""

    def product(a: Tensor, b: Tensor, scale_a: Tensor, _: Any, scale_b: Tensor, *__: Any, **options: Any) -> Tensor:
        ends = options["offs"]
        if b.dim() == 3:
            weights = b.transpose(1, 2)
            n, k = weights.shape[1:]
            x = mx.from_mx(mx.unswizzle_row_groups(scale_a, ends, a.shape[0], k // 32), a, torch.float32)
            w = mx.from_mx(mx.unswizzle(scale_b, n, k // 32), weights.contiguous(), torch.float32)
            return ops.multiply_rows(x, w.transpose(1, 2), ends, torch.bfloat16)
        operands = [
            mx.from_mx(
                mx.unswizzle_column_groups(scale, ends, codes.shape[0], codes.shape[1] // 32), codes, torch.float32
            )
            for codes, scale in ((a, scale_a), (b.t(), scale_b))
        ]
        result = ops.multiply_columns(operands[0].t(), operands[1].t(), ends, torch.bfloat16)
        result[ends.diff(prepend=ends.new_zeros(1)) == 0] = torch.nan
        return result

    monkeypatch.setattr(ops, "scaled_grouped_mm", product)
    leaves, ends, grad = inputs(sizes, torch.bfloat16)
    results = []
    for emulate in (True, False):
        x, *weights = mine = [tensor.detach().clone().requires_grad_() for tensor in leaves.values()]
        output = mx_grouped_feed_forward(x, weights, ends, MXGroupedConfig(MODE, emulate))
        output.backward(grad)
        results.append([output.detach(), *(tensor.grad for tensor in mine)])
    here = int(ends[-1])
    for number, (native, emulated) in enumerate(zip(results[1], results[0], strict=True)):
        rows = slice(here) if number < 2 else slice(None)
        assert torch.equal(native[rows], emulated[rows]), number  # pyright: ignore[reportOptionalSubscript]


def test_with_frozen_weights_nothing_is_cast_along_the_rows() -> None:
    leaves, ends, grad = inputs([32, 64])
    columns = {}
    for frozen in ((), ("w1", "w3", "w2"), ("x", "w1", "w3")):
        with CountCalls() as counted:
            run(leaves, ends, grad, frozen)
        columns[frozen] = counted.calls[ops.values], counted.calls[ops.column_values]
    assert columns == {(): (3, 3), ("w1", "w3", "w2"): (0, 0), ("x", "w1", "w3"): (0, 2)}


@LAYOUTS
def test_operators_give_what_the_compiler_is_told_that_they_do(sizes: list[int]) -> None:
    leaves, ends, _ = inputs(sizes)
    x, w = leaves["x"], leaves["w1"]
    gate = random(x.shape[0], H, seed=5)
    for op, arguments in (
        (ops.values, (x, ends, MODE)),
        (ops.row_values, (x, ends, MODE)),
        (ops.column_values, (x, ends, MODE)),
        (ops.weight_values, (w, MODE, True)),
        (ops.weight_values, (w, MODE, False)),
        (ops.multiply_rows, (x, w.transpose(1, 2), ends, torch.bfloat16)),
        (ops.multiply_columns, (gate, x, ends, torch.float32)),
        (ops.group_rows, (x, ends, MODE)),
        (ops.group_columns, (x, ends, MODE)),
        (ops.group_both, (x, ends, MODE)),
        (ops.experts, (w, MODE, True)),
        (ops.experts, (w, MODE, False)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
