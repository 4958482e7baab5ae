"""Compares the fused producers' Triton kernels with the reference in Triton's interpreter; run by
test_producers_interpreter.py, as `interpreter_cases.py` is by its own.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.producers_cases OUT.json

Each case checks three things: codes and scales are bit for bit the reference cast of the kernel's own output; that
output is within one unit in the last place of the reference's; and what is not asked for is not there, and changes
nothing of the rest.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from tests.unit.kernels.interpreter_cases import difference, poisoned_codes
from tests.unit.kernels.test_producers_reference import norm_gradients_off, ulps_apart
from titan_fp8.kernels.float8 import E4M3, E5M2, bits
from titan_fp8.kernels.producers import BLOCK, ROW, TENSOR, Cast, Produced, reference
from titan_fp8.kernels.producers import norm_backward_kernel as norm_backward
from titan_fp8.kernels.producers import norm_kernel as norm
from titan_fp8.kernels.producers import swiglu_amax_kernel as swiglu_amax
from titan_fp8.kernels.producers import swiglu_kernel as swiglu

Produce = Callable[[Cast], tuple[Produced, ...]]
EPS = 1e-5
ULPS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 256}
"""Allowed distance of outputs. In fp32 it is what the order of a sum, an exponential, and the cancellation in the
gradient of silu explain."""
SIZES = {TENSOR: (35, 32), ROW: (35, 32), BLOCK: (150, 256)}


def shrink_blocks() -> None:
    """Tiny blocks and poisoned outputs."""
    tile = bits.Tile(16, 16, 4, 2)
    norm.ROWS_TILE = norm.COLUMNS_TILE = norm.BOTH_TILE = tile
    norm.ROW_VALUES, norm.AMAX_PROGRAMS, norm.PROGRAMS = 1024, 2, 3
    norm_backward.ROW_VALUES, norm_backward.SUM_PROGRAMS, norm_backward.SUM_FEATURES = 256, 2, 16
    norm_backward.SHORT_ROWS, norm_backward.LONG_ROWS = norm_backward.Walk(5, 4, 3), norm_backward.Walk(3, 4, 2)
    swiglu.FORWARD_ROWS_TILE = swiglu.FORWARD_TILE = tile
    swiglu.BACKWARD_TILE = swiglu.BACKWARD_ROW_TILE = tile
    swiglu_amax.FORWARD_AMAX = swiglu_amax.BACKWARD_AMAX = swiglu_amax.Amax(8, 16, 2, 4)
    swiglu.ROW_BLOCK_MAX, swiglu.ROW_VALUES = 16, 128
    bits.new_codes = poisoned_codes
    # New memory is filled with NaN.
    torch.use_deterministic_algorithms(True)


def on(device: str, x: Tensor) -> Tensor:
    """x on a device, with the strides it has."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device).copy_(x)


def to_cpu(produced: Produced) -> Produced:
    return Produced(*(None if each is None else each.cpu() for each in produced))


def without_cancellation(output: Tensor, exact: Tensor) -> Tensor:
    """In fp32, `output` with `exact` where they are near in absolute terms: the gradient of silu passes through zero,
    where two exponentials that differ in their last bit give results that have no bit in common."""
    if exact.dtype != torch.float32:
        return output
    largest = exact.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return torch.where((output - exact).abs() <= 2.0**-20 * largest, exact, output)


def check(produce: Produce, expected: tuple[Tensor, ...], cast: Cast, *, wide: bool) -> str:
    """One producer that emits its outputs, and if `wide` one that does not."""
    without = [to_cpu(each) for each in produce(cast)] if wide else []
    texts = []
    results = (to_cpu(each) for each in produce(cast._replace(emit=True)))
    for number, (with_output, exact) in enumerate(zip(results, expected, strict=True)):
        output = with_output.output
        assert output is not None
        assert output.dtype == exact.dtype
        apart = ulps_apart(without_cancellation(output, exact), exact)
        if apart > ULPS[exact.dtype]:
            texts.append(f"output {number} is {apart} units in the last place from the reference")
        codes = reference.quantize(output, cast)
        texts.append(difference(with_output[1:], codes[1:]))
        if wide:
            texts.append(difference(without[number], codes))
    return "; ".join(filter(None, texts))


def casts_of(granularity: str) -> Iterator[Cast]:
    """Every layout in e4m3, and both in e5m2."""
    for rows, columns in ((True, True), (True, False), (False, True), (False, False)):
        yield Cast(granularity, E4M3, rows=rows, columns=columns)
    yield Cast(granularity, E5M2, granularity != TENSOR, rows=True, columns=True)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 2).to(dtype)


def compare_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, granularity: str, *, wide: bool = False, device: str = "cpu"
) -> str:
    """RMSNorm of x (+ branch), tensors of the CPU, on a device: in both layouts or, if `wide`, in every form."""
    total, _, expected = reference.norm_output(x, branch, weight, EPS)
    rstds: list[Tensor] = []
    texts: list[str] = []
    inputs = on(device, x), None if branch is None else on(device, branch), on(device, weight)

    def produce(cast: Cast) -> tuple[Produced]:
        result_total, rstd, amax, produced = norm.rms_norm(*inputs, EPS, cast, keeps_amax=cast.columns)
        assert (total is None) == (result_total is None)
        assert result_total is None or ulps_apart(result_total.cpu(), total) == 0, "sum differs"
        rstds.append(rstd)
        if cast.columns:
            x = inputs[0] if result_total is None else result_total
            texts.append(compare_later_columns(norm.norm_columns(x, inputs[2], rstd, amax, cast), produced, cast))
        return (produced,)

    casts_asked = [cast for cast in casts_of(granularity) if cast.rows][: None if wide else 1]
    texts += [check(produce, (expected,), cast, wide=wide) for cast in casts_asked]
    if any(ulps_apart(rstd, rstds[0]) for rstd in rstds):
        texts.append("rstd depends on what is asked for")
    return "; ".join(filter(None, texts))


def compare_later_columns(later: Produced, first: Produced, cast: Cast) -> str:
    """The columns of a norm, made later and at once."""
    scale = first.scale if cast.granularity == TENSOR else None
    text = difference(to_cpu(later), to_cpu(Produced(None, None, scale, first.codes_t, first.scale_t)))
    return text and f"made later: {text}"


def gradients_of_norm(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, residual_grad: Tensor | None, *, device: str = "cpu"
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gradients of x and weight, tensors of the CPU, by the kernel on a device and by the reference."""
    _, rstd, _ = reference.norm_output(x, None, weight, EPS)
    on_device = (None if t is None else on(device, t) for t in (x, weight, rstd, residual_grad))
    grad_x, grad_weight = norm_backward.rms_norm_backward([on(device, grad) for grad in grads], *on_device)
    expected = reference.norm_backward(grads, x, weight, rstd, residual_grad)
    return (grad_x.cpu(), grad_weight.cpu()), expected


def compare_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, residual: Tensor, *, device: str = "cpu") -> str:
    """The backward of RMSNorm, with and without the residual's gradient, for one and more readers, on a device; against
    fp64, and the first and the last repeated."""
    texts = []
    combinations = (1, residual), (1, None), (2, residual), (3, residual), (3, None)
    for number, (readers, residual_grad) in enumerate(combinations):
        grads = [grad, residual, x][:readers]
        results, _ = gradients_of_norm(grads, x, weight, residual_grad, device=device)
        texts.append(norm_gradients_off(results, grads, x, weight, residual_grad))
        if number in (0, len(combinations) - 1):
            again, _ = gradients_of_norm(grads, x, weight, residual_grad, device=device)
            if not all(map(torch.equal, results, again)):
                texts.append("a second call gives other bits")
    return "; ".join(filter(None, texts))


def compare_special_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, residual: Tensor, *, device: str = "cpu"
) -> str:
    """The same where something is NaN or infinite: as in the reference, and seen in the gradient of x."""
    results, expected = gradients_of_norm([grad], x, weight, residual, device=device)
    texts = ["grad_x is finite"] if results[0].isfinite().all() else []
    for name, result, exact in zip(("grad_x", "grad_weight"), results, expected, strict=True):
        try:
            torch.testing.assert_close(result, exact, rtol=2**-7, atol=2**-7, equal_nan=True)
        except AssertionError as error:
            texts.append(f"{name}: {error}")
    return "; ".join(texts)


def compare_swiglu(
    grad: Tensor, gate: Tensor, up: Tensor, granularity: str, *, wide: bool = False, device: str = "cpu"
) -> str:
    """SwiGLU and its backward, of tensors of the CPU, on a device: in both layouts or, if `wide`, in every form."""
    texts = []
    inputs = [on(device, x) for x in (grad, gate, up)]
    for cast in casts_of(granularity):
        if not wide and (cast.dtype == E5M2 or not cast.rows):
            continue
        texts.append(
            check(lambda c: (swiglu.swiglu(*inputs[1:], c),), (reference.swiglu_output(gate, up),), cast, wide=wide)
        )
        if wide or cast.columns:
            gradients = reference.swiglu_gradients(grad, gate, up)
            texts.append(check(lambda c: swiglu.swiglu_backward(*inputs, c, None)[:2], gradients, cast, wide=wide))
            # Beside both layouts of the gradients, and beside none.
            if wide and cast.dtype == E4M3 and cast.rows == cast.columns:
                texts.append(compare_output_columns(inputs, cast))
                texts.append(compare_kept_codes(inputs, cast, device))
    return "; ".join(filter(None, texts))


def compare_output_columns(inputs: list[Tensor], cast: Cast) -> str:
    """The backward of SwiGLU that makes the output's columns again: those of the forward, beside the same gradients."""
    texts = []
    alone = swiglu.swiglu_backward(*inputs, cast, None)
    assert alone[2] is None
    for dtype in (E4M3, E5M2) if cast.rows else (E4M3,):
        expected = swiglu.swiglu(*inputs[1:], reference.output_cast(cast, dtype))
        for result, wanted in zip(swiglu.swiglu_backward(*inputs, cast, dtype), (*alone[:2], expected), strict=True):
            assert result is not None
            texts.append(difference(to_cpu(result), to_cpu(wanted)))
    return "; ".join(filter(None, texts))


def compare_kept_codes(inputs: list[Tensor], cast: Cast, device: str) -> str:
    """The backward of SwiGLU for codes of gate and up: to the bit what it is for the tensors that they stand for, which
    codes with a power of two for a scale leave exact."""
    grad, *others = inputs
    coded = [reference.float8.cast_rows(x.cpu(), E4M3) for x in others]
    values = [on(device, (codes.float() * scale).to(grad.dtype)) for codes, scale in coded]
    codes, scales = ([on(device, pair[number]) for pair in coded] for number in range(2))
    results = swiglu.swiglu_backward(grad, *codes, cast, E4M3, tuple(scales))
    texts = []
    for result, wanted in zip(results, swiglu.swiglu_backward(grad, *values, cast, E4M3), strict=True):
        texts.append(difference(to_cpu(result), to_cpu(wanted)))
    return "; ".join(filter(None, texts))


def inputs(granularity: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [random(*SIZES[granularity], seed=seed, dtype=dtype) for seed in range(3)]


def case_norm() -> str:
    return "; ".join(
        compare_norm(x, None, 1 + w[0].float() / 8, granularity, wide=True)
        for granularity in SIZES
        for x, w, _ in [inputs(granularity)]
    )


def case_add_and_norm() -> str:
    return "; ".join(
        compare_norm(x, branch, 1 + w[0].float() / 8, granularity)
        for granularity in SIZES
        for x, branch, w in [inputs(granularity)]
    )


def case_norm_of_other_dtypes_and_odd_sizes() -> str:
    texts = []
    for dtype, granularity in itertools.product((torch.float32, torch.float16), (TENSOR, ROW)):
        x, branch = random(19, 23, seed=0, dtype=dtype), random(19, 23, seed=1, dtype=dtype)
        texts.append(compare_norm(x, branch, torch.rand(23), granularity))
    texts.append(compare_norm(random(1, 16, seed=0), None, torch.ones(16), ROW))
    return "; ".join(filter(None, texts))


def case_norm_of_strided_rows() -> str:
    x, branch = random(35, 96, seed=0)[:, 16:64], random(70, 48, seed=1)[::2]
    return compare_norm(x, branch, torch.rand(48).bfloat16(), ROW)


def case_norm_with_nan_and_inf() -> str:
    texts = []
    for granularity in SIZES:
        x, branch, _ = inputs(granularity)
        weight = torch.ones(x.shape[1])
        x[3, 5], branch[7, 2] = torch.nan, -torch.inf
        texts.append(compare_norm(x, branch, weight, granularity))
        weight[9], x[3, 5] = torch.nan, 1.0
        texts.append(compare_norm(x, None, weight, granularity))
    return "; ".join(filter(None, texts))


def case_norm_of_zeros() -> str:
    return "; ".join(compare_norm(torch.zeros(*SIZES[g]), None, torch.ones(SIZES[g][1]), g) for g in SIZES)


def case_norm_of_rows_too_long_for_a_program() -> str:
    longest, norm.ROW_BLOCK_MAX = norm.ROW_BLOCK_MAX, 32
    try:
        return "; ".join(compare_norm(*inputs(g)[:2], torch.ones(SIZES[g][1]), g) for g in SIZES)
    finally:
        norm.ROW_BLOCK_MAX = longest


def random_gradients(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad, x, weight, residual."""
    grad, x, residual = (random(*shape, seed=seed, dtype=dtype) for seed in range(3))
    return grad, x, 1 + random(shape[1], seed=3, dtype=torch.float32) / 8, residual


def case_norm_backward() -> str:
    # Several rows at a time and one, whole blocks and not, fewer rows than programs, one row, few features.
    sizes = [(35, 96), (64, 128), (19, 23), (37, 300), (2, 512), (1, 16), (11, 5)]
    return "; ".join(f"{size}: {text}" for size in sizes if (text := compare_norm_backward(*random_gradients(*size))))


def case_norm_backward_of_other_dtypes() -> str:
    texts = [compare_norm_backward(*random_gradients(23, 80, dtype=d)) for d in (torch.float32, torch.float16)]
    grad, x, weight, residual = random_gradients(23, 80)
    return "; ".join(filter(None, [*texts, compare_norm_backward(grad, x, weight.bfloat16(), residual)]))


def case_norm_backward_of_strided_rows() -> str:
    grad, x, residual = random(70, 48, seed=0)[::2], random(35, 96, seed=1)[:, 16:64], random(105, 48, seed=2)[::3]
    return compare_norm_backward(grad, x, torch.rand(48), residual)


def case_norm_backward_with_nan_and_inf() -> str:
    texts = []
    for place, bad in itertools.product(range(4), (torch.nan, torch.inf, -torch.inf)):
        tensors = random_gradients(19, 40)
        tensors[place].view(-1)[7] = bad
        texts.append(compare_special_norm_backward(*tensors))
    return "; ".join(filter(None, texts))


def case_norm_backward_of_rows_too_long_for_a_program() -> str:
    longest, norm.ROW_BLOCK_MAX = norm.ROW_BLOCK_MAX, 32
    try:
        return compare_norm_backward(*random_gradients(9, 40))
    finally:
        norm.ROW_BLOCK_MAX = longest


def case_swiglu() -> str:
    # A tile and part of one, as of other sizes below; a program for amax, whole and in part.
    sizes = {**SIZES, TENSOR: (19, 32), ROW: (19, 32)}
    return "; ".join(
        compare_swiglu(*(random(*size, seed=seed) for seed in range(3)), granularity, wide=True)
        for granularity, size in sizes.items()
    )


def case_swiglu_of_other_dtypes_and_odd_sizes() -> str:
    texts = []
    for dtype, granularity in ((torch.float32, TENSOR), (torch.float16, ROW)):
        texts.append(compare_swiglu(*(random(19, 23, seed=s, dtype=dtype) for s in range(3)), granularity))
    texts.append(compare_swiglu(*(random(1, 16, seed=s) for s in range(3)), ROW))
    return "; ".join(filter(None, texts))


def case_swiglu_of_strided_rows() -> str:
    both = random(35, 96, seed=0)
    return compare_swiglu(random(70, 48, seed=1)[::2], both[:, :48], both[:, 48:], ROW)


def case_swiglu_with_nan_and_inf() -> str:
    texts = []
    for granularity in SIZES:
        grad, gate, up = inputs(granularity)
        gate[3, 5], up[7, 2], grad[20, 30] = torch.nan, torch.inf, -torch.inf
        gate[1] = 3e38  # finite in bf16; times up it is not
        texts.append(compare_swiglu(grad, gate, up, granularity))
    return "; ".join(filter(None, texts))


def case_swiglu_of_zeros_and_of_large_gates() -> str:
    texts = [compare_swiglu(*(torch.zeros(*SIZES[g]) for _ in range(3)), g) for g in SIZES]
    grad, gate, up = inputs(ROW)
    return "; ".join(filter(None, [*texts, compare_swiglu(grad, gate * 60, up, ROW)]))


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(dict(globals())), shrink_blocks)
