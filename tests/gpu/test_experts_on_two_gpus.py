"""Experts on two GPUs over NCCL, through the trainer: dealt out, divided, sharded and gathered as float8 codes, with
exchanges that overlap and tokens that travel as codes; native products.

Losses and norms of the gradients follow those of one GPU with the same converters. Sums over ranks and products have
another order there, and a token that stands between two experts may go to the other one, so they are near, not equal.
"""

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.trainings import Mesh, Run, train
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.runtime.config import CommSection
from titan_fp8.runtime.device import detect_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
    pytest.mark.skipif(not detect_device().has_fp8_tensor_cores, reason="needs FP8 tensor cores"),
]
TIMEOUT_S = 500.0
STEPS = 4
LOSS, NORM = 5e-3, 0.1
LINEAR, GROUPED = "quantize.linear.float8", "quantize.grouped_mm.float8"
LLAMA4 = {
    "model.name": "llama4",
    "model.overrides.dim": "256",
    "model.overrides.n_layers": "2",
    "model.overrides.n_heads": "4",
    "model.overrides.n_kv_heads": "2",
    "model.overrides.aux_loss_weight": "0",
    "training.mixed_precision_param": "bfloat16",
    "training.seq_len": "256",
    "training.local_batch_size": "2",
}
DEEPSEEK = {**LLAMA4, "model.name": "deepseek_v3", "model.overrides.n_kv_heads": "None"}
FLOAT8 = {
    "model.converters": f"{LINEAR},{GROUPED}",
    f"{LINEAR}.recipe_name": "rowwise",
    f"{LINEAR}.filter_fqns": "output",
    f"{LINEAR}.emulate": "false",
    f"{LINEAR}.enable_fsdp_float8_all_gather": "true",
    f"{LINEAR}.precompute_float8_dynamic_scale_for_fsdp": "true",
    f"{GROUPED}.fqns": "experts",
}
UNSHARDED = {key: value for key, value in FLOAT8.items() if "fsdp" not in key}
TURNS = {"parallelism.expert_parallel_overlap_batches": "2"}
CODES = {"parallelism.expert_parallel_payload": "float8"}
FULL = {"activation_checkpoint.mode": "full"}
PER_OP = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
COMPILED = {"compile.enable": "true", "compile.components": "model"}
DIVIDED = {"parallelism.expert_tensor_parallel_degree": "2"}
THREE = {"model.overrides.n_experts": "3"}
"""Two shards cut each of three experts."""

CASES: dict[str, tuple[str, dict[str, str]]] = {
    "ep2": ("fsdp2 ep2", LLAMA4),
    "ep2_float8": ("fsdp2 ep2", LLAMA4 | FLOAT8),
    "ep2_float8_turns_full_ac": ("fsdp2 ep2", LLAMA4 | FLOAT8 | TURNS | FULL),
    "ep2_float8_turns_codes": ("fsdp2 ep2", LLAMA4 | FLOAT8 | TURNS | CODES),
    "ep2_float8_codes_op_ac": ("fsdp2 ep2", LLAMA4 | FLOAT8 | CODES | PER_OP),
    "ep2_float8_turns_compiled_full_ac": ("fsdp2 ep2", LLAMA4 | FLOAT8 | TURNS | COMPILED | FULL),
    "gathered_float8": ("fsdp2", LLAMA4 | FLOAT8),
    "gathered_float8_cut": ("fsdp2", LLAMA4 | FLOAT8 | THREE),
    "gathered_float8_compiled": ("fsdp2", LLAMA4 | FLOAT8 | COMPILED),
    "tp2_float8": ("tp2", LLAMA4 | UNSHARDED),
    "tp2_ep2_float8": ("tp2 ep2", LLAMA4 | UNSHARDED),
    "tp2_divided_float8": ("tp2", LLAMA4 | UNSHARDED | DIVIDED),
    "latent_tp2": ("tp2", DEEPSEEK),
    "latent_cp2_ep2": ("cp2 ep2", DEEPSEEK),
}


def _on_gpus(rank: int, world_size: int, jobs: list[tuple[list[str], str]]) -> list[Run]:
    place = local_device("cuda")
    init_distributed(CommSection(), place, jobs[0][1])
    try:
        runs = []
        for arguments, folder in jobs:
            torch._dynamo.reset()
            run = train(rank, world_size, arguments, folder, STEPS, place)
            run.grads = {}
            runs.append(run)
        return runs
    finally:
        destroy()


def _arguments(axes: str, options: dict[str, str]) -> list[str]:
    return Mesh(axes, tuple(options.items())).arguments()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Run]]:
    """(on two GPUs, on one) of each case, all in the same processes."""
    folder = tmp_path_factory.mktemp("experts")
    plain = {**TURNS, **CODES, **DIVIDED, **FULL, **PER_OP, **COMPILED}
    alone: dict[str, list[str]] = {}
    for name, (_, options) in CASES.items():
        kept = {key: value for key, value in options.items() if key not in plain and "fsdp" not in key}
        alone[name] = _arguments("fsdp1", kept)
    different = sorted(set(map(tuple, alone.values())))

    def jobs(listed: list[list[str]], what: str) -> list[tuple[list[str], str]]:
        folders = [folder / f"{what}{number}" for number in range(len(listed))]
        for each in folders:
            each.mkdir()
        return [(arguments, str(each)) for arguments, each in zip(listed, folders, strict=True)]

    two = [_arguments(axes, options) for axes, options in CASES.values()]
    on_two = run_distributed(_on_gpus, 2, jobs(two, "two"), init=False, timeout_s=TIMEOUT_S)[0]
    on_one = run_distributed(_on_gpus, 1, jobs([list(a) for a in different], "one"), init=False, timeout_s=TIMEOUT_S)[0]
    by_arguments = dict(zip(different, on_one, strict=True))
    return {name: (run, by_arguments[tuple(alone[name])]) for name, run in zip(CASES, on_two, strict=True)}


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("name", CASES)
def test_training_follows_that_of_one_gpu(name: str, runs: dict[str, tuple[Run, Run]]) -> None:
    on_two, on_one = runs[name]
    assert on_two.losses == pytest.approx(on_one.losses, rel=LOSS)
    assert on_two.norms == pytest.approx(on_one.norms, rel=NORM)
    assert on_two.losses[-1] < on_two.losses[0]
