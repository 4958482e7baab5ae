"""Activation checkpointing: keep less of the forward pass, compute it again in the backward pass.

The backward pass needs what the forward pass computed. Kept, it fills the memory: some thirty tensors of the size of
a block's input for every block. Four answers, from `[activation_checkpoint] mode`:

    none           keep everything.
    full           keep only each block's input and run the block again: a third more compute, least memory.
    selective "n"  as full, in the first and then every n-th block only; but in the last not unless n is 1: its backward
                   pass follows its forward pass at once, and between the two memory is fullest anyway.
    selective "op" in every block, keep the results of the expensive operations (attention, communication, every second
                   matrix product) and run the cheap rest again. What a matrix product costs to repeat is high for its
                   size; norms, casts and activations are the reverse.
    memory_budget  the compiler solves for the cheapest recomputation that keeps a given share of the memory.

The first three work on a block's `forward`, replaced on the instance. The tree of modules is left as it is, so names
of parameters and modules stay, and the compiler, applied after, sees the recomputation and can optimize across it.
"""

import functools
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_fp8.models import flash4
from titan_fp8.models.attention_backends import SDPA_OPERATORS
from titan_fp8.models.decoder import Decoder, TransformerBlock
from titan_fp8.models.grouped import multiply_rows
from titan_fp8.parallel.compile import compiles
from titan_fp8.parallel.config import ActivationCheckpointSection, CompileSection
from titan_fp8.parallel.context_attention import attention_op
from titan_fp8.quantization.grouped_ops import grouped_mm_rows
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.mx_grouped_ops import multiply_rows as mx_multiply_rows
from titan_fp8.quantization.mx_grouped_ops import scaled_mm_rows as mx_scaled_mm_rows
from titan_fp8.quantization.mx_linear import MXFP8Linear
from titan_fp8.quantization.mx_ops import emulated_mm, scaled_mm_op
from titan_fp8.quantization.ops import GEMM_OPS, amax
from titan_fp8.quantization.tensor_parallel import local_tensor
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.kept_results import keeping_contexts
from titan_fp8.runtime.patterns import matches
from titan_fp8.runtime.recomputation import with_memory
from titan_fp8.runtime.suggest import did_you_mean

Shape = tuple[int, int]

_aten = torch.ops.aten
# Matrix products: of their results every second one is kept.
_ATEN_GEMMS = (_aten.mm.default, _aten.addmm.default)
_MM_INTO = _aten.mm.dtype  # with the dtype of its result as a third argument
_GROUPED_GEMMS = (grouped_mm_rows, multiply_rows)
# What a router chooses: of scores that differ in their last bits, as recomputed ones may, it would choose otherwise.
_CHOICES = frozenset({_aten.topk.default})
_ALWAYS_KEPT = frozenset(
    {
        *_CHOICES,
        *SDPA_OPERATORS,
        flash4.forward,
        flex_attention,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_to_all_single.default,
        attention_op,
        amax,  # one number, which takes a read of the whole tensor
    }
)
# Backends that partition forward and backward with the solver that knows the budget.
_BUDGET_BACKENDS = ("inductor", "aot_eager_decomp_partition")


def apply_activation_checkpointing(
    model: Decoder,
    section: ActivationCheckpointSection,
    *,
    compile_config: CompileSection,
    dump_folder: Path | None = None,
    around_experts: bool = False,
    is_local: bool = False,
) -> None:
    """Apply `section` to the blocks of `model`, in place.

    Args:
        model: not yet compiled, not yet sharded.
        compile_config: how the blocks will be compiled; `memory_budget` is the compiler's work.
        dump_folder: the run's folder, where the picture of `visualize_memory_budget_pareto` goes.
        around_experts: of a block with experts, parts will be compiled and not the whole (`apply_compile`). By
            operation, these parts and the experts are then checkpointed one by one; otherwise the block is, in eager
            mode, where nothing has to be said about what to keep.
        is_local: what blocks compute needs no exchange with other ranks, the gathers of their weights aside.

    Raises:
        UserError: from `check_activation_checkpointing`.
    """
    check_activation_checkpointing(model, section, compile_config)
    if section.mode == "none":
        return
    if section.mode == "memory_budget":
        _set_memory_budget(section, dump_folder)
        return
    options: dict[str, Any] = {
        "preserve_rng_state": section.preserve_rng_state,
        "determinism_check": section.determinism_check,
        "early_stop": section.early_stop,
        "debug": section.debug,
    }
    by_operation, every = is_per_op(section), 1
    recomputed: frozenset[Shape] = frozenset()
    if by_operation:
        recomputed = _recomputed_shapes(model, section)
        options["context_fn"] = functools.partial(_per_op_contexts, recomputed)
    elif section.mode == "selective":
        every = int(section.selective_ac_option)
    is_traced = compiles(compile_config, "model")
    in_graph = options
    if not by_operation and is_traced and compile_config.backend != "eager":
        in_graph = options | {"context_fn": _recompute_all}
    for name, block in model.layers.items():
        number = int(name)  # in the whole model, of which this may be a part
        if number % every or (every > 1 and 0 < number == model.dims.n_layers - 1):
            continue
        assert isinstance(block, TransformerBlock)
        moe = block.moe
        if moe is not None and by_operation and around_experts:
            block.attend_and_norm = _checkpointed(block.attend_and_norm, options)
            moe.forward = _checkpointed(moe.forward, options)
        elif moe is not None and not by_operation and (around_experts or not is_traced):
            # By operation this would not do: there the results of exchanges are kept and handed out in their order.
            block.forward = with_memory(_checkpoint(options), block.forward)
        elif by_operation and is_local and not is_traced and _tells_what_is_kept(block):
            contexts = functools.partial(keeping_contexts, functools.partial(_Keeps, recomputed))
            block.forward = _checkpointed(block.forward, options | {"context_fn": contexts})
        else:
            block.forward = _checkpointed(block.forward, in_graph)


def check_activation_checkpointing(
    model: nn.Module, section: ActivationCheckpointSection, compile_config: CompileSection
) -> None:
    """Raise a `UserError` if `section` asks for what cannot be done with this model and this compiler.

    The cases: a memory budget without a compiler that keeps it, a picture of the budget where there is nothing to
    choose or nothing to draw with, `debug` of the per-op mode or of a compiled model, and a name in
    `per_op_sac_force_recompute_mm_shapes_by_fqns` that matches no linear (unless it is one of the default's).
    """
    if section.mode == "memory_budget":
        _check_memory_budget(section, compile_config)
    if section.mode in ("full", "selective") and section.debug and compiles(compile_config, "model"):
        raise UserError(
            "activation_checkpoint.debug records the operations of eager mode, but the model is compiled; turn one of "
            "the two off, or take `model` out of compile.components"
        )
    if not is_per_op(section):
        return
    if section.debug:
        raise UserError(
            'activation_checkpoint.debug does not work with selective_ac_option = "op", because PyTorch takes only one '
            "of the two; turn one of them off"
        )
    _recomputed_shapes(model, section)


def is_per_op(section: ActivationCheckpointSection) -> bool:
    """Whether what is kept is decided operation by operation."""
    return section.mode == "selective" and section.selective_ac_option == "op"


def _checkpoint(options: dict[str, Any]) -> Callable[..., Any]:
    return functools.partial(checkpoint, use_reentrant=False, **options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return checkpointed_forward


def _recompute_all() -> tuple[Any, Any]:
    """The pair of contexts that keeps nothing but choices, for a checkpoint inside of a compiled graph.

    That is what checkpointing does without contexts; but then the compiler of PyTorch 2.11 takes the operators inside
    an autograd function, all of a float8 linear's, as outside of what is checkpointed, and keeps their results. Outside
    of the compiler contexts are dispatch modes, which every operator goes through in Python: not there.
    """

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _CHOICES else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _per_op_contexts(recomputed_shapes: frozenset[Shape]) -> tuple[Any, Any]:
    """The pair of contexts for one pass through one block: the first pass, and its recomputation, which asks about the
    same operations in the same order."""
    keeps = {False: _Keeps(recomputed_shapes), True: _Keeps(recomputed_shapes)}  # by "is this the recomputation"

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keeps[ctx.is_recompute](op, args) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class _Keeps:
    """Whether the result of an operation is kept, in one pass through one block."""

    def __init__(self, recomputed_shapes: frozenset[Shape]) -> None:
        self._recomputed_shapes = recomputed_shapes
        self._gemms_seen = 0

    def __call__(self, op: Any, args: tuple[Any, ...]) -> bool:
        if op in _ALWAYS_KEPT:
            return True
        shape = _gemm_shape(op, args)
        if shape is None or shape in self._recomputed_shapes:
            return False
        self._gemms_seen += 1
        return self._gemms_seen % 2 == 1


def _tells_what_is_kept(block: TransformerBlock) -> bool:
    """Whether all operations of a block whose results are kept tell of themselves (`runtime/kept_results.py`), so that
    no dispatch mode need look for them: products of quantized linears do, and attention but for the compiled one."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    tell = all(isinstance(each, Float8Linear | MXFP8Linear) for each in linears)
    return tell and block.moe is None and block.attention.backend != "flex"


def _gemm_shape(op: Any, args: tuple[Any, ...]) -> Shape | None:
    """(K, N) of a matrix product `[M, K] x [K, N]`, or None if `op` is none."""
    if op in _ATEN_GEMMS:
        k, n = args[-1].shape
        return k, n
    if op in (_MM_INTO, _aten._grouped_mm.default, emulated_mm, mx_multiply_rows):  # by [E, K, N] of experts, or [K, N]
        k, n = args[1].shape[-2:]
        return k, n
    if op in GEMM_OPS or op in _GROUPED_GEMMS or op in (scaled_mm_op, mx_scaled_mm_rows):
        n, k = args[1].shape[-2:]  # the second operand is passed as rows of K
        return k, n
    return None


def _recomputed_shapes(model: nn.Module, section: ActivationCheckpointSection) -> frozenset[Shape]:
    """(K, N) of the linears that `per_op_sac_force_recompute_mm_shapes_by_fqns` names."""
    key = "per_op_sac_force_recompute_mm_shapes_by_fqns"
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    defaults = type(section).model_fields[key].get_default()
    shapes: set[Shape] = set()
    for pattern in section.per_op_sac_force_recompute_mm_shapes_by_fqns:
        found = [linear for name, linear in linears.items() if matches(pattern, name)]
        if not found and pattern not in defaults:
            raise UserError(
                f'activation_checkpoint.{key}: "{pattern}" matches no linear of the model'
                f"{did_you_mean(pattern, _suffixes(linears))}"
            )
        shapes |= {_dims_here(linear) for linear in found}
    return frozenset(shapes)


def _dims_here(linear: nn.Linear) -> Shape:
    """(K, N) of what this rank multiplies, which tensor parallelism makes a part."""
    n, k = local_tensor(linear.weight).shape
    return k, n


def _suffixes(names: Iterable[str]) -> set[str]:
    """Every tail of the dotted names: what somebody may have meant to type."""
    split = [name.split(".") for name in names]
    return {".".join(parts[start:]) for parts in split for start in range(len(parts))}


def _check_memory_budget(section: ActivationCheckpointSection, compile_config: CompileSection) -> None:
    if not compiles(compile_config, "model"):
        raise UserError(
            'activation_checkpoint.mode = "memory_budget" is carried out by the compiler, but the model is not '
            "compiled; set compile.enable with `model` among compile.components, or choose another mode"
        )
    if compile_config.backend not in _BUDGET_BACKENDS:
        raise UserError(
            f'activation_checkpoint.mode = "memory_budget": compile.backend = "{compile_config.backend}" keeps no '
            f"budget; use {' or '.join(_BUDGET_BACKENDS)}, or choose another mode"
        )
    if not section.visualize_memory_budget_pareto:
        return
    if section.memory_budget in (0, 1):
        raise UserError(
            f"activation_checkpoint.visualize_memory_budget_pareto: with memory_budget = {section.memory_budget:g} "
            "there is nothing to choose and so nothing to draw; choose a budget between 0 and 1, or turn it off"
        )
    if find_spec("matplotlib") is None:
        raise UserError(
            "activation_checkpoint.visualize_memory_budget_pareto draws with matplotlib, which is not installed; "
            "pip install matplotlib, or turn it off"
        )


def _set_memory_budget(section: ActivationCheckpointSection, dump_folder: Path | None) -> None:
    """Hand the budget to the compiler's partitioner, which reads it from a setting of its own when it compiles."""
    config = torch._functorch.config
    config.activation_memory_budget = section.memory_budget
    if section.visualize_memory_budget_pareto:
        folder = Path(dump_folder or ".") / "memory_budget_pareto"
        folder.mkdir(parents=True, exist_ok=True)
        config.visualize_memory_budget_pareto = True
        config.memory_budget_pareto_dir = str(folder)
