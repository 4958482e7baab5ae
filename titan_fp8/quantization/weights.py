"""A weight is cast once an optimizer step, however often it is used in between.

`cache_weights(model)` gives every `Float8Linear` of a model a `WeightCache`, which holds the codes of its weight. The
codes are cast again when the weight may have changed, which nothing in PyTorch reports reliably: a fused optimizer
step and a write through `.data` leave a tensor's version counter alone. So several things make a cache stale, and any
of them suffices:

* a step of any `torch.optim` optimizer in the process (a hook that PyTorch runs after each);
* `mark_stepped(modules)`, which the trainer calls after each optimizer step;
* `mark_stale(model)`, for whoever writes to a weight by other means;
* loading a state dict;
* a change of the tensor's version counter or of its memory.

Codes live outside of compiled graphs, as inputs to them: a pre-forward hook of the model, never compiled, casts what is
stale before any layer runs.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from titan_fp8.quantization.casts import Codes, cast_weight, cast_weight_both
from titan_fp8.quantization.fsdp_weight import mark_fsdp_weights_stale
from titan_fp8.quantization.recipes import Float8Recipe
from titan_fp8.quantization.shardable import local_weight
from titan_fp8.runtime.operators import unseen

if TYPE_CHECKING:
    from titan_fp8.quantization.linear import Float8Linear


class Freshness:
    """Whether something made from a parameter, or from what this rank holds of one, still belongs to it.

    Attributes:
        is_told_stale: nothing has been recorded since somebody said that the parameter was written to, or ever. The
            compiler guards it, which cannot ask for more.
    """

    def __init__(self) -> None:
        self.is_told_stale = True
        self._made_from: tuple[int, ...] | None = None
        self._memory: StorageWeakRef | None = None
        self._place: range | None = None

    def mark_stale(self) -> None:
        """The parameter may have changed."""
        self._made_from = None
        self.is_told_stale = True

    def mark_stepped(self, memory: Mapping[int, Sequence[range]]) -> None:
        """An optimizer has written to these addresses of these storages, and may have caused a write elsewhere."""
        # The latter is no reason to stop compiled code: between the passes of a block that is recomputed the optimizers
        # of others step, if each parameter has its own.
        self._made_from = None
        if self._memory is not None and self._place is not None:
            written = memory.get(self._memory.cdata, ())
            self.is_told_stale |= any(_overlap(self._place, each) for each in written)

    def is_fresh(self, parameter: Tensor) -> bool:
        """Whether nothing has happened to `parameter` since `record`."""
        return self._made_from is not None and self._made_from == _state_of(parameter)

    def record(self, parameter: Tensor) -> None:
        """What there is now was made from `parameter` as it is now."""
        self._made_from = _state_of(parameter)
        self.is_told_stale = False
        # As long as somebody refers to it, other memory is not taken for it, though it may lie at the same address.
        local = local_weight(parameter)
        self._memory, self._place = StorageWeakRef(local.untyped_storage()), _place_of(local)


def _place_of(tensor: Tensor) -> range:
    """The addresses between the first and the last number of a tensor."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = (steps + 1) * tensor.element_size() if tensor.numel() else 0
    return range(tensor.data_ptr(), tensor.data_ptr() + length)


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _state_of(parameter: Tensor) -> tuple[int, ...]:
    # A write to a DTensor counts there, and not in the tensor that it holds; one to that tensor counts in it alone.
    local = local_weight(parameter)
    versions = (-1 if tensor.is_inference() else tensor._version for tensor in (parameter, local))
    return *versions, local.data_ptr(), local.untyped_storage()._cdata


class CodesCache:
    """The codes of one weight, valid for one epoch: from one change of the weight to the next.

    Args:
        watch: tells of optimizer steps; None: one of the process.

    Attributes:
        rows: for `output`.
        columns: for `grad_input`.
    """

    rows: Any
    columns: Any

    def __init__(self, watch: "StepWatch | None" = None) -> None:
        self.freshness = Freshness()
        self._watch = _watch_of_process() if watch is None else watch
        self._watch.add(self.freshness)
        self.rows = self.columns = None

    def refresh(self, parameter: Tensor) -> None:
        """Cast what this rank holds of `parameter`, unless the codes are fresh."""
        if not self.freshness.is_fresh(parameter):
            _renew(self, parameter)  # pyright: ignore[reportCallIssue]

    def use(self, parameter: Tensor) -> None:
        """Refresh for a forward pass. Compiled code cannot cast, and relies on the hook of the model, which runs before
        it and looks at the same parameter.

        Raises:
            RuntimeError: it runs before there are codes, or after the weight has been written to.
        """
        if not torch.compiler.is_compiling():
            self.refresh(parameter)
        elif self.freshness.is_told_stale:
            raise RuntimeError(
                "compiled code has the kept codes of its weights from the forward pass of the model that was converted "
                "with cache_weights=True: call that model, not a compiled part of it"
            )

    def cast(self, weight: Tensor) -> None:
        """Make the codes of `weight`."""
        raise NotImplementedError


@torch.compiler.disable
def _renew(cache: CodesCache, parameter: Tensor) -> None:
    # New tensors, not new contents: a backward pass that is still to come keeps what its forward pass used.
    cache.rows = cache.columns = None
    # An optimizer may step between a block's passes (early_step_in_backward); and what is cast in a validation serves
    # trainings, too.
    with torch.inference_mode(False), torch.no_grad(), unseen():
        cache.cast(local_weight(parameter))
    cache.freshness.record(parameter)


class WeightCache(CodesCache):
    """The float8 codes of one weight `[N, K]`.

    Args:
        recipe: how the weight is cast.
        keep_columns: keep its codes by columns too; otherwise backward derives them each time.
        watch: see `CodesCache`.

    Attributes:
        rows: codes `[N, K]`.
        columns: codes `[K, N]`, or None.
    """

    rows: Codes | None
    columns: Codes | None

    def __init__(self, recipe: Float8Recipe, *, keep_columns: bool, watch: "StepWatch | None" = None) -> None:
        super().__init__(watch)
        self.recipe = recipe
        self.keep_columns = keep_columns

    def cast(self, weight: Tensor) -> None:
        """Make the codes of `weight`."""
        if self.keep_columns:
            self.rows, self.columns = cast_weight_both(weight, self.recipe)
        else:
            self.rows = cast_weight(weight, self.recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightCache":
        return WeightCache(self.recipe, keep_columns=self.keep_columns, watch=self._watch)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(WeightCache, keep_columns=self.keep_columns), (self.recipe,)


class StepWatch:
    """Makes stale, after a step of any optimizer of the process, what was added to it. Holds on to nothing."""

    def __init__(self) -> None:
        self._watched: weakref.WeakSet[Freshness] = weakref.WeakSet()
        handle = register_optimizer_step_post_hook(_MarkStale(self._watched))  # pyright: ignore[reportArgumentType]
        weakref.finalize(self, handle.remove)

    def add(self, freshness: Freshness) -> None:
        """Watch `freshness` too."""
        self._watched.add(freshness)


class _MarkStale:
    """The hook of a `StepWatch`, which it does not keep alive."""

    def __init__(self, watched: "weakref.WeakSet[Freshness]") -> None:
        self._watched = watched

    @torch.compiler.disable
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        memory = _memory_of(parameter for group in optimizer.param_groups for parameter in group["params"])
        for each in self._watched:
            each.mark_stepped(memory)


@functools.cache
def _watch_of_process() -> StepWatch:
    return StepWatch()


def _memory_of(parameters: Iterable[Tensor]) -> dict[int, list[range]]:
    """Storage -> addresses of what this rank holds of parameters."""
    found: dict[int, list[range]] = {}
    for parameter in parameters:
        local = local_weight(parameter)
        with contextlib.suppress(NotImplementedError, RuntimeError):  # of tensors that have no memory of their own
            found.setdefault(local.untyped_storage()._cdata, []).append(_place_of(local))
    return found


def cache_weights(model: nn.Module, linears: Iterable["Float8Linear"]) -> None:
    """Let `linears`, modules of `model`, keep the codes of their weights from one optimizer step to the next.

    Linears that share a parameter and a recipe share a cache. Hooks are registered: on `model`, whose forward pass
    begins by casting what is stale; on each linear, for loaded state dicts; on every optimizer of the process.
    """
    caches: dict[tuple[int, Float8Recipe], WeightCache] = {}
    watch = StepWatch()
    linears = list(linears)
    for linear in linears:
        recipe = linear.config.recipe
        keep_columns = not linear.config.recompute_weight_in_backward
        key = (id(linear.weight), recipe)
        if key not in caches:
            caches[key] = WeightCache(recipe, keep_columns=keep_columns, watch=watch)
        linear.weight_cache = caches[key]
        watch_module(linear)
    refresh_before_forward(model)


def watch_module(module: nn.Module) -> None:
    """Have the codes that a module keeps cast again once a state dict is loaded into it."""
    module.register_load_state_dict_post_hook(_mark_module_stale)


def refresh_before_forward(model: nn.Module) -> None:
    """Let the forward pass of `model` begin by casting what is stale in its modules."""
    model.register_forward_pre_hook(_refresh_all)  # pyright: ignore[reportArgumentType]


def _mark_module_stale(module: nn.Module, incompatible_keys: Any) -> None:
    for _, cache in caches_of(module):
        cache.freshness.mark_stale()


@torch.compiler.disable
def _refresh_all(model: nn.Module, args: Any) -> None:
    of_modules = [(getattr(module, name), cache) for module in model.modules() for name, cache in caches_of(module)]
    stale = [(parameter, cache) for parameter, cache in of_modules if not cache.freshness.is_fresh(parameter)]
    if stale:
        _check_not_sharded(model)
    for parameter, cache in stale:
        cache.refresh(parameter)


def _check_not_sharded(model: nn.Module) -> None:
    """Refuse to keep codes of weights that `fully_shard` cuts: there is no whole weight yet to cast.

    Raises:
        RuntimeError: it names the weight.
    """
    for unit in model.modules():
        group: Any = unit._get_fsdp_state()._fsdp_param_group if isinstance(unit, FSDPModule) else None
        if group is None or getattr(group.mesh_info, "shard_mesh_size", 1) == 1:
            continue
        for parameter in group.fsdp_params:
            owner, weight = parameter._module_info.module, parameter._module_info.param_name
            if any(name == weight for name, _ in caches_of(owner)):
                fqn = next(fqn for fqn, module in model.named_modules() if module is owner)
                raise RuntimeError(
                    f"{fqn}.{weight}: cached codes of weights (cache_weights=True) found a weight that FSDP "
                    "shards; convert with FP8 all-gather (enable_fsdp_float8_all_gather=True, of MXFP8 "
                    "enable_fsdp_mxfp8_all_gather=True), which keeps the codes of shards, or with cache_weights=False"
                )


def caches_of(module: nn.Module) -> list[tuple[str, CodesCache]]:
    """(parameter, its cache) of each weight of which a module keeps the codes: `weight_cache` is that of a linear's,
    `weight_caches` those of several."""
    cache: CodesCache | None = getattr(module, "weight_cache", None)
    several: dict[str, CodesCache] = getattr(module, "weight_caches", None) or {}
    return [*([] if cache is None else [("weight", cache)]), *several.items()]


def mark_stale(model: nn.Module) -> None:
    """Say that weights of `model` have been written to: their float8 codes are cast again before they are used.

    Needed after a write that no optimizer of `torch.optim` made and that a tensor's version counter does not show: one
    through `.data`, or by a kernel of one's own.
    """
    _mark_caches_stale(model.modules())
    mark_fsdp_weights_stale(model.modules())


def mark_stepped(modules: Iterable[nn.Module]) -> None:
    """Say that an optimizer of any kind has updated weights that `modules` have themselves: `mark_stale`, but for
    weights of which the optimizer has told by itself what it wrote (`ShardableFloat8Weight.written`)."""
    modules = list(modules)
    _mark_caches_stale(modules)
    mark_fsdp_weights_stale(modules, but_told=True)


def _mark_caches_stale(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for _, cache in caches_of(module):
            cache.freshness.mark_stale()
