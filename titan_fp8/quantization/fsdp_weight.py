"""FSDP2 with float8 all-gather: weights travel as codes, one byte a value, in place of two or four.

    wrap_weights_for_fsdp(linears)                          at conversion, before `fully_shard`
    wrap_experts_for_fsdp(experts, names)                   likewise, weights of experts `[E, N, K]`
    wrap_mx_weights_for_fsdp(weights)                       likewise, of linears and experts in MXFP8 (`mx_sharded.py`)
    precompute_float8_dynamic_scale_for_fsdp(model)         after each optimizer step, if wanted

The codes are those that one process would compute from the whole weight (`shard_cast.py`), and forward, recomputation
and backward see the same ones. Without precomputed scales every weight's statistics are reduced by themselves when
FSDP first gathers it after a step; precomputing them needs one all-reduce for all weights of a mesh. What is kept until
the weight changes is a shard's codes, or statistics alone, from which each gather makes them.

Checkpoints are unaffected: a state dict holds plain high-precision tensors under the usual names, and takes them.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from titan_fp8.quantization.mx_sharded import MXWeightState, ShardableMXWeight
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.shard_cast import ShardAxis
from titan_fp8.quantization.shardable import ShardableWeight, local_weight
from titan_fp8.quantization.sharded_weight import ShardableFloat8Weight
from titan_fp8.quantization.weight_state import Float8WeightState, WeightState
from titan_fp8.runtime.errors import UserError

if TYPE_CHECKING:
    from titan_fp8.quantization.linear import Float8Linear


def wrap_weights_for_fsdp(linears: Iterable["Float8Linear"], *, cache: bool = False, keep_codes: bool = True) -> None:
    """Make the weights of `linears` such that FSDP2 gathers them as float8 codes. In place; before `fully_shard`.

    The weights become new parameters, so an optimizer must be built after this (as after `fully_shard`). They share
    memory with the old ones. A parameter that several of the linears share stays shared; no other module may use it.
    `fully_shard` must shard by rows, its default, with `reshard_after_forward` True, False or None: FSDP2 cannot take
    codes from a smaller mesh, which a number asks for. Weights that nobody shards compute as before.

    Args:
        linears: whose weights to gather as codes, on any device, the meta device included.
        cache: codes serve until the weight changes: they are made once an optimizer step, and whoever writes to a
            weight by other means than operations on the parameter, optimizers and `load_state_dict` must call
            `weights.mark_stale`. Otherwise they are made for every gather.
        keep_codes: codes are kept while they serve. Otherwise it is the statistics of the whole weight that serve so
            long, and each gather makes codes from them and lets go of these.

    Raises:
        UserError: linears of different recipes share a weight; nothing is changed then.
    """
    linears = list(linears)
    states: dict[int, Float8WeightState] = {}
    for linear in linears:
        recipe = linear.config.recipe
        state = Float8WeightState(recipe, caches=cache, keeps_codes=keep_codes)
        state = states.setdefault(id(linear.weight), state)
        if state.recipe != recipe:
            raise UserError(
                f"float8 linears of the recipes {state.recipe.name} and {recipe.name} share a weight, which can be "
                "gathered in one form only; give them one recipe or turn enable_fsdp_float8_all_gather off"
            )
    wrapped = {id(linear.weight): _wrap(linear.weight, states[id(linear.weight)]) for linear in linears}
    for linear in linears:
        key = id(linear.weight)
        linear.weight, linear.fsdp_weight_state = wrapped[key], states[key]
        _keep_checkpoints_plain(linear, "weight")
    _watch_optimizers()


def wrap_experts_for_fsdp(modules: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Make the weights of experts such that FSDP2 gathers them as float8 codes, as `wrap_weights_for_fsdp` does for
    linears with `cache`. `fully_shard` may cut them by experts or each expert by rows.

    Args:
        modules: experts, on any device, the meta device included; their `fsdp_weight_states` become name -> state.
        names: of their parameters `[E, N, K]`.
    """
    for module in modules:
        states = module.__dict__["fsdp_weight_states"] = {}
        for name in names:
            state = states[name] = Float8WeightState(RECIPES["rowwise"], caches=True)
            setattr(module, name, _wrap(getattr(module, name), state))
            _keep_checkpoints_plain(module, name)
    _watch_optimizers()


def wrap_mx_weights_for_fsdp(
    modules: Mapping[str, nn.Module], mode: str, *, names: Sequence[str] = ("weight",), kernel: str, cache: bool
) -> None:
    """Make the weights of linears or experts in MXFP8 such that FSDP2 gathers them as codes, as `wrap_weights_for_fsdp`
    does. Each shard must be whole blocks of 32 rows; of experts, which `fully_shard` may cut by experts too, whole
    experts or such.

    Args:
        modules: name -> `MXFP8Linear`, which gets a `fsdp_weight_state`, or experts, which get `fsdp_weight_states`.
        mode: how scales are rounded, one of `titan_fp8.kernels.mx.MODES`.
        names: of the parameters.
        kernel: what casts along N, one of `titan_fp8.kernels.mx.DIM1_KERNELS`.
        cache: see `wrap_weights_for_fsdp`.
    """
    wrapped: dict[int, tuple[nn.Parameter, MXWeightState]] = {}
    for fqn, module in modules.items():
        states: dict[str, MXWeightState] = {}
        for name in names:
            weight = getattr(module, name)
            if id(weight) not in wrapped:
                state = MXWeightState(mode, kernel, name=f"{fqn}.{name}", caches=cache)
                wrapped[id(weight)] = _wrap(weight, state), state
            parameter, states[name] = wrapped[id(weight)]
            setattr(module, name, parameter)
            _keep_checkpoints_plain(module, name)
        of_a_linear = list(names) == ["weight"]
        module.__dict__["fsdp_weight_state" if of_a_linear else "fsdp_weight_states"] = (
            states["weight"] if of_a_linear else states
        )
    _watch_optimizers()


def states_of(module: nn.Module) -> list[tuple[str, WeightState]]:
    """(parameter, its state) of each weight of a module that is made to be gathered as codes: `fsdp_weight_state` is
    that of a linear's, `fsdp_weight_states` those of several."""
    state: WeightState | None = getattr(module, "fsdp_weight_state", None)
    several: dict[str, WeightState] = getattr(module, "fsdp_weight_states", None) or {}
    return [*([] if state is None else [("weight", state)]), *several.items()]


def precompute_float8_dynamic_scale_for_fsdp(model: nn.Module) -> None:
    """Cast all weights that FSDP gathers as codes now: in float8 with one all-reduce for each distinct mesh, in MXFP8
    with no exchange, but for one gather of the scales of experts that are cut by rows. Of weights whose codes are not
    kept the scales alone are computed.

    Call it on every rank after each optimizer step. Left out are weights that are unchanged since they were cast, and
    those that are gathered at the moment or offloaded to host memory: they are cast when they are gathered next, when
    FSDP moves the latter to the device in any case. Without such weights in `model` nothing happens.
    """
    cast_ahead(model.modules())


@torch.no_grad()
def cast_ahead(modules: Iterable[nn.Module]) -> None:
    """`precompute_float8_dynamic_scale_for_fsdp` of the weights that these modules have themselves."""
    groups: dict[tuple[type[ShardableWeight], ShardAxis], list[tuple[ShardableWeight, Sequence[int]]]] = {}
    for parameter, state in _wrapped_parameters(modules):
        if not isinstance(parameter, DTensor):
            state.mark_stale()
            continue
        weight = local_weight(parameter)
        if not isinstance(weight, ShardableWeight):
            state.mark_stale()  # gathered at the moment, a DTensor where other parallelism has divided it
            continue
        if weight.device.type == parameter.device_mesh.device_type and not state.serves(weight):
            shards, shape = _shards_of(parameter, state)
            groups.setdefault((type(weight), shards), []).append((weight, shape))
    for (kind, axis), stale in groups.items():
        weights, shapes = zip(*stale, strict=True)
        kind.cast_all(weights, shapes, axis, ahead=True)


def mark_fsdp_weights_stale(modules: Iterable[nn.Module], *, but_told: bool = False) -> None:
    """Say that weights of `modules` may have been written to: codes are made anew for the next gather. On every rank.
    but_told: not those whose optimizer has told what it wrote to them, and which no cast has followed."""
    for _, state in _wrapped_parameters(modules):
        if not (but_told and state.is_told):
            state.mark_stale()


def check_gathered(weight: Tensor, of: str = "a linear", *, codes: str = "float8") -> None:
    """Raise RuntimeError unless `weight`, of a module made to be gathered as codes, is one that it can compute with."""
    if not isinstance(weight, ShardableWeight):
        raise RuntimeError(
            f"{of} that was converted for {codes} all-gather (enable_fsdp_{codes.lower()}_all_gather) has found a "
            f"{type(weight).__name__} as its weight, neither one that FSDP2 gathered as codes nor the one that "
            "conversion made: its parameter was replaced, or something else than fully_shard gathers it. Shard the "
            "converted model with fully_shard, load weights by load_state_dict, or convert without it"
        )


def _wrap(weight: Tensor, state: WeightState) -> nn.Parameter:
    return nn.Parameter(_shardable(weight.detach(), state), requires_grad=weight.requires_grad)


def _shardable(tensor: Tensor, state: WeightState) -> ShardableWeight:
    if isinstance(state, MXWeightState):
        return ShardableMXWeight(tensor, state)
    assert isinstance(state, Float8WeightState)
    return ShardableFloat8Weight(tensor, state)


def _wrapped_parameters(modules: Iterable[nn.Module]) -> list[tuple[Tensor, WeightState]]:
    """Each weight of `modules` that is made to be gathered as codes, as its module has it now, with its state."""
    found: dict[int, tuple[Tensor, WeightState]] = {}
    for module in modules:
        for name, state in states_of(module):
            found[id(state)] = getattr(module, name), state
    return list(found.values())


def _shards_of(parameter: DTensor, state: WeightState) -> tuple[ShardAxis, Sequence[int]]:
    """The axis of its mesh over which FSDP shards `parameter`, or this rank's part of it; and that part's shape."""
    mesh, shards, shape = parameter.device_mesh, ShardAxis(None, 0, 1), list(parameter.shape)
    parts = {axis.ranks for axis in state.axes}
    for number, placement in enumerate(parameter.placements):
        group = mesh.get_group(number)
        # Not by the group itself: PyTorch takes meshes of the same ranks for one, and may hand out an earlier one's.
        if tuple(dist.get_process_group_ranks(group)) in parts:
            for dim in range(len(shape)) if placement.is_shard() else ():
                shape[dim] //= mesh.size(number) if placement.is_shard(dim) else 1
        elif not placement.is_replicate():
            shards = ShardAxis(group, mesh.get_local_rank(number), mesh.size(number))
    return shards, shape


def _keep_checkpoints_plain(module: nn.Module, name: str) -> None:
    """Let state dicts give and take a plain tensor for a wrapped parameter."""
    module.register_state_dict_post_hook(functools.partial(_save_plain, name))
    module.register_load_state_dict_pre_hook(functools.partial(_load_plain, name))


@torch.no_grad()
def _save_plain(name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A state dict holds the plain tensor; the parameter itself for a caller who asked for variables."""
    weight, key = getattr(module, name), f"{prefix}{name}"
    dict(states_of(module))[name].forget_amax()  # whoever has the plain tensor may write to it
    if key in state_dict and state_dict[key] is not weight:
        local = local_weight(weight)
        if not isinstance(local, ShardableWeight):
            raise RuntimeError(f"{key} is gathered; call reshard() of the FSDP module before state_dict()")
        # Not the tensor that is there already: its version counter would be another one than the weight's.
        state_dict[key] = _with_local(state_dict[key], local.tensor.detach())


@torch.no_grad()
def _load_plain(
    name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *_: Any
) -> None:
    """A plain tensor that is to take the parameter's place (`assign=True`) is wrapped; others are copied from."""
    key = f"{prefix}{name}"
    value = state_dict.get(key)
    if isinstance(value, Tensor) and local_metadata.get("assign_to_params_buffers", False):
        local = value.to_local() if isinstance(value, DTensor) else value.detach()
        state_dict[key] = _with_local(value, _shardable(local, dict(states_of(module))[name]))


def _with_local(tensor: Tensor | None, local: Tensor) -> Tensor:
    """`tensor`, plain or DTensor, with `local` as what this rank holds."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@functools.cache
def _watch_optimizers() -> None:
    """Once a process: the hook finds the weights through the optimizer, so one serves all models."""
    register_optimizer_step_post_hook(_mark_updated_stale)  # pyright: ignore[reportArgumentType]


@torch.compiler.disable
@torch.no_grad()
def _mark_updated_stale(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: the weights that the optimizer updates are stale, also if compiled code did it. Not if the
    optimizer says by itself what it has written (`ShardableWeight.written`)."""
    if getattr(optimizer, "reports_writes", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            local = local_weight(parameter)
            if isinstance(local, ShardableWeight):
                local.state.mark_stale()
