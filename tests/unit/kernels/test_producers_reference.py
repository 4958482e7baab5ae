"""The fused producers in plain PyTorch: what they compute, and where they round."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_fp8.kernels import blockwise, float8, producers
from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.kernels.producers import BLOCK, GRANULARITIES, ROW, TENSOR, Cast, reference

EPS = 1e-5
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ulps_apart(result: Tensor, expected: Tensor) -> int:
    """The largest distance in units in the last place; NaN is near NaN alone."""
    if not torch.equal(result.isnan(), expected.isnan()):
        return 1 << 30
    as_int = {2: torch.int16, 4: torch.int32}[result.element_size()]
    ordered = []
    for x in (result, expected):
        bits = x.nan_to_num(0.0, torch.inf, -torch.inf).contiguous().view(as_int).long()
        ordered.append(torch.where(bits < 0, -(bits & (1 << (8 * x.element_size() - 1)) - 1), bits))
    return int((ordered[0] - ordered[1]).abs().max())


@DTYPES
def test_a_norm_is_that_of_pytorch(dtype: torch.dtype) -> None:
    x, branch, weight = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(40, 96), (40, 96), (96,)]))
    total, rstd, output = reference.norm_output(x, branch, weight.float(), EPS)
    assert torch.equal(total, x + branch)
    assert ulps_apart(output, F.rms_norm(total, (96,), weight, EPS)) <= (2 if dtype == torch.float32 else 0)
    assert (rstd.dtype, rstd.shape) == (torch.float32, (40,))
    alone = reference.norm_output(total, None, weight, EPS)
    assert alone[0] is None
    assert torch.equal(alone[2], output)


def test_a_norm_reads_the_sum_rounded_and_its_weight_rounded() -> None:
    x, branch = random(40, 96, seed=0), random(40, 96, seed=1) * 100
    weight = 1 + random(96, seed=2, dtype=torch.float32) / 10
    total, _, output = reference.norm_output(x, branch, weight, EPS)
    exact = F.rms_norm(total.double(), (96,), weight.bfloat16().double(), EPS)
    assert torch.equal(output, exact.bfloat16())
    unrounded = F.rms_norm(x.double() + branch.double(), (96,), weight.double(), EPS)
    assert not torch.equal(output, unrounded.bfloat16())


def norm_gradients_off(
    results: tuple[Tensor, Tensor], grads: Sequence[Tensor], x: Tensor, weight: Tensor, residual_grad: Tensor | None
) -> str:
    """What is wrong with gradients of x and weight that should be those of autograd in fp64 for the sum of grads,
    rounded once; or ""."""
    grad = torch.stack([grad.double() for grad in grads]).sum(0)
    leaves = x.double().requires_grad_(), weight.to(x.dtype).double().requires_grad_()
    output = F.rms_norm(leaves[0], x.shape[1:], leaves[1], EPS)
    differentiated, given = [output], [grad]
    if residual_grad is not None:
        differentiated, given = [output, leaves[0] * 1], [grad, residual_grad.double()]
    texts = []
    for name, result, exact in zip(
        ("grad_x", "grad_weight"), results, torch.autograd.grad(differentiated, leaves, given), strict=True
    ):
        # Half a unit in the last place is the one rounding; what comes before it is computed in fp32.
        rounding = torch.finfo(x.dtype).eps / 2 * exact.abs() + 2.0**-19 * exact.abs().amax(-1, keepdim=True)
        if (result.dtype, result.shape) != (x.dtype, exact.shape):
            texts.append(f"{name} is {result.dtype} {list(result.shape)}")
        elif x.shape[0] and not ((result.double() - exact).abs() <= rounding).all():
            texts.append(f"{name} is {((result.double() - exact).abs() / rounding).max():.2f} roundings off")
    return "; ".join(texts)


@DTYPES
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_gradients_of_a_norm_are_those_of_autograd_rounded_once(dtype: torch.dtype, adds: bool, readers: int) -> None:
    x, residual, *grads = (random(40, 96, seed=seed, dtype=dtype) for seed in range(2 + readers))
    weight = 1 + random(96, seed=3, dtype=torch.float32) / 10
    _, rstd, _ = reference.norm_output(x, None, weight, EPS)
    residual_grad = residual if adds else None
    results = producers.rms_norm_backward(grads, x, weight, rstd, residual_grad)
    assert norm_gradients_off(results, grads, x, weight, residual_grad) == ""


def test_a_residuals_gradient_that_is_added_after_the_rounding_is_seen_to_be() -> None:
    grad, x, residual = (random(40, 96, seed=seed) for seed in range(3))
    weight = torch.ones(96)
    _, rstd, _ = reference.norm_output(x, None, weight, EPS)
    grad_x, grad_weight = producers.rms_norm_backward([grad], x, weight, rstd)
    assert "grad_x" in norm_gradients_off((grad_x + residual, grad_weight), [grad], x, weight, residual)


def test_gradients_that_are_rounded_after_they_are_added_are_seen_to_be() -> None:
    x, one, other = (random(40, 96, seed=seed) for seed in range(3))
    weight = torch.ones(96)
    _, rstd, _ = reference.norm_output(x, None, weight, EPS)
    results = producers.rms_norm_backward([one + other], x, weight, rstd)
    assert "grad_x" in norm_gradients_off(results, [one, other], x, weight, None)


@DTYPES
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("adds", [False, True])
def test_columns_that_are_made_later_are_those_of_the_norm(dtype: torch.dtype, granularity: str, adds: bool) -> None:
    x, branch = (random(37, 128, seed=seed, dtype=dtype) for seed in range(2))
    weight = 1 + random(128, seed=3, dtype=torch.float32) / 10
    cast = Cast(granularity, E4M3, True)
    added = branch if adds else None
    expected = producers.rms_norm(x, added, weight, EPS, cast._replace(columns=True))[3]
    total, rstd, amax, produced = producers.rms_norm(x, added, weight, EPS, cast, keeps_amax=True)
    assert produced.codes_t is None
    assert (None if amax is None else amax.shape) == {TENSOR: (), ROW: (128,), BLOCK: None}[granularity]
    later = producers.norm_columns(x if total is None else total, weight, rstd, amax, cast)
    assert later.output is None
    assert later.codes is None
    pairs = [(later.codes_t, expected.codes_t), (later.scale_t, expected.scale_t)]
    for result, exact in [*pairs, (later.scale, expected.scale if granularity == TENSOR else None)]:
        assert (result is None) == (exact is None)
        assert result is None or torch.equal(result.float(), exact.float())


def test_no_tokens_give_a_weight_no_gradient() -> None:
    x = torch.empty(0, 128)
    grad_x, grad_weight = producers.rms_norm_backward([x], x, torch.ones(128), torch.empty(0), x)
    assert grad_x.shape == (0, 128)
    assert torch.equal(grad_weight, torch.zeros(128))


@DTYPES
def test_swiglu_and_its_gradients_are_those_of_autograd_rounded_once(dtype: torch.dtype) -> None:
    gate, up, grad = (random(40, 96, seed=seed, dtype=dtype) * 3 for seed in range(3))
    leaves = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = F.silu(leaves[0]) * leaves[1]
    expected = exact, *torch.autograd.grad(exact, leaves, grad.double())
    results = reference.swiglu_output(gate, up), *reference.swiglu_gradients(grad, gate, up)
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[dtype]
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), value.detach(), rtol=tolerance, atol=1e-5)


def test_swiglu_is_within_the_rounding_of_silu_of_the_eager_expression() -> None:
    gate, up = random(40, 96, seed=0), random(40, 96, seed=1)
    fused, eager = reference.swiglu_output(gate, up).float(), (F.silu(gate) * up).float()
    assert not torch.equal(fused, eager)
    torch.testing.assert_close(fused, eager, rtol=2**-7, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_codes_are_the_plain_cast_of_the_output(granularity: str, dtype: torch.dtype) -> None:
    gate, up = random(37, 128, seed=0), random(37, 128, seed=1)
    produced = producers.swiglu(gate, up, Cast(granularity, dtype, True, columns=True, emit=True))
    output = produced.output
    assert output is not None
    assert torch.equal(output, reference.swiglu_output(gate, up))
    if granularity == TENSOR:
        codes, codes_t, scale = float8.cast_tensor(output, float8.amax(output), dtype, rows=True, columns=True)
        expected = (codes, scale, codes_t, None)
    elif granularity == ROW:
        expected = float8.cast_rows_and_columns(output, dtype)
    else:
        expected = blockwise.cast_block_both(output, dtype, True)
    for result, plain in zip(produced[1:], expected, strict=True):
        assert (result is None) == (plain is None)
        if result is not None and plain is not None:
            assert result.stride() == plain.stride()
            assert torch.equal(result.float(), plain.float())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_and_inf_stay_visible(granularity: str) -> None:
    cast = Cast(granularity, E4M3, columns=True)
    gate, up = random(20, 128, seed=0), random(20, 128, seed=1)
    gate[3, 5], up[7, 9] = torch.nan, torch.inf
    produced = producers.swiglu(gate, up, cast)
    _, _, _, normed = producers.rms_norm(gate, up, torch.ones(128), EPS, cast)
    for each in (produced, normed):
        assert each.codes is not None
        assert each.codes_t is not None
        assert each.codes[3, 5].float().isnan()
        assert each.codes[7, 9].float().isnan()
        assert each.codes_t[5, 3].float().isnan()
        assert (each.codes_t[:, 20:].float() == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_not_asked_for_is_not_there(granularity: str) -> None:
    grad, gate, up = (random(20, 128, seed=seed) for seed in range(3))
    nothing = Cast(granularity, E4M3, rows=False)
    for each in producers.swiglu_backward(grad, gate, up, nothing)[:2]:
        assert each == (None,) * 5
    for each in producers.swiglu_backward(grad, gate, up, nothing._replace(columns=True))[:2]:
        assert each.output is None
        assert each.codes is None
        assert each.codes_t is not None
    total, _, amax, produced = producers.rms_norm(gate, None, torch.ones(128), EPS, Cast(granularity, E4M3))
    assert total is None
    assert amax is None
    assert produced.output is None
    assert produced.codes_t is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_tokens_give_empty_codes(granularity: str) -> None:
    x = torch.empty(0, 128)
    cast = Cast(granularity, E4M3, columns=True)
    total, rstd, amax, produced = producers.rms_norm(x, x, torch.ones(128), EPS, cast, keeps_amax=True)
    assert total is not None
    assert produced.codes is not None
    assert produced.codes_t is not None
    assert (total.shape, rstd.shape) == ((0, 128), (0,))
    assert (produced.codes.shape, produced.codes_t.shape) == ((0, 128), (128, 0))
    later = producers.norm_columns(total, torch.ones(128), rstd, amax, cast).codes_t
    assert later is not None
    assert later.shape == (128, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: producers.swiglu(x, x[:1], Cast(ROW, E4M3)), "one shape and dtype"),
        (lambda x: producers.swiglu(x, x.half(), Cast(ROW, E4M3)), "one shape and dtype"),
        (lambda x: producers.swiglu(x, x, Cast(BLOCK, E4M3)), "multiples of 128"),
        (lambda x: producers.swiglu(x, x, Cast("column", E4M3)), "granularity 'column'"),
        (lambda x: producers.swiglu(x, x, Cast(ROW, torch.float16)), "float8_e4m3fn"),
        (lambda x: producers.swiglu(x[0], x[0], Cast(ROW, E4M3)), "2-D"),
        (lambda x: producers.rms_norm(x, None, x[0, :8], EPS, Cast(ROW, E4M3)), r"weight of shape \[48\]"),
        (lambda x: producers.rms_norm(x, None, x[0], EPS, Cast(ROW, E4M3, rows=False)), "always wanted by rows"),
        (lambda x: producers.norm_columns(x, x[0], x[0], None, Cast(ROW, E4M3)), "a weight and rstd for"),
        (lambda x: producers.rms_norm_backward([x, x[:1]], x, x[0], x[:, 0]), "one shape and dtype"),
        (lambda x: producers.rms_norm_backward([x], x, x[0], x[:, 0], x.half()), "one shape and dtype"),
        (lambda x: producers.rms_norm_backward([], x, x[0], x[:, 0]), "1 to 3 gradients"),
        (lambda x: producers.rms_norm_backward([x] * 4, x, x[0], x[:, 0]), "1 to 3 gradients"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(20, 48))
