"""Exchanges of tensor parallelism that overlap with products: what is found in a block's graphs, and the same training.

On CPUs the operators exchange and multiply one after the other; the graphs are those of a GPU.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.profiler import profile

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

BOTH, SUMS_ALONE = (2, 2), (0, 2)
"""(gathers, sums) of a block's pass: for attention and for feed-forward."""
CASES = {
    "fp32": (OVERLAPPED, BOTH, COMPILED_FP32),
    "tensorwise": (replace(OVERLAPPED, float8_recipe="tensorwise"), BOTH, FLOAT8),
    "rowwise": (replace(OVERLAPPED, float8_recipe="rowwise"), BOTH, FLOAT8),
    # What is gathered in high precision and then cast has no product beside it.
    "rowwise_with_gw_hp": (replace(OVERLAPPED, float8_recipe="rowwise_with_gw_hp"), SUMS_ALONE, FLOAT8),
    "blockwise": (replace(OVERLAPPED, float8_recipe="blockwise", dims=BLOCK_DIMS), SUMS_ALONE, FLOAT8),
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


def _train_and_count(rank: int, world_size: int, case: Case) -> tuple[Trained | None, list[Counter]]:
    """The training, and how often a float8 block's forward and backward pass run each operator."""
    trained = train_on_ranks(rank, world_size, case)
    model, _ = spread(case)
    block = list(model.layers.values())[-1]
    model(torch.zeros(ROWS, SEQ_LEN, dtype=torch.int64)).sum().backward()  # compiles
    shape = 1, ROWS * SEQ_LEN // case.tensor, model.dims.dim
    x = torch.randn(shape, dtype=case.compute_dtype, requires_grad=True)
    with profile() as forward:
        y = block(x, model.rope(SEQ_LEN, x.device))
    with profile() as backward:
        y.sum().backward()
    return trained, [Counter(event.name for event in run.events() or []) for run in (forward, backward)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_a_block_overlaps_its_exchanges_and_trains_as_one_process(name: str) -> None:
    case, (gathers, sums), tolerance = CASES[name]
    ranks = run_distributed(_train_and_count, case.ranks, case, timeout_s=280)
    for _, passes in ranks:
        for counts in passes:
            assert (counts[GATHERS], counts[SCATTERS]) == (gathers, sums)
            # Inside of the operators, on CPUs; rowwise also gathers its scales there.
            assert counts[BARE_SCATTERS] == sums
    assert_same(ranks[0][0], train_alone(case), tolerance)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SLOW)
def test_overlapped_and_plain_exchanges_train_alike(name: str) -> None:
    case = SLOW[name]
    trained = run_distributed(train_on_ranks, case.ranks, case, timeout_s=280)[0]
    plain = run_distributed(train_on_ranks, case.ranks, replace(case, overlapped=False), timeout_s=280)[0]
    assert_same(trained, plain, COMPILED_FP32 if case.compute_dtype == torch.float32 else FLOAT8)
