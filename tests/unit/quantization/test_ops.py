"""The custom operators: what they promise the compiler is what they do, and checkpointing can name the products."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from titan_fp8.kernels.float8 import E4M3
from titan_fp8.quantization import ops
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES, get_recipe

X = torch.randn(21, 48, generator=torch.Generator().manual_seed(0))
AMAX = ops.amax(X)
CODES, SCALE = ops.cast_rows(X, E4M3)
WIDE = torch.randn(200, 384, generator=torch.Generator().manual_seed(1))
BLOCKS, BLOCK_SCALE = ops.cast_block_rows(WIDE, E4M3, False)
TILES, TILE_SCALE = ops.cast_blocks(WIDE[:128], E4M3, False)
CALLS = [
    (ops.amax, (X,)),
    (ops.cast_tensor, (X, AMAX, E4M3)),
    (ops.cast_tensor_columns, (X.t(), AMAX, E4M3)),
    (ops.cast_tensor_both, (X, AMAX, E4M3)),
    (ops.cast_rows, (X.bfloat16(), E4M3)),
    (ops.cast_columns, (X, E4M3)),
    (ops.cast_rows_and_columns, (X.t(), E4M3)),
    (ops.columns_from_rows, (CODES, SCALE)),
    (ops.scaled_mm, (CODES, CODES, SCALE, SCALE, None, torch.bfloat16, True, True)),
    (ops.scaled_mm, (CODES, CODES, SCALE, SCALE[0, 0], None, torch.bfloat16, True, True)),
    (ops.transpose_codes, (CODES[:16],)),
    (ops.tensor_columns_from_rows, (CODES[:16], SCALE[:16])),
    (ops.cast_block_rows, (WIDE, E4M3, False)),
    (ops.cast_block_rows, (WIDE[:1, :128], E4M3, False)),
    (ops.cast_block_columns, (WIDE, E4M3, True)),
    (ops.cast_block_both, (WIDE[:, :256], E4M3, False)),
    (ops.cast_block_both, (WIDE.t()[:256, :128].bfloat16(), E4M3, True)),
    (ops.cast_blocks, (WIDE[:128], E4M3, False)),
    (ops.scaled_mm_blockwise, (BLOCKS, TILES, BLOCK_SCALE, TILE_SCALE, None, torch.bfloat16, True, True)),
    (ops.scaled_mm_blockwise, (TILES, TILES, *2 * (WIDE[:3, :128].t(),), None, torch.float32, False, True)),
    (ops.sum_rows, (X,)),
    (ops.high_precision_mm, (X.bfloat16(), WIDE[:1].bfloat16().expand(X.shape[0], -1), torch.float32)),
]


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[str(op) for op, _ in CALLS])
def test_fake_implementation_and_schema_agree_with_the_operator(op, arguments: tuple) -> None:
    # The schema check does arithmetic on its inputs, which float8 tensors do not have.
    takes_codes = any(isinstance(a, Tensor) and a.dtype == E4M3 for a in arguments)
    utils = ("test_faketensor",) if takes_codes else ("test_schema", "test_faketensor")
    torch.library.opcheck(op, arguments, test_utils=utils)


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[str(op) for op, _ in CALLS])
def test_strides_of_fake_and_real_results_agree(op, arguments: tuple) -> None:
    def strides(results: Tensor | tuple[Tensor, ...]) -> list:
        results = (results,) if isinstance(results, Tensor) else results
        return [(r.shape, r.stride(), r.dtype) for r in results]

    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
    assert strides(op(*arguments)) == strides(op(*meta))


EMPTY = torch.empty(0, 256)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (ops.cast_block_rows, (EMPTY, E4M3, False)),
        (ops.cast_block_columns, (EMPTY, E4M3, False)),
        (ops.cast_block_both, (EMPTY, E4M3, False)),
        (ops.cast_rows_and_columns, (EMPTY, E4M3)),
    ],
    ids=str,
)
def test_casts_of_no_tokens_have_the_strides_of_the_fake(op, arguments: tuple) -> None:
    test_strides_of_fake_and_real_results_agree(op, arguments)


class CountCalls(TorchDispatchMode):
    """Counts the operators of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "titan_fp8":
            self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def test_recipes_of_other_stacks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"delayed.*not supported yet"):
        get_recipe("delayed")
    with pytest.raises(ValueError, match=r"did you mean \"rowwise\""):
        get_recipe("rowise")
    assert get_recipe(None).name == "tensorwise"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_runs_three_products_and_selective_checkpointing_keeps_the_first(recipe: str) -> None:
    linear = Float8Linear.from_linear(torch.nn.Linear(128, 128), Float8Config(RECIPES[recipe], emulate=True))
    x = torch.randn(21, 128, requires_grad=True)
    count = 3 if RECIPES[recipe].grad_weight_in_float8 else 2

    def products(forward) -> int:
        with CountCalls() as counter:
            forward().sum().backward()
        return sum(counter.calls[op] for op in ops.GEMM_OPS)

    def context():
        return create_selective_checkpoint_contexts(list(ops.GEMM_OPS))

    assert products(lambda: linear(x)) == count
    assert products(lambda: checkpoint(linear, x, use_reentrant=False)) == count + 1
    plain = torch.autograd.grad(linear(x).square().sum(), x)[0]
    assert products(lambda: checkpoint(linear, x, use_reentrant=False, context_fn=context)) == count
    again = checkpoint(linear, x, use_reentrant=False, context_fn=context)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)
