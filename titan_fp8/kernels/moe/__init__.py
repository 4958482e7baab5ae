"""Dispatch of tokens to experts on one device: where each token goes, and the two ways between tokens and groups.

Each token chooses k of E experts. A grouped product wants the rows of an expert together, and each group to begin at a
multiple of an alignment. `plan` finds the places, `permute` brings rows there, `unpermute` brings them back, summed
over a token's choices; each is the other's gradient. How many rows an expert gets is known to the device alone, so the
groups lie in a number of rows that suffices for any choice (`rows_for`), and nobody waits for the device. Rows that
hold no token are zero, so that they add nothing to the products over rows that gradients of weights are.

`reference.py` says what is computed; on a GPU `plan_kernel.py` finds the places and `kernel.py` brings rows to and fro.

T tokens, k choices of each, E experts, D features, M rows of the groups.
"""

import functools
import importlib
from types import ModuleType

from torch import Tensor

from titan_fp8.kernels import float8
from titan_fp8.kernels.moe import reference

__all__ = ["permute", "permute_backward", "plan", "row_products", "rows_for", "unpermute", "unpermute_backward"]


def rows_for(choices: int, n_experts: int, alignment: int) -> int:
    """Rows that suffice for the groups of so many choices (T * k), however they fall; a multiple of the alignment."""
    most = choices + min(choices, n_experts) * (alignment - 1)
    return -(-most // alignment) * alignment


def plan(experts: Tensor, n_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each token's choices go.

    Args:
        experts: `[T, k]`, integers in `0 .. E-1`, distinct in a row.
        n_experts: E.
        alignment: each group is filled up to a multiple of so many rows; an expert without tokens has none.

    Returns:
        counts int32 `[E]`: tokens of each expert.
        ends int32 `[E]`: the row behind each group.
        position int32 `[T, k]`: the row of each choice.
        source int32 `[M]`: of each row, the choice `t * k + j` that it holds, or -1.

    Raises:
        ValueError: for a shape that does not fit.
    """
    if experts.dim() != 2 or alignment < 1:
        raise ValueError(
            f"expected choices [T, k] and an alignment of at least 1, got {list(experts.shape)}, {alignment}"
        )
    rows = rows_for(experts.numel(), n_experts, alignment)
    if not float8.uses_kernel(experts) or not experts.numel():
        return reference.plan(experts, n_experts, alignment, rows)
    return _plan_kernel().plan(experts.contiguous(), n_experts, alignment, rows)


def permute(x: Tensor, source: Tensor, scores: Tensor | None, top_k: int) -> Tensor:
    """Rows of tokens to the rows of groups.

    Args:
        x: `[T, D]`, any floating dtype.
        source: int32 `[M]`, from `plan`.
        scores: fp32 `[T, k]`, factors; None: 1.
        top_k: k.

    Returns:
        `[M, D]` in x's dtype: `x[t] * scores[t, j]` in fp32, rounded once, or zero where a row holds nothing.
    """
    if not _uses_kernel(x, source):
        return reference.permute(x, source, scores, top_k)
    return _kernel().to_groups(_dense(x), source, _flat(scores), top_k, None)[0]


def unpermute(y: Tensor, position: Tensor, scores: Tensor | None) -> Tensor:
    """Rows of groups back to tokens.

    Args:
        y: `[M, D]`, any floating dtype.
        position: int32 `[T, k]`, from `plan`.
        scores: fp32 `[T, k]`, factors; None: 1.

    Returns:
        `[T, D]` in y's dtype: the sum over j of `y[position[t, j]] * scores[t, j]` in fp32, rounded once.
    """
    if not _uses_kernel(y, position):
        return reference.unpermute(y, position, scores)
    return _kernel().to_tokens(_dense(y), position, _flat(scores), None)[0]


def permute_backward(grad: Tensor, x: Tensor, position: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `permute(x, source, scores, k)`, of x `[T, D]` and of scores fp32 `[T, k]`, for that of its result
    `[M, D]`: `unpermute(grad, position, scores)`, and the inner products of tokens with their rows of grad."""
    if not _uses_kernel(grad, position):
        return reference.unpermute(grad, position, scores), reference.row_products(x, grad, position)
    return _kernel().to_tokens(_dense(grad), position, _flat(scores), _dense(x))


def unpermute_backward(
    grad: Tensor, y: Tensor, position: Tensor, source: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute(y, position, scores)`, of y `[M, D]` and of scores fp32 `[T, k]`, for that of its result
    `[T, D]`: `permute(grad, source, scores, k)`, and the inner products of tokens of grad with their rows of y."""
    top_k = position.shape[1]
    if not _uses_kernel(grad, position):
        return reference.permute(grad, source, scores, top_k), reference.row_products(grad, y, position)
    return _kernel().to_groups(_dense(grad), source, _flat(scores), top_k, _dense(y))


def row_products(x: Tensor, y: Tensor, position: Tensor) -> Tensor:
    """Inner products of tokens with their rows: fp32 `[T, k]`, of x `[T, D]` with y `[M, D]` at position `[T, k]`."""
    if not _uses_kernel(x, position):
        return reference.row_products(x, y, position)
    return _kernel().row_products(_dense(x), _dense(y), position)


def _uses_kernel(x: Tensor, places: Tensor) -> bool:
    return float8.uses_kernel(x) and places.numel() > 0


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _flat(scores: Tensor | None) -> Tensor | None:
    return None if scores is None else scores.contiguous()


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.moe.kernel")


@functools.cache
def _plan_kernel() -> ModuleType:
    return importlib.import_module("titan_fp8.kernels.moe.plan_kernel")
