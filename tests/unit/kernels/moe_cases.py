"""Compares the kernels of the dispatch with the reference in Triton's interpreter; run by test_moe_interpreter.py.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.moe_cases OUT.json

The interpreter truncates to bf16 where a GPU rounds, so bf16 is compared on a GPU alone (tests/gpu/test_moe.py).
"""

import torch
from torch import Tensor

from tests.unit.kernels import interpreter
from titan_fp8.kernels import moe
from titan_fp8.kernels.moe import kernel, plan_kernel, reference

SIZES = [(7, 1, 3, 8, 40), (63, 2, 5, 8, 64), (20, 3, 4, 16, 7), (5, 1, 1, 1, 96), (9, 4, 4, 32, 129)]
"""T, k, E, alignment, D."""


def shrink_blocks() -> None:
    """Blocks so small that a row comes in several; and memory that shows what is not written."""
    kernel.MAX_BLOCK, kernel.VALUES_PER_WARP = 32, 32
    plan_kernel.BLOCK, plan_kernel.SCAN_BLOCK = 16, 4
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


class Inputs:
    """Random choices and what they are brought through."""

    def __init__(self, tokens: int, top_k: int, experts: int, alignment: int, features: int) -> None:
        self.generator = torch.Generator().manual_seed(tokens + features)
        choices = torch.rand(tokens, experts, generator=self.generator).topk(top_k).indices
        self.top_k = top_k
        _, self.ends, self.position, self.source = moe.plan(choices, experts, alignment)
        self.x = self.random(tokens, features)
        self.y = self.random(self.source.shape[0], features)
        self.scores = self.random(tokens, top_k)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def differ(name: str, result: Tensor, expected: Tensor, *, exact: bool = True) -> str:
    """ "" or what differs."""
    if result.dtype != expected.dtype or result.shape != expected.shape or not result.is_contiguous():
        return f"{name}: {result.dtype} {list(result.shape)}"
    same = torch.equal(result, expected) if exact else torch.allclose(result, expected, rtol=1e-5, atol=1e-5)
    return "" if same else f"{name} {list(expected.shape)}: {(result - expected).abs().max()}"


def both_ways(inputs: Inputs, scores: Tensor | None) -> str:
    """Everything that the two kernels compute."""
    x, y, position, source, top_k = inputs.x, inputs.y, inputs.position, inputs.source, inputs.top_k
    products = reference.row_products(x, y, position)
    rows = reference.permute(x, source, scores, top_k)
    tokens = reference.unpermute(y, position, scores)
    found = []
    for other in (None, y):
        out, made = kernel.to_groups(x, source, scores, top_k, other)
        found.append(differ("rows", out, rows))
        found.append("" if made is None else differ("products of rows", made, products, exact=False))
    for other in (None, x):
        out, made = kernel.to_tokens(y, position, scores, other)
        found.append(differ("tokens", out, tokens))
        found.append("" if made is None else differ("products of tokens", made, products, exact=False))
    found.append(differ("products alone", kernel.row_products(x, y, position), products, exact=False))
    return "; ".join(filter(None, found))


def case_plan() -> str:
    found = []
    for tokens, top_k, experts, alignment in ((7, 1, 3, 8), (20, 3, 40, 1), (1, 1, 1, 32), (50, 2, 5, 16)):
        generator = torch.Generator().manual_seed(tokens)
        spread = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        for choices in (spread, spread.int(), spread * 0 + torch.arange(top_k)):
            rows = moe.rows_for(choices.numel(), experts, alignment)
            result = plan_kernel.plan(choices, experts, alignment, rows)
            expected = reference.plan(choices, experts, alignment, rows)
            found += [differ(str(n), *each) for n, each in enumerate(zip(result, expected, strict=True))]
    return "; ".join(filter(None, found))


def case_scaled() -> str:
    return "; ".join(both_ways(inputs, inputs.scores) for inputs in (Inputs(*sizes) for sizes in SIZES))


def case_unscaled() -> str:
    return "; ".join(both_ways(inputs, None) for inputs in (Inputs(*sizes) for sizes in SIZES))


def case_half_precision() -> str:
    inputs = Inputs(*SIZES[1])
    inputs.x, inputs.y = inputs.x.half(), inputs.y.half()
    return both_ways(inputs, inputs.scores)


def case_parts_of_wider_tensors() -> str:
    inputs = Inputs(*SIZES[0])
    inputs.x, inputs.y = (torch.cat([each, each], dim=1)[:, : each.shape[1]] for each in (inputs.x, inputs.y))
    return both_ways(inputs, inputs.scores)


def case_negative_zero() -> str:
    inputs = Inputs(*SIZES[0])
    inputs.y.fill_(-0.0)
    out, _ = kernel.to_tokens(inputs.y, inputs.position, None, None)
    return "" if bool(out.signbit().all()) else "a negative zero became a positive one"


def case_nan_reaches_its_token_alone() -> str:
    inputs = Inputs(*SIZES[1])
    inputs.x[3, 2] = torch.nan
    out, _ = kernel.to_groups(inputs.x, inputs.source, inputs.scores, inputs.top_k, None)
    rows = sorted(inputs.position[3].tolist())
    return "" if out.isnan().nonzero().tolist() == [[row, 2] for row in rows] else "NaN elsewhere"


if __name__ == "__main__":
    interpreter.main(interpreter.cases_of(globals()), shrink_blocks)
