"""Pairs of a pipeline's passes in turns on four GPUs over NCCL: two stages a rank, experts dealt out to two ranks.

There a backward pass runs in a thread of autograd's, and exchanges go on beside kernels. What is trained follows what
passes one after the other train: sums of atomic additions have another order each time.
"""

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.test_pipeline_overlap import AXES, KEY, Log
from tests.distributed.trainings import COMPILED, FULL, Mesh, Options, Run, train
from tests.gpu.test_experts_on_two_gpus import LLAMA4, LOSS, NORM, STEPS, TIMEOUT_S, UNSHARDED
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.runtime.config import CommSection
from titan_fp8.runtime.device import detect_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs 4 GPUs"),
    pytest.mark.skipif(not detect_device().has_fp8_tensor_cores, reason="needs FP8 tensor cores"),
]
DUALPIPEV = {
    **LLAMA4,
    "parallelism.pipeline_parallel_schedule": "DualPipeV",
    "model.overrides.n_layers": "6",
    "training.local_batch_size": "5",
    "training.global_batch_size": "10",
}
CASES: dict[str, Options] = {
    "bf16": {},
    "bf16_full_ac": FULL,
    "float8_full_ac": UNSHARDED | FULL,
    "float8_compiled": UNSHARDED | COMPILED,
}


def _on_gpus(rank: int, world_size: int, jobs: list[tuple[list[str], str]]) -> list[tuple[Run, list[list[str]]]]:
    """Each run, and what happened in its pairs on this rank (`Log`)."""
    place = local_device("cuda")
    init_distributed(CommSection(), place, jobs[0][1])
    try:
        runs = []
        for arguments, folder in jobs:
            torch._dynamo.reset()
            log = Log()
            with log.recording():
                run = train(rank, world_size, arguments, folder, STEPS, place)
            run.grads = {}
            runs.append((run, log.pairs))
        return runs
    finally:
        destroy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[tuple[Run, list[list[str]]]]]:
    """(case, key) -> what each rank returns, all in the same processes."""
    jobs = {}
    for name, options in CASES.items():
        for key in ("true", "false"):
            mesh = Mesh(AXES, tuple({**DUALPIPEV, **options, KEY: key}.items()))
            jobs[name, key] = mesh.arguments(), str(tmp_path_factory.mktemp(name))
    ranks = run_distributed(_on_gpus, 4, list(jobs.values()), init=False, timeout_s=TIMEOUT_S)
    return dict(zip(jobs, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("name", CASES)
def test_passes_in_turns_train_as_passes_one_after_the_other(
    name: str, runs: dict[tuple[str, str], list[tuple[Run, list[list[str]]]]]
) -> None:
    overlapped, plain = runs[name, "true"][0][0], runs[name, "false"][0][0]
    assert overlapped.losses == pytest.approx(plain.losses, rel=LOSS)
    assert overlapped.norms == pytest.approx(plain.norms, rel=NORM)
    assert overlapped.losses[-1] < overlapped.losses[0]


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("name", CASES)
def test_while_tokens_of_one_pass_travel_the_other_one_is_queued(
    name: str, runs: dict[tuple[str, str], list[tuple[Run, list[list[str]]]]]
) -> None:
    of_ranks = [pairs for _, pairs in runs[name, "true"]]
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[2] == of_ranks[3]
    for pair in of_ranks[2]:
        assert "B goes" in pair[pair.index("F goes") : pair.index("F came")]
    assert all(not pairs for _, pairs in runs[name, "false"])
