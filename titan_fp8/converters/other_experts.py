"""Experts of other people's models: modules that hold weights of several experts and call PyTorch's grouped product.

    w1, w2, w3 [E, ...]                         parameters, under any names and in any order of their dimensions; its
                                                own, or those of modules in it that have no forward pass
    torch._grouped_mm(x, w, offs=offs)          rows x [T, K] sorted by expert, w [E, K, N], offs int32 [E]
    torch.nn.functional.grouped_mm(x, w, ...)   the same

Nothing of a module is replaced but its `forward` on the instance, which runs the same code with these two functions
computing in float8 or MXFP8 (`quantization.grouped_product.GroupedFormat`). So parameters, their names and state dicts
stay, and whatever is done to them before the product too: FSDP2 gathers them, DTensors are made local, they are rounded
to bf16 or not, `torch.compile` traces all of it.

What multiplies in another way, a loop over experts for one, cannot be seen before it runs: then it is an error.

T rows, K in features, N out features, E experts.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from titan_fp8.models.moe import Experts
from titan_fp8.quantization.grouped_ops import checked_ends
from titan_fp8.quantization.grouped_product import (
    Cast,
    GroupedFormat,
    GroupLayout,
    cast_rows_of,
    grouped_product,
    lay_out,
)
from titan_fp8.runtime.errors import UserError

_aten = torch.ops.aten
_GROUPED_MM = (
    torch._grouped_mm,  # pyright: ignore[reportPrivateImportUsage]
    F.grouped_mm,
    _aten._grouped_mm,
    _aten._grouped_mm.default,
)
_NAMES = {"self": "a", "input": "a", "mat_a": "a", "mat2": "b", "mat_b": "b"}
"""What the arguments are called in PyTorch."""


def has_forward(module: nn.Module) -> bool:
    """Whether a module computes anything, or holds what another one computes with."""
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that may be weights of experts to a module's forward pass: of three dimensions, the last two
    longer than 1, which a bias's are not; its own, and those of modules in it that have no forward pass."""
    own = module.named_parameters(recurse=False)
    found = {name: each for name, each in own if each.dim() == 3 and min(each.shape[1:]) > 1}
    for name, child in module.named_children():
        if not has_forward(child):
            found |= {f"{name}.{inner}": each for inner, each in weights_of(child).items()}
    return found


def other_experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of all modules of a model that have a forward pass and weights as experts have them, and are not
    this package's."""
    return {
        fqn: module
        for fqn, module in model.named_modules()
        if has_forward(module) and not isinstance(module, Experts) and weights_of(module)
    }


def holders_of(model: nn.Module) -> dict[str, str]:
    """Name of each module that holds weights of experts and has no forward pass -> that of the module around it which
    has one, empty if it is the model itself."""
    modules, holders = dict(model.named_modules()), {}
    for fqn, module in modules.items():
        if fqn and not has_forward(module) and weights_of(module):
            around = fqn.rpartition(".")[0]
            while around and not has_forward(modules[around]):
                around = around.rpartition(".")[0]
            holders[fqn] = around
    return holders


def format_of(module: nn.Module) -> str | None:
    """The format that a module multiplies in, if it is converted."""
    forward = module.__dict__.get("forward")
    return forward.products.name if isinstance(forward, GroupedForward) else None


def convert_other_experts(fqn: str, module: nn.Module, products: GroupedFormat, *, aligned: bool) -> None:
    """Let the grouped products in the forward pass of `module` run in 8 bits.

    Args:
        fqn: its name, for messages.
        module: one of `other_experts_of`.
        products: how they compute.
        aligned: see `grouped_product.lay_out`.
    """
    _let_the_compiler_see()
    module.forward = GroupedForward(fqn, module.forward, products, aligned)


def _let_the_compiler_see() -> None:
    """TorchDynamo asks a mode about functions of a list, which these two are not on, though eager mode asks about all.
    The list is no public one: where it is elsewhere, what is compiled is refused as without a grouped product."""
    try:
        dynamo = importlib.import_module("torch._dynamo.variables.torch")
        dynamo.get_overridable_functions().update(_GROUPED_MM[:2])
    except (ImportError, AttributeError):
        return


@dataclass
class GroupedForward:
    """The forward pass of a module, with grouped products in 8 bits.

    Attributes:
        fqn: the module's name.
        inner: what is run.
        products: how they compute.
        aligned: see `grouped_product.lay_out`.
    """

    fqn: str
    inner: Callable[..., Any]
    products: GroupedFormat
    aligned: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `inner` gives.

        Raises:
            UserError: it made no grouped product, or one that cannot run in 8 bits.
        """
        done = _Products(self.fqn, self.products, self.aligned)
        with _GroupedProducts(done):
            result = self.inner(*args, **kwargs)
        if not done.count:
            raise UserError(
                f"{self.fqn}: its forward pass has called neither torch._grouped_mm nor "
                f"torch.nn.functional.grouped_mm, so nothing of it has run in {self.products.name}; have it call one "
                "of them (a loop over experts does not), or leave it out of fqns"
            )
        return result


@dataclass
class _Products:
    """The grouped products of one forward pass.

    Attributes:
        count: how many there were.
        layouts: ends and number of rows -> their layout.
        casts: rows, their version and ends -> their codes: gate and up have one input.
    """

    fqn: str
    products: GroupedFormat
    aligned: bool
    count: int = 0
    layouts: list[tuple[Tensor, int, GroupLayout]] = field(default_factory=list)
    casts: list[tuple[Tensor, int, Tensor, Cast]] = field(default_factory=list)

    def compute(self, x: Tensor, weight: Tensor, ends: Tensor, out_dtype: torch.dtype | None) -> Tensor:
        """x `[T, K]`, weight `[E, K, N]`, ends int32 `[E]`: `[T, N]`."""
        self.count += 1
        columns = torch.is_grad_enabled() and weight.requires_grad
        layout = self._layout(ends, x.shape[0])
        cast = self._cast(x, layout, columns=columns)
        dtype = x.dtype if out_dtype is None else out_dtype
        return grouped_product(x, weight.transpose(-2, -1), layout, cast, self.products, dtype)

    def _layout(self, ends: Tensor, rows: int) -> GroupLayout:
        for known, length, layout in self.layouts:
            if known is ends and length == rows:
                return layout
        # On a GPU the answer would have to be waited for.
        checked = checked_ends(ends, rows, self.fqn) if ends.device.type == "cpu" else ends
        layout = lay_out(checked, rows, self.products.alignment, aligned=self.aligned)
        self.layouts.append((ends, rows, layout))
        return layout

    def _cast(self, x: Tensor, layout: GroupLayout, *, columns: bool) -> Cast:
        if torch.compiler.is_compiling():  # it finds what is computed twice, and what is written to in between
            return cast_rows_of(x, layout, self.products, columns=columns)
        version = -1 if x.is_inference() else x._version
        for known, then, ends, cast in self.casts:
            if known is x and then == version and ends is layout.ends and (cast[2] is not None or not columns):
                return cast
        cast = cast_rows_of(x, layout, self.products, columns=columns)
        self.casts.append((x, version, layout.ends, cast))
        return cast


class _GroupedProducts(TorchFunctionMode):
    """Where this is entered, products of rows with weights of experts are `_Products.compute`."""

    def __init__(self, done: _Products) -> None:
        super().__init__()
        self.done = done

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _GROUPED_MM:
            return func(*args, **kwargs)
        given = dict(zip(("a", "b", "offs", "bias", "out_dtype"), args, strict=False))
        given |= {_NAMES.get(name, name): value for name, value in kwargs.items()}
        x, weight, ends = given["a"], given["b"], given.get("offs")
        if x.dim() != 2 or weight.dim() != 3 or ends is None:
            raise UserError(
                f"{self.done.fqn}: a grouped product of {list(x.shape)} with {list(weight.shape)}, and in "
                f"{self.done.products.name} there is that of rows [T, K] with weights [E, K, N] and the ends of "
                "groups, offs; leave it out of fqns"
            )
        _check(self.done.fqn, self.done.products, x, weight, ends, given.get("bias"))
        return self.done.compute(x, weight, ends, given.get("out_dtype"))


def _check(fqn: str, products: GroupedFormat, x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> None:
    """What a product has to be; of ends shapes and dtype alone, so that nobody waits for the device."""
    leave = "; leave it out of fqns"
    if ends.dim() != 1 or ends.dtype != torch.int32 or ends.shape[0] != weight.shape[0]:
        raise UserError(
            f"{fqn}: offs is {ends.dtype} {list(ends.shape)} for weights {list(weight.shape)}, and a grouped product "
            f"takes torch.int32 [{weight.shape[0]}], the row behind each expert's rows; give it offs.to(torch.int32) "
            "with one end for each expert"
        )
    if bias is not None:
        raise UserError(
            f"{fqn}: a grouped product with a bias, which {products.name} has not: add it afterwards{leave}"
        )
    if isinstance(weight, DTensor) or isinstance(x, DTensor):
        raise UserError(f"{fqn}: a grouped product of DTensors; multiply what to_local() gives of them{leave}")
    if any(size % products.alignment for size in weight.shape[1:]):
        shape = " x ".join(str(size) for size in weight.shape[1:])
        needs = f"{products.name} needs multiples of {products.alignment}"
        raise UserError(f"{fqn}: an expert's weight is {shape}, and {needs}{leave}")


def weight_problems(fqn: str, module: nn.Module, products: GroupedFormat, setting: str, remedy: str) -> Iterable[str]:
    """What is wrong with one of `other_experts_of`, one message each. remedy: of what cannot be converted."""
    if (already := format_of(module)) is not None:
        yield f"{fqn}: its experts are converted to {already} already; leave it out of {setting}"
    for name, weight in weights_of(module).items():
        if any(size % products.alignment for size in weight.shape[1:]):
            shape = " x ".join(map(str, weight.shape[1:]))
            yield (
                f"{fqn}.{name}: an expert is {shape}, and {products.name} needs multiples of {products.alignment}; "
                f"{remedy}"
            )


def holder_problems(
    holders: dict[str, str], named: Callable[[str], bool], products: GroupedFormat, setting: str
) -> Iterable[str]:
    """What is wrong with naming some of `holders_of`, of which nothing runs, one message each.

    Args:
        holders: from `holders_of`.
        named: whether a module of that name is.
        products: what was asked for.
        setting: what names them.
    """
    for fqn, around in holders.items():
        if named(fqn) and not named(around):
            which = f"{around}, in {setting}" if around else "the model itself, as a module of another one"
            yield (
                f"{fqn}: it holds weights of experts and has no forward pass, so nothing of it would run in "
                f"{products.name}; name the module whose forward pass multiplies by them, {which}, or multiply in one "
                "of its own"
            )
