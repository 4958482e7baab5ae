"""A weight that FSDP gathers as codes: what its parameter consists of, whatever the format.

FSDP asks the tensor it shards what to send (`fsdp_pre_all_gather`) and what to make of what arrives
(`fsdp_post_all_gather`). A `ShardableWeight` is a tensor that answers; what, is told by `ShardableFloat8Weight`
(`sharded_weight.py`) and `ShardableMXWeight` (`mx_sharded.py`). For everybody else it is the high-precision tensor that
it wraps: optimizers update it, an operation on it gives a plain tensor.

Codes are kept from one change of the weight to the next, in a `WeightState` that belongs to the parameter: FSDP
makes new tensors of it as it shards, pads, moves and offloads, and all of them share the state. Whether the codes
still belong to the weight is decided by its *contents*, an identity that views share, that a copy takes along, and
that every write replaces; all operations pass through the wrapper, so those of a fused optimizer and through `.data`,
which no version counter shows, are seen. Where the tensor lies says nothing: FSDP moves shards that need padding on
some ranks only, and ranks that disagree on what is stale wait for each other forever.

Two kinds of write are not seen: those of compiled code, whose optimizer's step hook or `mark_stale` tells of them; and
those through the plain tensors of a state dict, which the wrapped tensor's version counter shows.

An optimizer that writes to the wrapped tensor says so (`written`), and may tell the largest value that it wrote. That
serves one cast, ahead of the next gather, if neither a write is seen nor a state dict is taken before it.

E experts, N out features, K in features.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from titan_fp8.quantization.shard_cast import ShardAxis
from titan_fp8.quantization.weight_state import Contents, WeightState

_aten = torch.ops.aten
_NEW = frozenset({_aten.empty_like.default, _aten.new_zeros.default, _aten.new_empty.default})
_COPIES = frozenset({_aten.clone.default, _aten._to_copy.default, _aten._pin_memory.default})


class ShardableWeight(torch.Tensor):
    """A weight, or FSDP's shard of it, in high precision, with what FSDP needs to gather it as codes.

    Args:
        tensor: a weight `[N, K]`, weights of experts `[E, N, K]`, or a part of these by rows; plain, fp32, bf16 or
            fp16, on any device.
        state: of the parameter that this is, or will be, a part of.
        contents: what `tensor` holds, if other tensors are known to hold the same.
    """

    tensor: Tensor
    state: WeightState
    contents: Contents

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, tensor: Tensor, state: WeightState, contents: Contents | None = None) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            tensor.shape,
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            layout=tensor.layout,
            device=tensor.device,
        )

    def __init__(self, tensor: Tensor, state: WeightState, contents: Contents | None = None) -> None:
        self.tensor, self.state, self.contents = tensor, state, contents or Contents()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["tensor"], self.state

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "ShardableWeight":
        raise NotImplementedError

    @classmethod
    def __metadata_guard__(cls, compiled: WeightState, found: WeightState) -> bool:
        return compiled.format == found.format  # the compiler compares with a copy, which would be another state

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({self.tensor!r}, {self.state.format})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardableWeight":
        if id(self) not in memo:
            copied = type(self)(self.tensor.clone(), copy.deepcopy(self.state, memo))
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied  # pyright: ignore
        return memo[id(self)]  # pyright: ignore[reportReturnType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary tensor
                return cls.__torch_dispatch__(func, types, args, kwargs)
        plain_args, plain_kwargs = tree_map_only(ShardableWeight, _plain, (args, kwargs))
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

    @classmethod
    def cast_all(
        cls, weights: Sequence[Self], shapes: Sequence[Sequence[int]], axis: ShardAxis, *, ahead: bool
    ) -> None:
        """Make the codes of shards of this format, all on one device and sharded over one axis, and record them.

        Args:
            weights: the shards.
            shapes: of each one's weight, `[N, K]` or `[E, N, K]`.
            axis: over which they are sharded; every rank of it must call this with its shards of the same weights.
            ahead: the codes serve every gather until a write is seen, also where nothing is cached.
        """
        raise NotImplementedError

    def written(self, amax: Tensor | None = None) -> None:
        """Say that the wrapped tensor has been written to; amax: int32 `[]`, the bits of the largest |w| that it holds
        now, if known and if `state.takes_amax`."""
        self.contents.write()
        self.state.tell(amax, self)


def local_weight(parameter: Any) -> Any:
    """What this rank holds of a parameter: the tensor itself, not a view of it with a version counter of its own, which
    `DTensor.to_local` gives."""
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def _plain(weight: ShardableWeight) -> Tensor:
    return weight.tensor


def _rewrap(result: Any, source: ShardableWeight, contents: Contents) -> Any:
    """The tensors of `result` as parts of the same weight."""
    return tree_map_only(Tensor, lambda tensor: type(source)(tensor, source.state, contents), result)


def _note_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Give what `func` has written to new contents."""
    if func is _aten.copy_.default and _moves_a_shard(*args[:2]):
        args[0].contents.write(args[1].contents.value)
        return
    for position, name in _written_arguments(func):
        written = args[position] if position < len(args) else kwargs.get(name)
        tree_map_only(ShardableWeight, lambda weight: weight.contents.write(), written)


def _moves_a_shard(target: Any, source: Any) -> bool:
    """Whether a copy is FSDP's, of a shard into new memory with room for padding: the same weight in another place."""
    both = isinstance(target, ShardableWeight) and isinstance(source, ShardableWeight)
    return both and target.contents.blank and target.state is source.state and target.dtype == source.dtype


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that `func` writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, each.name) for i, each in arguments if each.alias_info is not None and each.alias_info.is_write)
