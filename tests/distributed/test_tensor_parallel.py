"""Tensor and sequence parallelism against one process: the same losses, gradients and weights, by name."""

from dataclasses import replace

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import FLOAT8, FP32, Case, assert_same, train_alone, train_on_ranks

DIMS = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128}
BLOCK_DIMS = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 256, "n_layers": 2}
TP2 = Case(tensor=2, vocab_size=68, dims=DIMS)
LOCAL_SCALES = 0.15
"""Under context parallelism each rank's tokens have scales of their own, so the codes are others than one process has:
gradients differ by the rounding of float8."""

CASES = {
    "tp2": (TP2, FP32),
    "tp2_gathered_logits": (replace(TP2, loss_parallel=False), FP32),
    "tp2_tied": (replace(TP2, tied_embeddings=True), FP32),
    "tp4_one_head_each": (replace(TP2, tensor=4, dims=DIMS | {"n_kv_heads": 4}), FP32),
    "tp2_fsdp2_accumulating": (replace(TP2, shard=2, microbatches=2), FP32),
    "tp2_hsdp_full_ac": (replace(TP2, replicate=2, activation_checkpoint={"mode": "full"}), FP32),
    "tp2_tensorwise": (replace(TP2, float8_recipe="tensorwise"), FLOAT8),
    "tp2_rowwise": (replace(TP2, float8_recipe="rowwise"), FLOAT8),
    "tp2_rowwise_with_gw_hp": (replace(TP2, float8_recipe="rowwise_with_gw_hp"), FLOAT8),
    "tp2_blockwise": (replace(TP2, float8_recipe="blockwise", dims=BLOCK_DIMS), FLOAT8),
    "tp2_fsdp2_tensorwise_all_gather": (
        replace(TP2, shard=2, float8_recipe="tensorwise", float8_all_gather=True, precomputed_scales=True),
        FLOAT8,
    ),
    "tp2_cp2": (replace(TP2, context=2), FP32),
    "tp2_cp2_tensorwise": (replace(TP2, context=2, float8_recipe="tensorwise"), LOCAL_SCALES),
    "cp2_fsdp2_rowwise_all_gather": (
        replace(TP2, tensor=1, context=2, shard=2, float8_recipe="rowwise", float8_all_gather=True),
        LOCAL_SCALES,
    ),
    "tp2_fsdp2_rowwise_all_gather": (
        replace(TP2, shard=2, float8_recipe="rowwise", float8_all_gather=True),
        FLOAT8,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tensor_parallel_training_equals_one_process(name: str) -> None:
    case, tolerance = CASES[name]
    assert_same(run_distributed(train_on_ranks, case.ranks, case)[0], train_alone(case), tolerance)
