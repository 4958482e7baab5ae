"""Exchanges of tensor parallelism that overlap with products: what is found in a block's graphs, and the same training.

On CPUs the operators exchange and multiply one after the other; the graphs are those of a GPU.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.profiler import profile

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import (
    FLOAT8,
    ROWS,
    SEQ_LEN,
    Case,
    Trained,
    assert_same,
    spread,
    train_alone,
    train_on_ranks,
)
from tests.distributed.test_tensor_parallel import BLOCK_DIMS, TP2

GATHERS, SCATTERS = "titan_fp8::gather_products", "titan_fp8::products_scatter"
BARE_GATHERS, BARE_SCATTERS = "_c10d_functional::all_gather_into_tensor", "_c10d_functional::reduce_scatter_tensor"
OVERLAPPED = replace(TP2, compile_backend="inductor", overlapped=True)
PER_OP = {"selective_ac_option": "op"}
COMPILED_FP32 = 1e-5

# Case, (gathers, sums) that overlap and all gathers of a block's forward pass and of its backward pass, tolerance. A
# pass has two gathers and two sums: for attention and for feed-forward.
CASES = {
    "fp32": (OVERLAPPED, [(2, 2, 2), (2, 2, 2)], COMPILED_FP32),
    "tensorwise": (replace(OVERLAPPED, float8_recipe="tensorwise"), [(2, 2, 2), (2, 2, 2)], FLOAT8),
    # Its scales are gathered beside the codes, inside of the same operator.
    "rowwise": (replace(OVERLAPPED, float8_recipe="rowwise"), [(2, 2, 4), (2, 2, 4)], FLOAT8),
    # What is gathered in high precision and then cast has no product beside it; but wk has in forward.
    "rowwise_with_gw_hp but wk, w1": (
        replace(OVERLAPPED, float8_recipe="rowwise_with_gw_hp", filtered=("wk", "w1")),
        [(2, 2, 2), (0, 2, 2)],
        FLOAT8,
    ),
    "blockwise": (
        replace(OVERLAPPED, float8_recipe="blockwise", dims=BLOCK_DIMS),
        [(0, 2, 2), (0, 2, 2)],
        FLOAT8,
    ),
}
SLOW = {
    "bf16": replace(OVERLAPPED, compute_dtype=torch.bfloat16),
    "full_ac": replace(OVERLAPPED, activation_checkpoint={"mode": "full"}),
    "tensorwise_op_ac": replace(OVERLAPPED, float8_recipe="tensorwise", activation_checkpoint=PER_OP),
    "rowwise_full_ac": replace(OVERLAPPED, float8_recipe="rowwise", activation_checkpoint={"mode": "full"}),
    "tensorwise_fsdp2_all_gather": replace(
        OVERLAPPED, shard=2, float8_recipe="tensorwise", float8_all_gather=True, microbatches=2
    ),
    "tensorwise_tp4": replace(OVERLAPPED, tensor=4, float8_recipe="tensorwise", dims=TP2.dims | {"n_kv_heads": 4}),
}


def _train_and_count(rank: int, world_size: int, case: Case) -> tuple[Trained | None, list[Counter], float]:
    """The training; how often a float8 block's forward and backward pass run each operator; and how far the logits of
    an evaluation of other sizes, whose lengths the compiler makes variables, are from those of eager code."""
    trained = train_on_ranks(rank, world_size, case)
    model, _ = spread(case)
    eager, _ = spread(replace(case, overlapped=False, compile_backend=None))
    block = list(model.layers.values())[-1]
    model(torch.zeros(ROWS, SEQ_LEN, dtype=torch.int64)).sum().backward()  # compiles
    shape = 1, ROWS * SEQ_LEN // case.tensor, model.dims.dim
    x = torch.randn(shape, dtype=case.compute_dtype, requires_grad=True)
    with profile() as forward:
        y = block(x, model.rope(SEQ_LEN, x.device))
    with profile() as backward:
        y.sum().backward()
    tokens = torch.arange(3 * 8).view(3, 8)
    with torch.no_grad():
        logits, expected = model(tokens), eager(tokens)
    difference = ((logits - expected).norm() / expected.norm()).item()
    return trained, [Counter(event.name for event in run.events() or []) for run in (forward, backward)], difference


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", some_by_hand(CASES, "fp32", "rowwise", "rowwise_with_gw_hp but wk, w1", "blockwise"))
def test_a_block_overlaps_its_exchanges_and_trains_as_one_process(name: str) -> None:
    case, expected, tolerance = CASES[name]
    ranks = run_distributed(_train_and_count, case.ranks, case, timeout_s=280)
    for _, passes, difference in ranks:
        # On CPUs the operators call the collectives, so nothing is exchanged beside them if these are as many.
        assert [(counts[GATHERS], counts[SCATTERS], counts[BARE_GATHERS]) for counts in passes] == expected
        assert [counts[BARE_SCATTERS] for counts in passes] == [2, 2]
        assert difference <= tolerance
    assert_same(ranks[0][0], train_alone(case), tolerance)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SLOW)
def test_overlapped_and_plain_exchanges_train_alike(name: str) -> None:
    case = SLOW[name]
    trained = run_distributed(train_on_ranks, case.ranks, case, timeout_s=280)[0]
    plain = run_distributed(train_on_ranks, case.ranks, replace(case, overlapped=False), timeout_s=280)[0]
    assert_same(trained, plain, COMPILED_FP32 if case.compute_dtype == torch.float32 else FLOAT8)
