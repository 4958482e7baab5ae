"""Exchanges of tensor parallelism that overlap with products, on two GPUs that read each other's memory."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import Case, Trained, assert_same, train_on_ranks
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.runtime.config import CommSection

pytestmark = pytest.mark.gpu
TIMEOUT_S = 400.0
DIMS = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 512, "n_layers": 2}
PLAIN = Case(
    tensor=2, vocab_size=68, dims=DIMS, compile_backend="inductor", device_type="cuda", compute_dtype=torch.bfloat16
)
FP32 = {"compute_dtype": torch.float32}
"""With activations in bf16 one rounding changes a code, and codes of small tensors gradients by percents."""
CASES = {
    "fp32": (replace(PLAIN, **FP32), 1e-4),
    "bf16_op_ac": (replace(PLAIN, activation_checkpoint={"selective_ac_option": "op"}), 2e-2),
    "tensorwise_full_ac": (
        replace(PLAIN, float8_recipe="tensorwise", activation_checkpoint={"mode": "full"}, **FP32),
        1e-3,
    ),
    "rowwise": (replace(PLAIN, float8_recipe="rowwise", **FP32), 1e-3),
    "blockwise": (replace(PLAIN, float8_recipe="blockwise", **FP32), 1e-3),
}


OPERATORS = ("titan_fp8::gather_products", "titan_fp8::products_scatter")


def _train(rank: int, world_size: int, cases: list[Case], folder: str) -> list[tuple[Trained | None, set[str]]]:
    """Each training, and which of the operators ran in it."""
    init_distributed(CommSection(), local_device("cuda"), folder)
    results = []
    try:
        for case in cases:
            with profile(activities=[ProfilerActivity.CPU]) as run:
                trained = train_on_ranks(rank, world_size, case)
            results.append((trained, {event.name for event in run.events() or []} & set(OPERATORS)))
    finally:
        destroy()
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[Trained, set[str]]]:
    """By case, with and without overlap: all in the same processes, whose start takes longer than a training."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    cases = {(name, on): replace(case, overlapped=on) for name, (case, _) in CASES.items() for on in (False, True)}
    folder = str(tmp_path_factory.mktemp("overlap"))
    results = run_distributed(_train, 2, list(cases.values()), folder, init=False, timeout_s=TIMEOUT_S)[0]
    return dict(zip(cases, results, strict=True))


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("name", CASES)
def test_overlapped_and_plain_exchanges_train_alike(
    name: str, trained: dict[tuple[str, bool], tuple[Trained, set[str]]]
) -> None:
    (overlapped, operators), (plain, none) = trained[name, True], trained[name, False]
    assert_same(overlapped, plain, CASES[name][1])
    assert operators == set(OPERATORS[1:] if name == "blockwise" else OPERATORS)
    assert not none
