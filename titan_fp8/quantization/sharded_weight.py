"""A weight that FSDP gathers as float8 codes: what its parameter consists of.

FSDP asks the tensor it shards what to send (`fsdp_pre_all_gather`) and what to make of what arrives
(`fsdp_post_all_gather`). `ShardableFloat8Weight` is a tensor that answers: the shard's codes, one byte a value, and a
`GatheredFloat8Weight`. For everybody else it is the high-precision tensor that it wraps: optimizers update it, an
operation on it gives a plain tensor.

Codes are kept from one change of the weight to the next, in a `Float8WeightState` that belongs to the parameter: FSDP
makes new tensors of it as it shards, pads, moves and offloads, and all of them share the state. Whether the codes
still belong to the weight is decided by its *contents*, an identity that views share, that a copy takes along, and
that every write replaces; all operations pass through the wrapper, so those of a fused optimizer and through `.data`,
which no version counter shows, are seen. Where the tensor lies says nothing: FSDP moves shards that need padding on
some ranks only, and ranks that disagree on what is stale wait for each other forever.

Two kinds of write are not seen: those of compiled code, whose optimizer's step hook or `mark_stale` tells of them; and
those through the plain tensors of a state dict, which the wrapped tensor's version counter shows.

An optimizer that writes to the wrapped tensor says so (`written`), and may tell the largest value that it wrote. That
serves one cast, ahead of the next gather, if neither a write is seen nor a state dict is taken before it.

E experts, N out features, K in features, n rows of a shard.
"""

import functools
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from titan_fp8.quantization.casts import Codes
from titan_fp8.quantization.gathered_weight import GatheredFloat8Weight
from titan_fp8.quantization.shard_cast import Shard, ShardAxis, cast_shards, chunk_length, cut_dim
from titan_fp8.quantization.weight_state import Contents, Float8WeightState
from titan_fp8.runtime.errors import UserError

_aten = torch.ops.aten
_NEW = frozenset({_aten.empty_like.default, _aten.new_zeros.default, _aten.new_empty.default})
_COPIES = frozenset({_aten.clone.default, _aten._to_copy.default, _aten._pin_memory.default})


class ShardableFloat8Weight(torch.Tensor):
    """A weight, or FSDP's shard of it, in high precision, with what FSDP needs to gather it as float8 codes.

    Args:
        tensor: a weight `[N, K]`, weights of experts `[E, N, K]`, or a part of these by rows; plain, fp32, bf16 or
            fp16, on any device.
        state: of the parameter that this is, or will be, a part of.
        contents: what `tensor` holds, if other tensors are known to hold the same.
    """

    tensor: Tensor
    state: Float8WeightState
    contents: Contents

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, tensor: Tensor, state: Float8WeightState, contents: Contents | None = None) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            tensor.shape,
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            layout=tensor.layout,
            device=tensor.device,
        )

    def __init__(self, tensor: Tensor, state: Float8WeightState, contents: Contents | None = None) -> None:
        self.tensor, self.state, self.contents = tensor, state, contents or Contents()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["tensor"], self.state

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "ShardableFloat8Weight":
        return ShardableFloat8Weight(inner["tensor"], meta)

    @classmethod
    def __metadata_guard__(cls, compiled: Float8WeightState, found: Float8WeightState) -> bool:
        return compiled.recipe == found.recipe  # the compiler compares with a copy, which would be another state

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ShardableFloat8Weight({self.tensor!r}, {self.state.recipe.name})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardableFloat8Weight":
        if id(self) not in memo:
            copied = ShardableFloat8Weight(self.tensor.clone(), self.state.__deepcopy__(memo))
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied  # pyright: ignore
        return memo[id(self)]  # pyright: ignore[reportReturnType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary tensor
                return cls.__torch_dispatch__(func, types, args, kwargs)
        plain_args, plain_kwargs = tree_map_only(ShardableFloat8Weight, _plain, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if func._schema.is_mutable:
            _note_writes(func, args, kwargs)
            return return_and_correct_aliasing(func, args, kwargs, result)
        if func.is_view:
            return return_and_correct_aliasing(func, args, kwargs, _rewrap(result, args[0], args[0].contents))
        if func in _NEW:
            return _rewrap(result, args[0], Contents(blank=True))
        if func in _COPIES:
            same = result.dtype == args[0].dtype
            return _rewrap(result, args[0], args[0].contents.copy() if same else Contents())
        return result

    def written(self, amax: Tensor | None = None) -> None:
        """Say that the wrapped tensor has been written to; amax: int32 `[]`, the bits of the largest |w| that it holds
        now, if known and if `state.takes_amax`."""
        self.contents.write()
        self.state.tell(amax, self)

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What FSDP sends: the codes `[chunk, K]`, as bytes. Casts if it must, together with all ranks of `mesh`.

        Where all shards are equally long, the bytes are given out in the dtype in which the unit's other parameters are
        gathered, `[chunk, K / 2]` for a 16-bit one: FSDP copies wider elements faster. Where it pads, or puts parts of
        experts together, it wants K.

        Args:
            mesh: the ranks that hold the weight's shards, one axis.
            outer_size: `[N, K]`, or `[E, N, K]`.
        """
        if not _is_cut_by_rows(self.shape, outer_size):
            raise UserError(
                f"a weight of shape {list(outer_size)} was sharded to {list(self.shape)}; only a weight that is "
                "sharded by rows can be gathered as float8 codes: let fully_shard place it by Shard(0), or turn "
                "enable_fsdp_float8_all_gather off (of experts: leave them out of fqns)"
            )
        if not self.state.serves(self):
            axis = ShardAxis(mesh.get_group(), mesh.get_local_rank(), mesh.size())
            refresh([self], [outer_size], axis, ahead=False)
        codes = self.state.codes
        assert codes is not None
        dtype = mp_policy.param_dtype or self.dtype
        is_even = outer_size[0] % mesh.size() == 0 and cut_dim(self.shape, outer_size) == 0
        if is_even and outer_size[-1] % dtype.itemsize == 0:
            codes = codes.view(dtype)
        return (codes,), (self.state.scale, outer_size)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """What FSDP makes of the gathered codes `[ranks * chunk, ...]`: a `GatheredFloat8Weight`, whose gradient has
        `param_dtype`. FSDP frees and refills their memory, so `out`, if there is one, holds them already."""
        (data,), (scale, shape) = outputs, metadata
        if out is not None:
            out = out._local_tensor if isinstance(out, DTensor) else out  # under tensor parallelism
            assert isinstance(out, GatheredFloat8Weight)
            assert out.codes.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
            out.scale = scale
            return None
        codes = data.view(-1).view(self.state.recipe.weight_dtype)[: prod(shape)].view(shape)
        return GatheredFloat8Weight(codes, scale, self.state.recipe, param_dtype), ()


@torch.inference_mode(False)
def refresh(
    weights: Sequence[ShardableFloat8Weight], shapes: Sequence[Sequence[int]], axis: ShardAxis, *, ahead: bool
) -> None:
    """Cast shards, all on one device and sharded over one axis, with one all-reduce.

    Args:
        weights: the shards.
        shapes: of each one's weight, `[N, K]` or `[E, N, K]`.
        axis: over which they are sharded; every rank of it must call this with its shards of the same weights.
        ahead: the codes serve every gather until a write is seen, also where nothing is cached.
    """
    # A gather comes at any time after the optimizer's step, and somebody may have written to the weights by then.
    shards = [
        Shard.of(
            weight.tensor,
            weight.state.recipe,
            shape,
            axis,
            weight.state.axis,
            weight.state.amax_of(weight) if ahead else None,
        )
        for weight, shape in zip(weights, shapes, strict=True)
    ]
    cast = cast_shards(shards, axis.group if axis.ranks > 1 else None)
    unchanged = [weight.state.is_fresh(weight) for weight in weights]
    for shard, weight, codes in zip(shards, weights, cast, strict=True):
        length = shard.tensor.shape[0] if shard.dim else chunk_length(shard.shape[0], axis.ranks)
        weight.state.record(weight, codes.codes, length, ahead=ahead)
    _refresh_scales([weight.state for weight in weights], cast, unchanged)


@torch.no_grad()
def _refresh_scales(states: Sequence[Float8WeightState], cast: Sequence[Codes], unchanged: Sequence[bool]) -> None:
    """Write new scales into the tensors that hold the old ones; where the weight is the same, unnoticed by autograd."""
    old, new, kept = [], [], []
    for state, codes, same in zip(states, cast, unchanged, strict=True):
        if state.scale is None or state.scale.device != codes.scale.device:
            state.scale = codes.scale.clone()
            continue
        old.append(state.scale)
        new.append(codes.scale)
        if same:
            kept.append(state.scale)
    if old:
        with torch.autograd._unsafe_preserve_version_counter(tuple(kept)):  # pyright: ignore
            torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]


def local_weight(parameter: Any) -> Any:
    """What this rank holds of a parameter: the tensor itself, not a view of it with a version counter of its own, which
    `DTensor.to_local` gives."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def _is_cut_by_rows(shard: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether FSDP may have made a shard of this shape of a weight `[N, K]` or `[E, N, K]` without cutting rows."""
    if len(whole) not in (2, 3) or len(shard) != len(whole) or shard[-1] != whole[-1]:
        return False
    return len(whole) == 2 or shard[1] == whole[1] or shard[0] == whole[0]


def _plain(weight: ShardableFloat8Weight) -> Tensor:
    return weight.tensor


def _rewrap(result: Any, source: ShardableFloat8Weight, contents: Contents) -> Any:
    """The tensors of `result` as parts of the same weight."""
    return tree_map_only(Tensor, lambda tensor: ShardableFloat8Weight(tensor, source.state, contents), result)


def _note_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Give what `func` has written to new contents."""
    if func is _aten.copy_.default and _moves_a_shard(*args[:2]):
        args[0].contents.write(args[1].contents.value)
        return
    for position, name in _written_arguments(func):
        written = args[position] if position < len(args) else kwargs.get(name)
        tree_map_only(ShardableFloat8Weight, lambda weight: weight.contents.write(), written)


def _moves_a_shard(target: Any, source: Any) -> bool:
    """Whether a copy is FSDP's, of a shard into new memory with room for padding: the same weight in another place."""
    both = isinstance(target, ShardableFloat8Weight) and isinstance(source, ShardableFloat8Weight)
    return both and target.contents.blank and target.state is source.state and target.dtype == source.dtype


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that `func` writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, each.name) for i, each in arguments if each.alias_info is not None and each.alias_info.is_write)
