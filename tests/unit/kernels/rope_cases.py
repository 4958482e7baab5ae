"""Compares the kernel of the rotary embedding with the reference in Triton's interpreter; run by
test_rope_interpreter.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.rope_cases OUT.json

The interpreter truncates to bf16 where a GPU rounds, so bf16 is compared on a GPU alone (tests/gpu/test_rope.py).
"""

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from titan_fp8.kernels.rope import kernel, reference


def shrink_blocks() -> None:
    """Blocks so small that the heads of a token come in several parts; and memory that shows what is not written."""
    kernel.VALUES, kernel.VALUES_PER_WARP = 32, 32
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def inputs(*head_counts: int, rows: int = 2, seq_len: int = 5, width: int = 8) -> tuple[list[Tensor], Tensor, Tensor]:
    """One tensor `[rows, seq_len, H, width]` for each count of heads; cosines and sines."""
    generator = torch.Generator().manual_seed(sum(head_counts) + rows * seq_len * width)
    xs = [torch.randn(rows, seq_len, heads, width, generator=generator) for heads in head_counts]
    angles = torch.randn(seq_len, width // 2, generator=generator) * 9
    return xs, angles.cos(), angles.sin()


def compare(xs: list[Tensor], cos: Tensor, sin: Tensor) -> str:
    """Both directions: "" or what differs."""
    wrong = []
    for inverse in (False, True):
        for x, y in zip(xs, kernel.rotate(xs, cos, sin, inverse=inverse), strict=True):
            same = torch.equal(y, reference.rotate(x, cos, sin, inverse=inverse))
            if not same or not y.is_contiguous() or y.dtype != x.dtype:
                wrong.append(f"{list(x.shape)} with strides {x.stride()}, inverse={inverse}")
    return "; ".join(wrong)


def case_queries_and_keys() -> str:
    counts = [(4, 4), (8, 2), (16, 1), (1, 1), (3, 1), (6, 2), (7, 5)]
    return "; ".join(compare(*inputs(*both)) for both in counts)


def case_more_keys_than_queries() -> str:
    return compare(*inputs(2, 9))


def case_one_tensor() -> str:
    return "; ".join(compare(*inputs(heads)) for heads in (1, 5, 8))


def case_widths() -> str:
    return "; ".join(compare(*inputs(3, 2, width=width)) for width in (2, 6, 64, 96, 128))


def case_odd_lengths() -> str:
    return "; ".join(compare(*inputs(2, 1, rows=rows, seq_len=length)) for rows, length in ((1, 1), (3, 63), (1, 17)))


def case_parts_of_a_wider_tensor() -> str:
    (wide,), cos, sin = inputs(9, width=12)
    projected = wide.flatten(-2)  # [2, 5, 108]: five heads of q, two of k, two of v
    q, k = projected[..., :60].unflatten(-1, (5, 12)), projected[..., 60:84].unflatten(-1, (2, 12))
    return compare([q, k], cos, sin)


def case_heads_before_tokens() -> str:
    xs, cos, sin = inputs(5, 5)
    return compare([x.transpose(1, 2) for x in xs], cos, sin)


def case_half_precision() -> str:
    xs, cos, sin = inputs(5, 2)
    return compare([x.half() for x in xs], cos, sin)


def case_nan_stays_in_its_pair() -> str:
    (x,), cos, sin = inputs(3)
    x[1, 2, 1, 4] = float("nan")
    (y,) = kernel.rotate([x], cos, sin, inverse=False)
    place = y.isnan().nonzero().tolist()
    return "" if place == [[1, 2, 1, 4], [1, 2, 1, 5]] else f"NaN at {place}"


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(globals()), shrink_blocks)
