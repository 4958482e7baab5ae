"""Pipelines over two GPUs and NCCL against one GPU; the trainings are those of `tests/distributed/test_pipeline.py`."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.test_pipeline import Case, Trained, assert_same, train_alone, train_in_a_pipeline
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.runtime.config import CommSection

pytestmark = pytest.mark.gpu
TIMEOUT_S = 300.0
# A GPU's attention backward adds up in an order of its own.
FP32, BF16 = 1e-4, 2e-2

BF16_CASE = Case(compute_dtype=torch.bfloat16, device_type="cuda")
CASES = {
    "1f1b": (Case(device_type="cuda"), FP32),
    "1f1b_bf16_documents": (replace(BF16_CASE, documents=True), BF16),
    "1f1b_bf16_rowwise_cached": (replace(BF16_CASE, float8_recipe="rowwise", cached_weights=True), BF16),
    "1f1b_bf16_fsdp_of_one": (replace(BF16_CASE, parallelized=True), BF16),
    "gpipe_bf16": (replace(BF16_CASE, schedule="GPipe"), BF16),
    "interleaved_bf16_tensorwise": (replace(BF16_CASE, schedule="Interleaved1F1B", float8_recipe="tensorwise"), BF16),
    "looped_bfs_bf16": (replace(BF16_CASE, schedule="LoopedBFS"), BF16),
    "interleaved_zero_bubble_bf16": (replace(BF16_CASE, schedule="InterleavedZeroBubble"), BF16),
    "zbv_bf16": (replace(BF16_CASE, schedule="ZBVZeroBubble"), BF16),
    "dualpipev_bf16_rowwise": (replace(BF16_CASE, schedule="DualPipeV", float8_recipe="rowwise"), BF16),
}


def _train_on_gpus(rank: int, world_size: int, cases: list[Case], folder: str) -> list[tuple[int, Trained]]:
    init_distributed(CommSection(), local_device("cuda"), folder)
    try:
        return [train_in_a_pipeline(rank, world_size, case) for case in cases]
    finally:
        destroy()


@pytest.fixture(scope="module")
def on_two_gpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, Trained]]]:
    """What each rank found out, by case: all in the same processes, whose start takes longer than a training."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    cases, folder = [case for case, _ in CASES.values()], str(tmp_path_factory.mktemp("two_gpus"))
    by_rank = run_distributed(_train_on_gpus, 2, cases, folder, init=False, timeout_s=TIMEOUT_S)
    return dict(zip(CASES, zip(*by_rank, strict=True), strict=True))


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_over_two_gpus_trains_as_one_gpu(
    name: str, on_two_gpus: dict[str, list[tuple[int, Trained]]]
) -> None:
    case, tolerance = CASES[name]
    assert_same(list(on_two_gpus[name]), train_alone(case), tolerance)
