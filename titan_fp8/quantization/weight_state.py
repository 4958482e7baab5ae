"""What is known of a weight that FSDP gathers as codes: these, and whether they still belong to it.

It is kept with the parameter that a `ShardableWeight` (`shardable.py`) is a tensor of. `WeightState` says when codes
belong to a weight; what they are is each format's own: `Float8WeightState` here, `MXWeightState` in `mx_sharded.py`.
"""

import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.runtime.collectives import Axis

if TYPE_CHECKING:
    from titan_fp8.quantization.shardable import ShardableWeight


class Contents:
    """The identity of what a piece of memory holds; replaced by each write.

    Attributes:
        value: equal (the same object) where the same weight is.
        blank: nothing has been written yet.
    """

    def __init__(self, value: object | None = None, *, blank: bool = False) -> None:
        self.value = object() if value is None else value
        self.blank = blank

    def copy(self) -> "Contents":
        """The same values in another place, where later writes are separate."""
        return Contents(self.value)

    def write(self, value: object | None = None) -> None:
        """Other values from now on: `value`, if it is known whose."""
        self.value = object() if value is None else value
        self.blank = False


class _State(NamedTuple):
    """What a weight was when something was found out about it: its contents, and the version of its tensor."""

    contents: object
    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, weight: "ShardableWeight") -> "_State":
        return cls(weight.contents.value, weakref.ref(weight.tensor), _version(weight.tensor))

    def is_of(self, weight: "ShardableWeight") -> bool:
        """Whether nothing has been written to the weight since."""
        written_around = self.tensor() is weight.tensor and self.version != _version(weight.tensor)
        return self.contents is weight.contents.value and not written_around


class CodeExchange(Protocol):
    """How the codes of one weight travel, if not through FSDP's own memory."""

    def send(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Take this rank's codes, bytes `[chunk, ...]`; what FSDP is to gather in their place, of `dtype`."""
        ...

    def received(self, stand_in: Tensor) -> Tensor:
        """All ranks' codes, bytes `[ranks * chunk * ...]`, when FSDP has gathered what `send` gave to it."""
        ...


class WeightState:
    """Whether the codes of one weight on this rank are those of the weight as it is.

    Args:
        caches: codes serve until the weight changes. Otherwise they are made for every gather, unless they were
            computed ahead.

    Attributes:
        parts: axes of ranks that hold other parts of the same weight, such as other experts.
    """

    takes_amax: bool = False
    """Whether the cast needs no more of the weight than its largest value, which whoever writes it may know."""

    def __init__(self, *, caches: bool) -> None:
        self.caches = caches
        self.parts: tuple[Axis, ...] = ()
        self._made_from: _State | None = None
        self._ahead = False
        self._amax: tuple[Tensor, _State] | None = None

    @property
    def format(self) -> Hashable:
        """How the weight is cast; what was compiled for one weight serves others of the same format."""
        raise NotImplementedError

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes of ranks that hold other parts of the weight."""
        return self.parts

    def mark_stale(self) -> None:
        """The weight may have changed."""
        self._made_from = self._amax = None

    def is_fresh(self, weight: "ShardableWeight") -> bool:
        """Whether the codes are those of `weight` as it is now."""
        return self._made_from is not None and self._made_from.is_of(weight)

    def serves(self, weight: "ShardableWeight") -> bool:
        """Whether a gather need ask no other rank: what was found out serves it."""
        return (self.caches or self._ahead) and self.is_fresh(weight)

    def recorded(self, weight: "ShardableWeight", *, ahead: bool) -> None:
        """What was found out, codes as a rule, is of the weight as it is now. ahead: it serves every gather until a
        write is seen."""
        self._made_from = _State.of(weight)
        self._amax = None  # told for one cast
        self._ahead = ahead

    def amax_of(self, weight: "ShardableWeight") -> Tensor | None:
        """The bits of the largest |w| of `weight` as it is now, int32 `[]` on its device, if who wrote it has told."""
        if self._amax is None:
            return None
        amax, state = self._amax
        return amax if state.is_of(weight) and amax.device == weight.device else None

    def tell(self, amax: Tensor | None, weight: "ShardableWeight") -> None:
        """What has been written to the weight has this largest value, or nobody knows."""
        self._amax = None if amax is None else (amax, _State.of(weight))

    @property
    def is_told(self) -> bool:
        """Whether the last to write the weight told its largest value, and no cast has followed."""
        return self._amax is not None

    def forget_amax(self) -> None:
        """What was told of the weight's largest value serves no cast any more."""
        self._amax = None


class Float8WeightState(WeightState):
    """The float8 codes of one weight on this rank, and what they were made from.

    Args:
        recipe: how the weight is cast.
        caches: see `WeightState`.
        keeps_codes: codes are kept while they serve. Otherwise the weight's statistics are, from which each gather
            makes them.
        axis: see below.

    Attributes:
        codes: bytes `[chunk, K]`, this rank's rows, padded with zeros to what FSDP sends; of experts in the shape of
            the shard. None between gatherings, unless they are kept.
        statistics: of the whole weight (`shard_cast.py`), unless codes are kept.
        scale: of the whole weight; one tensor for good, refreshed in place, so that a backward pass whose forward pass
            used older codes is an error of autograd.
        axis: ranks that hold other parts of the same weight, under tensor parallelism. All above is then about this
            rank's part.
        exchange: how the codes travel; None: as FSDP gathers any tensor.
    """

    def __init__(
        self, recipe: Float8Recipe, *, caches: bool, keeps_codes: bool = True, axis: Axis | None = None
    ) -> None:
        super().__init__(caches=caches)
        self.recipe = recipe
        self.keeps_codes = keeps_codes
        self.axis = axis
        self.codes: Tensor | None = None
        self.statistics: Tensor | None = None
        self.scale: Tensor | None = None
        self.exchange: CodeExchange | None = None

    @property
    def format(self) -> Hashable:
        """The recipe."""
        return self.recipe

    @property
    def axes(self) -> tuple[Axis, ...]:
        """See `WeightState`."""
        return self.parts if self.axis is None else (*self.parts, self.axis)

    @property
    def takes_amax(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `WeightState`."""
        return self.recipe.granularity is Granularity.TENSOR

    def hold(self, codes: Tensor, padded_rows: int) -> None:
        """These are the codes, which are padded to so many rows (of experts: so many experts)."""
        rows = codes.shape[0]
        data = codes.view(torch.uint8)
        if rows != padded_rows:
            fits = self.codes is not None and self.codes.shape[0] == padded_rows and self.codes.device == data.device
            padded = self.codes if fits else data.new_zeros(padded_rows, *data.shape[1:])
            assert padded is not None
            padded[:rows].copy_(data)
            data = padded
        self.codes = data

    def give_out(self) -> Tensor:
        """The codes, for a gather; unless they are kept, it alone has them from now on."""
        codes = self.codes
        assert codes is not None
        if not self.keeps_codes:
            self.codes = None
        return codes

    def __deepcopy__(self, memo: dict[int, Any]) -> "Float8WeightState":
        return memo.setdefault(id(self), _restored(*self._settings))

    def __reduce__(self) -> tuple[Any, ...]:
        # A third element would be the attributes, among them tensors: a copy begins without codes.
        return _restored, self._settings

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.recipe, self.caches, self.keeps_codes, self.axis, self.parts


def _restored(
    recipe: Float8Recipe, caches: bool, keeps_codes: bool, axis: Axis | None, parts: tuple[Axis, ...]
) -> Float8WeightState:
    state = Float8WeightState(recipe, caches=caches, keeps_codes=keeps_codes, axis=axis)
    state.parts = parts
    return state


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
