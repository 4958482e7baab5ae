"""Experts on two GPUs over NCCL, through the trainer: dealt out, divided, sharded and gathered as float8 codes, with
exchanges that overlap and tokens that travel as codes; native products.

Losses and norms of the gradients follow those of one GPU with the same converters. Sums over ranks and products have
another order there, and a token that stands between two experts may go to the other one, so they are near, not equal.

Beside trainings: how often the CPU waits for the device, and grouped products on a device that is not the current one.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from tests.distributed.trainings import Mesh, Run, train
from tests.gpu.test_moe import decoder
from tests.unit.converters.test_other_experts import RAGGED, converted, inputs
from tests.unit.converters.test_other_experts import run as run_layer
from titan_fp8.converters.api import convert_to_float8_grouped_training
from titan_fp8.kernels import float8, grouped
from titan_fp8.kernels.moe.functions import plan
from titan_fp8.models.moe import MoE
from titan_fp8.parallel.activation_checkpoint import apply_activation_checkpointing
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.distributed import destroy, init_distributed, local_device
from titan_fp8.parallel.expert import apply_expert_parallel
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


# ---- waits of the CPU for the device


@contextmanager
def _counting_waits(counts: list[int]) -> Iterator[None]:
    """Appends how often the CPU waited for the device within; waits of the autograd engine's threads too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts.append(sum("called a synchronizing CUDA operation" in str(each.message) for each in caught))


@dataclass(frozen=True)
class Waits:
    """Of one pass forward and one backward.

    Attributes:
        layers: with experts.
        routed: how often one of these chose experts, forward and backward.
        waits: of the CPU for the device, forward and backward.
    """

    layers: int
    routed: tuple[int, int]
    waits: tuple[int, int]


def _waits_of(world_size: int, *, in_float8: bool, recomputed: bool) -> Waits:
    model = decoder("qwen3_moe")
    if in_float8:
        convert_to_float8_grouped_training(model)
    apply_expert_parallel(model, mesh_of(MeshDegrees(data_parallel_shard=world_size, expert=world_size), "cuda"))
    if recomputed:
        section = ActivationCheckpointSection(mode="full")
        apply_activation_checkpointing(model, section, compile_config=CompileSection(), around_experts=True)
    calls: list[str] = []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.router.register_forward_hook(lambda *_: calls.append("routed"))
    tokens = torch.randint(2048, (2, 128), generator=torch.Generator().manual_seed(0)).cuda()
    for _ in range(2):  # kernels are compiled, communicators made, and memory is there
        model(tokens).sum().backward()
    torch.cuda.synchronize()
    calls.clear()
    waits: list[int] = []
    with _counting_waits(waits):
        loss = model(tokens).sum()
    forward = len(calls)
    with _counting_waits(waits):
        loss.backward()
    return Waits(len(layers), (forward, len(calls) - forward), (waits[0], waits[1]))


def _count_waits(rank: int, world_size: int, folder: str) -> dict[tuple[bool, bool], Waits]:
    """By "in float8" and "recomputed"."""
    init_distributed(CommSection(), local_device("cuda"), folder)
    try:
        return {
            (in_float8, recomputed): _waits_of(world_size, in_float8=in_float8, recomputed=recomputed)
            for in_float8 in (False, True)
            for recomputed in (False, True)
        }
    finally:
        destroy()


def test_the_cpu_waits_once_a_layer_for_the_numbers_of_tokens_and_not_in_recomputation(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = str(tmp_path_factory.mktemp("waits"))
    for by_case in run_distributed(_count_waits, 2, folder, init=False, timeout_s=TIMEOUT_S):
        for (_, recomputed), found in by_case.items():
            assert found.layers == 4
            assert found.routed == (4, 4 if recomputed else 0)
            assert found.waits == (4, 0), by_case


# ---- a device that is not the current one

E4M3 = torch.float8_e4m3fn
GROUPS = [32, 0, 64, 16]


def _kernels_on(device: str) -> dict[str, Tensor]:
    """What the kernels of experts give for operands on a device, whichever is the current one."""

    def random(*shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    rows, k, n, experts = sum(GROUPS), 128, 64, len(GROUPS)
    ends = torch.tensor(GROUPS).cumsum(0).int().to(device)
    x, grad, gate, up = random(rows, k), *(random(rows, n, seed=seed) for seed in (1, 2, 3))
    codes, scale, codes_t, scale_t = grouped.cast_both(x, ends, E4M3)
    w_codes, w_scale = float8.cast_rows(random(experts * n, k, seed=4), E4M3)
    w = w_codes.view(experts, n, k), w_scale.view(experts, n)
    g_codes, g_scale, g_codes_t, g_scale_t = grouped.cast_both(grad, ends, E4M3)
    back = grouped.columns_of_experts(*w)
    tokens = random(48, k, seed=5)
    choices = torch.rand(48, 2 * experts, generator=torch.Generator().manual_seed(6)).topk(2).indices.to(device)
    _, gathered_ends, _, source = plan(choices, 2 * experts, 16)
    assert grouped.multiplies(codes)
    of_gate, of_up, hidden = grouped.swiglu_backward(grad, gate, up, ends, E4M3)
    *of_rows, gathered_t, gathered_scale_t = grouped.gather(tokens, source, None, 2, gathered_ends, E4M3)
    filled = int(gathered_ends[-1])
    results = {
        "cast": (codes, scale, codes_t, scale_t),
        "columns of weights": back,
        "gather": (*(each[:filled] for each in of_rows), gathered_t[:, :filled], gathered_scale_t),
        "swiglu": grouped.swiglu_rows(gate, up, E4M3),
        "backward of swiglu": (*of_gate, *of_up, *hidden),
        "output, fast": (grouped.mm_rows(codes, w[0], scale, w[1], ends, torch.bfloat16, True),),
        "output": (grouped.mm_rows(codes, w[0], scale, w[1], ends, torch.bfloat16, False),),
        "grad_input": (grouped.mm_rows(g_codes, back[0], g_scale, back[1], ends, torch.bfloat16, False),),
        "grad_weight": (grouped.mm_columns(g_codes_t, codes_t, g_scale_t, scale_t, ends, torch.float32),),
    }
    named = {f"{name} {number}": each for name, some in results.items() for number, each in enumerate(some)}
    for aligned, sizes in ((True, GROUPS), (False, RAGGED)):
        layer = converted(emulate=False, aligned_groups=aligned).to(device)
        products = run_layer(layer, *(each.to(device) for each in inputs(sizes, torch.bfloat16)))
        named |= {f"{'aligned' if aligned else 'ragged'} experts: {name}": each for name, each in products.items()}
    return named


def _compare_devices(rank: int, world_size: int) -> dict[str, tuple[str, bool]]:
    """Device of each result of operands on the second GPU, and whether it is what the first one gives."""
    torch.cuda.set_device(0)
    here, there = (_kernels_on(device) for device in ("cuda:0", "cuda:1"))
    torch.cuda.synchronize("cuda:1")
    assert torch.cuda.current_device() == 0
    return {
        name: (str(each.device), torch.equal(each.view(torch.uint8).cpu(), here[name].view(torch.uint8).cpu()))
        for name, each in there.items()
    }


def test_kernels_and_products_of_experts_run_on_the_device_of_their_operands_though_another_is_current() -> None:
    """In a process of its own, whose device a launch on the wrong one would leave unusable."""
    (results,) = run_distributed(_compare_devices, 1, init=False, timeout_s=TIMEOUT_S)
    assert len(results) > 30
    assert {name: found for name, found in results.items() if found != ("cuda:1", True)} == {}
