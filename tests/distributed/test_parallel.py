"""Data parallelism against one process: on several ranks, the same losses and gradients, by name.

Each case trains a tiny decoder for three steps of SGD on several gloo processes, every rank on its part of the
batch, and is compared with one process, without any wrapper, that accumulates gradients over the same parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.distributed.harness import run_distributed
from tests.distributed.meshes import mesh_of
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.models.loss import cross_entropy_sum
from titan_fp8.parallel.apply import materialize, parallelize
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection, ParallelismSection
from titan_fp8.parallel.context import ContextParallel, context_parallel
from titan_fp8.parallel.degrees import MeshDegrees
from titan_fp8.parallel.fsdp import set_gradient_sync
from titan_fp8.parallel.mesh import ParallelMesh
from titan_fp8.parallel.tensor import vocab_parallel_loss
from titan_fp8.quantization.fsdp_weight import precompute_float8_dynamic_scale_for_fsdp, wrap_weights_for_fsdp
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES

BeforePart = Callable[[bool], None]  # is it the last microbatch?
STEPS, ROWS, SEQ_LEN = 3, 8, 16  # rows of the global batch, whatever the number of ranks


@dataclass(frozen=True)
class Case:
    """One training: the model, how it is spread, what else is applied to it."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1
    loss_parallel: bool = True
    vocab_size: int = 67  # no multiple of 2 or 4: uneven shards
    tied_embeddings: bool = False
    compute_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    microbatches: int = 1
    float8_recipe: str | None = None
    filtered: tuple[str, ...] = ()  # linears of every block that stay in high precision
    float8_all_gather: bool = False
    keep_codes: bool = True
    precomputed_scales: bool = False
    dims: dict[str, int] = field(default_factory=dict)
    reshard: str = "default"
    activation_checkpoint: dict[str, str] = field(default_factory=lambda: {"mode": "none"})
    compile_backend: str | None = None
    overlapped: bool = False
    cpu_offload: bool = False
    batch_tokens: int | None = None
    device_type: str = "cpu"
    fsdp_exchange: str = "auto"
    gradients_stay: bool = False

    @property
    def ranks(self) -> int:
        return self.data_parts * self.tensor * self.context

    @property
    def data_parts(self) -> int:
        """Ranks that see different data."""
        return self.replicate * self.shard


@dataclass
class Trained:
    """What a training leaves: a loss a step, gradients of every step and final weights by name, whole."""

    losses: list[float]
    grads: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def built(case: Case, **float8: Any) -> Decoder:
    """The converted model of `case` on the meta device; `float8` are keys of a `Float8Config`."""
    sizes = {"dim": 48, "n_layers": 3, "n_heads": 3, "n_kv_heads": 1, "ffn_dim": 80} | case.dims
    dims = ModelDims(**sizes, vocab_size=case.vocab_size, tied_embeddings=case.tied_embeddings, max_seq_len=SEQ_LEN)
    with torch.device("meta"):
        model = Decoder(dims, compute_dtype=case.compute_dtype)
    if case.float8_recipe is not None:
        config = Float8Config(RECIPES[case.float8_recipe], emulate=case.device_type == "cpu", **float8)
        # The first layer stays in high precision: units of both kinds side by side.
        for block in list(model.layers.values())[1:]:
            for parent in (block.attention, block.feed_forward):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear) and name not in case.filtered:
                        setattr(parent, name, Float8Linear.from_linear(child, config))
    if case.float8_all_gather:
        linears = [module for module in model.modules() if isinstance(module, Float8Linear)]
        wrap_weights_for_fsdp(linears, cache=True, keep_codes=case.keep_codes)
    return model


def _train(
    case: Case, model: Decoder, parts: int, mesh: ParallelMesh | None, before_part: BeforePart = lambda is_last: None
) -> Trained:
    """Three steps, on this rank's rows of each global batch, in `parts` microbatches."""
    rank, ranks = (0, 1) if mesh is None else (mesh.data_rank, mesh.data_ranks)
    loss_fn = cross_entropy_sum
    if mesh is not None and case.tensor > 1 and case.loss_parallel:
        loss_fn = vocab_parallel_loss(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    context = None if mesh is None else context_parallel(mesh, ParallelismSection())
    generator = torch.Generator().manual_seed(1)
    result = Trained([], [], {})
    for _ in range(STEPS):
        batch = torch.randint(case.vocab_size, (ROWS, SEQ_LEN + 1), generator=generator).to(case.device_type)
        step_loss = torch.zeros((), device=case.device_type)
        for part, rows in enumerate(batch.chunk(ranks)[rank].chunk(parts)):
            before_part(part == parts - 1)
            loss = loss_fn(*_logits_and_labels(model, context, rows)) / (ROWS * SEQ_LEN)
            loss.backward()
            step_loss += loss.detach()
        if mesh is not None:
            step_loss = mesh.sum_of_losses(step_loss)
        result.losses.append(step_loss.item())
        result.grads.append({name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        if case.precomputed_scales:
            precompute_float8_dynamic_scale_for_fsdp(model)
        optimizer.zero_grad()
    result.weights = {name: _whole(p) for name, p in model.state_dict().items()}
    return result


def _logits_and_labels(model: Decoder, context: ContextParallel | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    tokens, labels = rows[:, :-1], rows[:, 1:]
    if context is None:
        return model(tokens), labels
    positions = context.positions(SEQ_LEN, tokens.device)
    return model(context.shard(tokens), seq_len=SEQ_LEN, positions=positions), context.shard(labels)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def spread(case: Case, **float8: Any) -> tuple[Decoder, ParallelMesh]:
    """The model of `case` with its initial weights, on the mesh of all ranks; `float8` are keys of a `Float8Config`."""
    if case.compile_backend is not None:
        torch._dynamo.reset()  # what earlier cases compiled counts against the limit of recompilations
    model = built(case, **float8)
    mesh = mesh_of(
        MeshDegrees(
            data_parallel_replicate=case.replicate,
            data_parallel_shard=case.shard,
            tensor=case.tensor,
            context=case.context,
        ),
        case.device_type,
    )
    parallelize(
        model,
        mesh=mesh,
        parallelism=ParallelismSection(
            fsdp_reshard_after_forward=case.reshard,
            fsdp_exchange=case.fsdp_exchange,
            disable_loss_parallel=not case.loss_parallel,
            enable_async_tensor_parallel=case.overlapped,
        ),
        activation_checkpoint=ActivationCheckpointSection(**case.activation_checkpoint),
        compile_config=CompileSection(enable=case.compile_backend is not None, backend=case.compile_backend or "eager"),
        param_dtype=case.compute_dtype,
        reduce_dtype=case.reduce_dtype,
        cpu_offload=case.cpu_offload,
        batch_tokens=case.batch_tokens,
        microbatches=case.microbatches,
        gradients_stay=case.gradients_stay,
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, torch.device(case.device_type), cpu_offload=case.cpu_offload)
    initialize(model, seed=7, device=torch.device(case.device_type))
    return model, mesh


def train_on_ranks(rank: int, world_size: int, case: Case) -> Trained | None:
    """Rank 0 returns the training; the process group is there."""
    model, mesh = spread(case)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert isinstance(model, FSDPModule)

    def before_part(is_last: bool) -> None:
        set_gradient_sync(model, mesh, is_last_microbatch=is_last)

    trained = _train(case, model, case.microbatches, mesh, before_part)
    return trained if rank == 0 else None


def train_alone(case: Case) -> Trained:
    """The same training in this process, accumulating over what the ranks and microbatches of `case` would see."""
    case = replace(case, float8_all_gather=False)
    model = built(case)
    materialize(model, torch.device(case.device_type))
    initialize(model, seed=7, device=torch.device(case.device_type))
    return _train(case, model, case.data_parts * case.microbatches, None)


def assert_same(actual: Trained, expected: Trained, tolerance: float) -> None:
    """Losses, gradients and weights agree in name and, within the relative `tolerance`, in value."""
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance, abs=0)
    assert list(actual.weights) == list(expected.weights)
    for step, (grads, wanted) in enumerate(zip(actual.grads, expected.grads, strict=True)):
        assert list(grads) == list(wanted)
        for name, grad in wanted.items():
            assert grads[name].dtype == torch.float32, name
            error = (grads[name] - grad).norm() / grad.norm()
            assert error <= tolerance, f"step {step}, {name}: relative error {error:.2e}"
    for name, weight in expected.weights.items():
        assert (actual.weights[name] - weight).norm() <= tolerance * weight.norm(), name


# Two addends have one sum, so two ranks repeat one process to the bit, in every precision. Four addends have many: fp32
# differs in its last bits, and float8 codes of weights that differ in the last bit differ now and then by one code.
SAME_BITS, FP32, FLOAT8 = 0.0, 1e-6, 1e-2
BF16_SUMS = 1e-2
"""Gradients that are rounded to bf16 before and after they are summed."""

CASES = {
    "fsdp2": (Case(shard=2), SAME_BITS),
    "fsdp4": (Case(shard=4), FP32),
    "hsdp_2x2": (Case(replicate=2, shard=2), FP32),
    "ddp2": (Case(replicate=2), SAME_BITS),
    "ddp4_tied_accumulating": (Case(replicate=4, tied_embeddings=True, microbatches=2), FP32),
    "hsdp_accumulating": (Case(replicate=2, shard=2, microbatches=2), FP32),
    "fsdp_accumulating": (Case(shard=2, microbatches=4), FP32),
    "fsdp4_tied": (Case(shard=4, tied_embeddings=True), FP32),
    "fsdp4_with_empty_shards": (Case(shard=4, vocab_size=5), FP32),
    "fsdp_always_resharded": (Case(shard=2, reshard="always"), SAME_BITS),
    "fsdp_never_resharded": (Case(shard=2, reshard="never"), SAME_BITS),
    "fsdp_bf16": (Case(shard=2, compute_dtype=torch.bfloat16), SAME_BITS),
    "ddp_bf16_tied": (Case(replicate=2, tied_embeddings=True, compute_dtype=torch.bfloat16), SAME_BITS),
    "fsdp_bf16_sums": (Case(shard=2, reduce_dtype=torch.bfloat16, microbatches=2), BF16_SUMS),
    "hsdp_bf16_sums": (Case(replicate=2, shard=2, reduce_dtype=torch.bfloat16, microbatches=2), BF16_SUMS),
    "fsdp_full_ac": (Case(shard=2, activation_checkpoint={"mode": "full"}), SAME_BITS),
    "fsdp_selective_op_ac": (Case(shard=2, activation_checkpoint={"selective_ac_option": "op"}), SAME_BITS),
    "fsdp_tensorwise": (Case(shard=2, float8_recipe="tensorwise"), SAME_BITS),
    "fsdp_rowwise_bf16_op_ac": (
        Case(
            shard=2,
            float8_recipe="rowwise",
            compute_dtype=torch.bfloat16,
            activation_checkpoint={"selective_ac_option": "op"},
        ),
        SAME_BITS,
    ),
    "hsdp_tensorwise_bf16": (
        Case(replicate=2, shard=2, float8_recipe="tensorwise", compute_dtype=torch.bfloat16),
        FLOAT8,
    ),
    "fsdp_compiled_op_ac": (
        Case(
            shard=2,
            compile_backend="aot_eager",
            activation_checkpoint={"selective_ac_option": "op"},
            float8_recipe="tensorwise",
        ),
        SAME_BITS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_training_on_several_ranks_equals_one_process(name: str) -> None:
    case, tolerance = CASES[name]
    assert_same(run_distributed(train_on_ranks, case.ranks, case)[0], train_alone(case), tolerance)


class _Sums(TorchDispatchMode):
    """Notes the dtypes in which gradients are summed over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in func.name() or "allreduce" in func.name():
            self.dtypes |= {each.dtype for each in tree_iter(args) if isinstance(each, Tensor)}
        return func(*args, **(kwargs or {}))


def _dtypes_of_sums(rank: int, world_size: int, case: Case) -> set[torch.dtype]:
    model, _ = spread(case)
    loss = cross_entropy_sum(
        model(torch.zeros(2, SEQ_LEN, dtype=torch.int64)), torch.zeros(2, SEQ_LEN, dtype=torch.int64)
    )
    with _Sums() as sums:
        loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    return sums.dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("replicate", [1, 2])
def test_gradients_travel_in_the_reduce_dtype(dtype: torch.dtype, replicate: int) -> None:
    case = Case(shard=2, replicate=replicate, reduce_dtype=dtype)
    assert run_distributed(_dtypes_of_sums, case.ranks, case) == [{dtype}] * case.ranks


def test_one_process_on_the_whole_batch_has_the_gradients_of_four_ranks() -> None:
    whole = train_alone(Case())
    assert_same(run_distributed(train_on_ranks, 4, Case(shard=4))[0], whole, FP32)
