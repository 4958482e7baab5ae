"""The fused producers as operators: what they promise the compiler is what they do, and results come in their order."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from titan_fp8.kernels import producers
from titan_fp8.kernels.float8 import E4M3, E5M2
from titan_fp8.kernels.producers import GRANULARITIES, Cast
from titan_fp8.quantization import producer_ops as ops

X, Y, Z = (torch.randn(21, 128, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3))
WEIGHT = torch.ones(128)
CASTS = [
    Cast(granularity, dtype, False, rows, columns, emit)
    for granularity in GRANULARITIES
    for dtype, rows, columns, emit in ((E4M3, True, False, False), (E5M2, True, True, True), (E4M3, False, True, False))
]
AMAX = {"tensor": torch.ones((), dtype=torch.int32), "row": torch.ones(X.shape[1], dtype=torch.int32), "block": None}
CALLS = [
    (op, (*arguments, *cast))
    for (op, arguments), cast in itertools.product(
        (
            (ops.rms_norm_cast, (X, WEIGHT, 1e-5)),
            (ops.add_rms_norm_cast, (X, Y, WEIGHT, 1e-5)),
            (ops.swiglu_cast, (X, Y)),
            (ops.swiglu_backward_cast, (X, Y, Z)),
        ),
        CASTS,
    )
    if cast.rows or op not in (ops.rms_norm_cast, ops.add_rms_norm_cast)
]
CALLS += [
    (ops.rms_norm_backward, ([X], Y, WEIGHT, torch.ones(21))),
    (ops.rms_norm_backward, ([X, Z], Y, WEIGHT, torch.ones(21), Z)),
    *((ops.rms_norm_cast, (X, WEIGHT, 1e-5, *cast, True)) for cast in CASTS if cast.rows),
    *((ops.add_rms_norm_cast, (X, Y, WEIGHT, 1e-5, *cast, True)) for cast in CASTS if cast.rows),
    *((ops.norm_columns, (X, WEIGHT, torch.ones(21), AMAX[cast.granularity], Y, *cast)) for cast in CASTS),
    *((ops.swiglu_backward_cast, (X, Y, Z, *cast, dtype)) for cast in CASTS for dtype in (E4M3, E5M2)),
    (ops.swiglu_cast, (X.t().contiguous().t(), Y[:, :].clone(), *CASTS[1])),
    (ops.add_rms_norm_cast, (X.t().contiguous().t(), Y, WEIGHT, 1e-5, *CASTS[1])),
]


def described(results: list[Tensor] | tuple[Tensor, ...]) -> list:
    return [(r.shape, r.stride(), r.dtype) for r in results]


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[f"{op}-{number}" for number, (op, _) in enumerate(CALLS)])
def test_shapes_strides_and_dtypes_are_those_that_the_compiler_is_told(op, arguments: tuple) -> None:
    meta = tree_map_only(Tensor, lambda a: a.to("meta"), arguments)
    results = op(*arguments)
    assert described(results) == described(op(*meta))
    inputs = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, Tensor)}
    outputs = [r.untyped_storage().data_ptr() for r in results]
    assert len(set(outputs)) == len(outputs), "results share memory"
    assert not inputs & set(outputs), "a result is an input"


@pytest.mark.parametrize(("op", "arguments"), [CALLS[0], CALLS[-1], CALLS[-3]], ids=["norm", "add", "backward"])
def test_schema_and_fake_implementation_pass_the_check_of_pytorch(op, arguments: tuple) -> None:
    torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_forms_take_each_result_to_its_place(cast: Cast) -> None:
    expected = producers.swiglu_backward(X, Y, Z, cast)[:2]
    results = iter(ops.swiglu_backward_cast(X, Y, Z, *cast))
    for produced in expected:
        output, rows, columns = ops.forms(results, cast)
        pairs = [(output, produced.output)]
        scale_t = produced.scale if produced.scale_t is None else produced.scale_t
        pairs += zip(rows or (None, None), (produced.codes, produced.scale if rows else None), strict=True)
        pairs += zip(columns or (None, None), (produced.codes_t, scale_t if columns else None), strict=True)
        for result, exact in pairs:
            assert (result is None) == (exact is None)
            assert result is None or torch.equal(result.float(), exact.float())
    assert not list(results)


@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_the_columns_that_swiglu_makes_again_in_backward_are_those_of_its_forward(cast: Cast) -> None:
    wanted = cast._replace(dtype=E4M3, rows=False, columns=True, emit=False)
    expected = ops.swiglu_cast(Y, Z, *wanted)
    plain = ops.swiglu_backward_cast(X, Y, Z, *cast)
    results = ops.swiglu_backward_cast(X, Y, Z, *cast, E4M3)
    assert len(results) == len(plain) + 2
    again = ops.forms(iter(results[len(plain) :]), wanted).columns
    first = ops.forms(iter(expected), wanted).columns
    assert again is not None
    assert first is not None
    for one, other in zip((*results[: len(plain)], *again), (*plain, *first), strict=True):
        assert torch.equal(one.float(), other.float())
