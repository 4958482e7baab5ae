"""The fused producers on a GPU: their codes are the reference cast's of their own output, which is the reference's."""

import pytest
import torch
from torch import Tensor

from tests.unit.kernels.test_producers_reference import norm_gradients_off, ulps_apart
from titan_fp8.kernels import float8, producers
from titan_fp8.kernels.float8 import E4M3
from titan_fp8.kernels.producers import BLOCK, GRANULARITIES, ROW, TENSOR, Cast, reference

pytest.importorskip("triton")

from tests.unit.kernels import producers_cases as cases

pytestmark = pytest.mark.gpu

GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES)
SHAPES = [(1, 128), (17, 256), (130, 384), (1000, 1024), (4099, 4096), (300, 14336)]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch):
    """Codes that nobody writes are NaN, and so is other new memory."""
    monkeypatch.setattr(cases.bits, "new_codes", cases.poisoned_codes)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [cases.random(*shape, seed=seed, dtype=dtype) for seed in range(3)]


def assert_norms(x: Tensor, branch: Tensor, weight: Tensor, granularity: str, *, wide: bool = False) -> None:
    for added in (None, branch):
        assert cases.compare_norm(x, added, weight, granularity, wide=wide, device="cuda") == ""


@GRANULARITY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_plain_cast_of_an_output_that_is_the_references(shape: tuple[int, int], granularity: str) -> None:
    grad, gate, up = inputs(*shape)
    assert_norms(gate, up, 1 + grad[0].float() / 8, granularity, wide=True)
    assert cases.compare_swiglu(grad, gate, up, granularity, wide=True, device="cuda") == ""


@pytest.mark.parametrize("granularity", [TENSOR, ROW])
@pytest.mark.parametrize("shape", [(19, 23), (33, 48), (16, 5120), (20, 20480)], ids=str)
def test_other_widths(shape: tuple[int, int], granularity: str) -> None:
    grad, gate, up = inputs(*shape)
    assert_norms(gate, up, grad[0], granularity)
    assert cases.compare_swiglu(grad, gate, up, granularity, device="cuda") == ""


@GRANULARITY
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, granularity: str) -> None:
    grad, gate, up = inputs(150, 512, dtype=dtype)
    assert_norms(gate, up, 1 + grad[0].float() / 8, granularity)
    assert cases.compare_swiglu(grad, gate, up, granularity, device="cuda") == ""


@GRANULARITY
def test_rows_too_long_to_be_loaded_ahead(granularity: str) -> None:
    grad, gate, up = inputs(40, 14336, dtype=torch.float32)
    assert_norms(gate, up, 1 + grad[0] / 8, granularity, wide=True)


@GRANULARITY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, 0.0])
def test_special_values(bad: float, granularity: str) -> None:
    grad, gate, up = inputs(150, 512)
    gate[77, 130], up[3] = bad, bad
    assert_norms(gate, up, 1 + grad[0].float() / 8, granularity)
    assert cases.compare_swiglu(grad, gate, up, granularity, device="cuda") == ""
    weight = torch.ones(512)
    weight[9] = bad
    assert_norms(grad, grad, weight, granularity)


@GRANULARITY
def test_rows_that_lie_apart(granularity: str) -> None:
    both, other = cases.random(150, 512, seed=0), cases.random(300, 256, seed=1)[::2]
    assert_norms(both[:, 128:384], other, torch.rand(256), granularity)
    assert cases.compare_swiglu(other, both[:, :256], both[:, 256:], granularity, device="cuda") == ""


@GRANULARITY
def test_columns_of_strided_inputs_are_made_contiguous(granularity: str) -> None:
    gate, up = (cases.random(256, 150, seed=seed).t() for seed in range(2))
    cast = Cast(granularity, E4M3, columns=True, emit=True)
    result = producers.swiglu(gate.cuda(), up.cuda(), cast)
    assert result.output is not None
    assert ulps_apart(result.output.cpu(), reference.swiglu_output(gate, up)) <= 1


@GRANULARITY
def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_other_tokens(granularity: str) -> None:
    grad, gate, up = (x.cuda() for x in inputs(1500, 4096))
    cast = Cast(granularity, E4M3, columns=True, emit=True)
    calls = (
        lambda n: producers.rms_norm(gate[:n], up[:n], torch.ones(4096, device="cuda"), 1e-5, cast)[3],
        lambda n: producers.swiglu(gate[:n], up[:n], cast),
        lambda n: producers.swiglu_backward(grad[:n], gate[:n], up[:n], cast)[0],
    )
    for call in calls:
        first, second, few = call(1500), call(1500), call(130)
        for one, other in zip(first, second, strict=True):
            assert one is other is None or torch.equal(one.float(), other.float())
        assert torch.equal(first.output[:130], few.output)


@pytest.mark.parametrize(
    "shape", [*SHAPES, (19, 23), (33, 48), (50_000, 64), (700, 8192), (300, 16384), (20, 20480)], ids=str
)
def test_gradients_of_a_norm_are_those_of_autograd_rounded_once(shape: tuple[int, int]) -> None:
    assert cases.compare_norm_backward(*cases.random_gradients(*shape), device="cuda") == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(150, 512), (600, 4096), (40, 14336)], ids=str)
def test_gradients_of_a_norm_in_other_dtypes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert cases.compare_norm_backward(*cases.random_gradients(*shape, dtype=dtype), device="cuda") == ""


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_is_seen_in_the_gradients_of_a_norm(place: int, bad: float) -> None:
    tensors = cases.random_gradients(300, 1024)
    tensors[place].view(-1)[77] = bad
    assert cases.compare_special_norm_backward(*tensors, device="cuda") == ""


def test_gradients_of_a_norm_of_rows_that_lie_apart() -> None:
    both, residual = cases.random(150, 512, seed=0), cases.random(300, 256, seed=1)[::2]
    assert cases.compare_norm_backward(both[:, :256], both[:, 128:384], torch.rand(256), residual, device="cuda") == ""


def test_columns_of_a_gradient_that_lie_apart_are_made_contiguous() -> None:
    grad, x = cases.random(256, 150, seed=0).t(), cases.random(150, 256, seed=1)
    weight = torch.rand(256)
    _, rstd, _ = reference.norm_output(x, None, weight, 1e-5)
    grad_there, *others = (cases.on("cuda", t) for t in (grad, x, weight, rstd, grad))
    results = producers.rms_norm_backward([grad_there], *others)
    grad_x, grad_weight = (result.cpu() for result in results)
    assert norm_gradients_off((grad_x, grad_weight), [grad], x, weight, grad) == ""


def test_no_tokens_give_a_weight_no_gradient() -> None:
    x, weight = torch.empty(0, 128, device="cuda"), torch.ones(128, device="cuda")
    assert torch.equal(producers.rms_norm_backward([x], x, weight, x[:, 0], x)[1], torch.zeros_like(weight))


@GRANULARITY
def test_no_tokens_give_empty_codes(granularity: str) -> None:
    x = torch.empty(0, 128, device="cuda")
    _, _, _, produced = producers.rms_norm(x, x, torch.ones(128, device="cuda"), 1e-5, Cast(granularity, E4M3))
    assert produced.codes is not None
    assert produced.codes.shape == (0, 128)


@pytest.mark.slow
@GRANULARITY
def test_offsets_beyond_32_bits_are_reached(granularity: str) -> None:
    tokens, features = 140_000, 16_384
    x = torch.zeros(tokens, features, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 2.0
    cast = Cast(granularity, E4M3, columns=True)
    one = torch.ones(features, device="cuda")
    for produce in (lambda: producers.rms_norm(x, None, one, 1e-5, cast)[3], lambda: producers.swiglu(x, x, cast)):
        _, codes, scale, codes_t, scale_t = produce()
        scale_t = scale if scale_t is None else scale_t
        last, last_t = (s if s.dim() == 0 else s[-1, -1] for s in (scale, scale_t))
        value = codes[-1, -1].float() * last
        assert value > 1
        assert abs(codes_t[-1, tokens - 1].float() * last_t - value) < value / 8
        assert codes_t[-1, tokens - 2].float() == 0
        del codes, codes_t


@pytest.mark.slow
def test_gradients_of_a_norm_beyond_32_bits_are_reached() -> None:
    tokens, features = 140_000, 16_384
    x = torch.ones(tokens, features, dtype=torch.bfloat16, device="cuda")
    residual = torch.zeros_like(x)
    residual[-1, -1] = 3.0
    one, rstd = torch.ones(features, device="cuda"), torch.ones(tokens, device="cuda")
    grad_x, _ = producers.rms_norm_backward([x], x, one, rstd, residual)
    assert grad_x[-1, -1] == 3.0
    assert grad_x.count_nonzero() == 1


def test_block_codes_of_the_norm_and_of_the_plain_cast_have_the_same_layout() -> None:
    x = cases.random(300, 1024, seed=0).cuda()
    cast = Cast(BLOCK, E4M3, columns=True, emit=True)
    _, _, _, produced = producers.rms_norm(x, None, torch.ones(1024, device="cuda"), 1e-5, cast)
    assert produced.output is not None
    plain = reference.quantize(produced.output, cast)
    assert float8.uses_kernel(produced.output)
    for result, expected in zip(produced, plain, strict=True):
        assert result is not None
        assert expected is not None
        assert result.stride() == expected.stride()
        assert torch.equal(result.float(), expected.float())
