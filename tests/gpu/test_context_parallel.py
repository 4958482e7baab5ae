"""Context parallelism over NCCL on two GPUs: every attention kernel in blocks, masks of documents, whole decoders.

The cases are those of `tests/distributed/test_context_parallel.py`, in lengths that kernels tile unevenly.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.test_context_parallel import (
    FULL,
    METHODS,
    PER_OP,
    Attended,
    Computed,
    Job,
    assert_same_attention,
    assert_same_decoder,
    attend_alone,
    attend_on_ranks,
    compute_alone,
    compute_on_ranks,
)
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.runtime.config import CommSection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]
TIMEOUT_S = 300.0
FP32, BF16 = 1e-5, 2e-2
CUDA = {"device_type": "cuda", "head_dim": 64, "seq_len": 4 * 200}

ATTENDED = {
    f"{backend}_{method}_{balancer}_{str(dtype).removeprefix('torch.')}": Attended(
        method, balancer, dtype, backend, **CUDA
    )
    for method in METHODS
    for balancer in ("headtail", None)
    for backend, dtype in (
        ("flash", torch.bfloat16),
        ("cudnn", torch.bfloat16),
        ("flash4", torch.bfloat16),
        ("efficient", torch.bfloat16),
        ("efficient", torch.float32),
        ("math", torch.float32),
    )
}
LATENT = {"head_dim": 96, "value_dim": 64, "scale": 0.2, "device_type": "cuda", "seq_len": 4 * 200}
WIDE = {**CUDA, "value_dim": 96}
FAMILIES = {
    f"{kind}_{backend}_{method}_{str(dtype).removeprefix('torch.')}": Attended(
        method, "headtail", dtype, backend, **options
    )
    for kind, options in (("latent", LATENT), ("wide", WIDE), ("windows", {**CUDA, "window": 136}))
    for method in METHODS
    for backend, dtype in (
        ("flash", torch.bfloat16),
        ("cudnn", torch.bfloat16),
        ("efficient", torch.bfloat16),
        ("efficient", torch.float32),
        ("math", torch.float32),
    )
} | {
    "latent_flex_documents": Attended("allgather", "headtail", torch.bfloat16, "flex", documents=True, **LATENT),
    "wide_flex_documents": Attended("allgather", "headtail", torch.bfloat16, "flex", documents=True, **WIDE),
    "windows_flex": Attended("allgather", "headtail", torch.bfloat16, "flex", window=136, **CUDA),
    "windows_flash4": Attended("allgather", "headtail", torch.bfloat16, "flash4", window=136, **CUDA),
}
"""Values narrower and wider than keys, and windows that end within the ranks' chunks of 200 tokens."""
MASKED = {
    "flex": Attended("allgather", "headtail", torch.bfloat16, "flex", **CUDA),
    "flex_documents": Attended("allgather", "headtail", torch.bfloat16, "flex", documents=True, **CUDA),
    "flex_documents_contiguous": Attended("allgather", None, torch.bfloat16, "flex", documents=True, **CUDA),
    "efficient_documents": Attended("allgather", "headtail", torch.float32, "efficient", documents=True, **CUDA),
}
BF16_JOB = {"compute_dtype": torch.bfloat16, "device_type": "cuda", "seq_len": 256, "head_dim": 16}
JOBS = {
    "allgather": Job(attention_backend="flash", **BF16_JOB),
    "ring_full_ac": Job("alltoall", activation_checkpoint=FULL, **BF16_JOB),
    "documents": Job(documents=True, **BF16_JOB),
    "allgather_compiled_op_ac": Job(activation_checkpoint=PER_OP, compile_backend="inductor", **BF16_JOB),
    "ring_compiled": Job("alltoall", compile_backend="inductor", **BF16_JOB),
    "documents_compiled": Job(documents=True, compile_backend="inductor", **BF16_JOB),
}


def _attend_on_gpus(rank: int, world_size: int, cases: list[Attended], folder: str) -> list[list[Tensor]]:
    init_distributed(CommSection(), local_device("cuda"), folder)
    try:
        return [attend_on_ranks(rank, world_size, case) for case in cases]
    finally:
        destroy()


def _compute_on_gpus(rank: int, world_size: int, jobs: list[Job], folder: str) -> list[list[Computed]]:
    init_distributed(CommSection(), local_device("cuda"), folder)
    try:
        return [compute_on_ranks(rank, world_size, job) for job in jobs]
    finally:
        destroy()


# All cases in the same processes, whose start takes longer than the cases do.


@pytest.fixture(scope="module")
def attended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Tensor]]]:
    cases = ATTENDED | MASKED | FAMILIES
    folder = str(tmp_path_factory.mktemp("attended"))
    ranks = run_distributed(_attend_on_gpus, 2, list(cases.values()), folder, init=False, timeout_s=TIMEOUT_S)
    return dict(zip(cases, zip(*ranks, strict=True), strict=True))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Computed]]]:
    folder: Path = tmp_path_factory.mktemp("computed")
    ranks = run_distributed(_compute_on_gpus, 2, list(JOBS.values()), str(folder), init=False, timeout_s=TIMEOUT_S)
    return dict(zip(JOBS, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", ATTENDED | MASKED | FAMILIES)
@pytest.mark.timeout(TIMEOUT_S)
def test_attention_on_two_gpus_equals_one(name: str, attended: dict[str, list[list[Tensor]]]) -> None:
    case = (ATTENDED | MASKED | FAMILIES)[name]
    tolerance = FP32 if case.dtype == torch.float32 else BF16
    assert_same_attention(attended[name], attend_alone(case), case, tolerance)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.timeout(TIMEOUT_S)
def test_a_decoder_on_two_gpus_equals_one(name: str, computed: dict[str, list[list[Computed]]]) -> None:
    # Compiled code keeps fp32 where eager code rounds.
    tolerance = 5e-2 if JOBS[name].compile_backend else 3e-2
    assert_same_decoder(computed[name], compute_alone(JOBS[name]), JOBS[name], tolerance)
