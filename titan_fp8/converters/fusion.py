"""Producers that write float8 in place of norms and gated feed-forwards whose readers are float8 linears.

In a converted decoder each linear's input is made by a norm or a SwiGLU that nobody else reads. `fuse_producers` puts
modules in their places that write the codes at once (`kernels/producers`), so that the input never exists in high
precision:

    attention_norm     RMSNorm -> codes, read by wq, wk, wv
    attention          wq, wk and wv in one function
    ffn_norm           residual add and RMSNorm -> codes, read by w1 and w3
    feed_forward       SwiGLU -> codes, read by w2; its backward writes the float8 gradients of w1's and w3's outputs

What is kept for backward is the residual stream, what the products of wq, wk, wv, w1 and w3 give, and the attention's
output, each once: of the inputs of linears, the codes by columns are made again from these when a gradient needs them.
Where linears compute differently, or somebody watches, the codes are kept.

A module is replaced only where all of its readers are `Float8Linear`s of one recipe; what a reader in high precision
would read stays a tensor. The new modules hold the old ones' parameters under the old names. Where they cannot know
who looks at what passes between modules (hooks, autocast), they compute as the modules they replaced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from titan_fp8.models.attention import Attention
from titan_fp8.models.decoder import TransformerBlock
from titan_fp8.models.feed_forward import FeedForward
from titan_fp8.models.norm import RMSNorm, has_hooks
from titan_fp8.quantization.gated import gated_feed_forward, gated_hidden
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.norm import add_rms_norm, keep_and_rms_norm, rms_norm
from titan_fp8.quantization.recipes import Float8Recipe, Granularity
from titan_fp8.quantization.shared_input import share_input

_Module = TypeVar("_Module", bound=nn.Module)
_FEED_FORWARDS = ("feed_forward", "moe.shared_experts")


def fuse_producers(model: nn.Module, *, tensor_parallel: bool = False) -> list[str]:
    """Replace in place the norms and feed-forwards of `model`'s blocks that can write float8, and the attentions whose
    wq, wk and wv one function can multiply by.

    Args:
        model: a decoder, or what contains one, after conversion and before it is sharded or compiled.
        tensor_parallel: products will be split over ranks. Then norms stay, since what they write is cast as it is
            gathered, attentions, and feed-forwards whose scale all ranks must agree on.

    Returns:
        The names of the modules that were replaced; none in a model without our `TransformerBlock`s.
    """
    fused = []
    for fqn, block in model.named_modules():
        if isinstance(block, TransformerBlock):
            if not tensor_parallel:
                _share_attention_output(block)
            for name, new in _fused_parts(block, tensor_parallel).items():
                block.set_submodule(name, new)
                fused.append(f"{fqn}.{name}" if fqn else name)
    return fused


def can_gate_any(model: nn.Module, recipes: Mapping[str, Float8Recipe], *, tensor_parallel: bool) -> bool:
    """Whether `fuse_producers` will find a feed-forward to replace in a model that has yet to be converted.

    Args:
        model: as it is before conversion.
        recipes: name of each linear that will be converted -> its recipe.
        tensor_parallel: as for `fuse_producers`.
    """
    for fqn, block in model.named_modules():
        if not isinstance(block, TransformerBlock):
            continue
        for name in _FEED_FORWARDS:
            feed_forward = _part(block, name)
            if type(feed_forward) is not FeedForward:
                continue
            if feed_forward.w1.bias is not None or feed_forward.w3.bias is not None:
                continue
            prefix = f"{fqn}.{name}" if fqn else name
            first, *others = (recipes.get(f"{prefix}.{linear}") for linear in ("w1", "w2", "w3"))
            if first is None or not first.grad_weight_in_float8 or any(other != first for other in others):
                continue
            if not (tensor_parallel and first.granularity is Granularity.TENSOR):
                return True
    return False


def _fused_parts(block: TransformerBlock, tensor_parallel: bool) -> dict[str, nn.Module]:
    """Name -> what to put there."""
    parts: dict[str, nn.Module] = {}
    for name in _FEED_FORWARDS:
        feed_forward = _part(block, name)
        if type(feed_forward) is FeedForward and _can_gate(feed_forward):
            assert isinstance(feed_forward.w2, Float8Linear)
            one_scale = feed_forward.w2.config.recipe.granularity is Granularity.TENSOR
            if not (tensor_parallel and one_scale):
                parts[name] = _converted(feed_forward, Float8FeedForward)
    if tensor_parallel:
        return parts
    attention = block.attention
    if type(attention) is Attention and _can_share(attention.wq, attention.wk, attention.wv):
        parts["attention"] = _converted(attention, Float8Attention)
    readers = {"attention_norm": Readers(parts.get("attention", attention), attention.READERS)}
    if block.feed_forward is not None:  # the norm before a mixture of experts has its router as a reader
        readers["ffn_norm"] = Readers(parts.get("feed_forward", block.feed_forward), ("w1", "w3"))
    for name, reader in readers.items():
        norm = getattr(block, name)
        if type(norm) is RMSNorm and reader.recipe() is not None:
            fused = parts[name] = _converted(norm, Float8RMSNorm)
            fused.readers = reader
    return parts


def _part(block: TransformerBlock, name: str) -> nn.Module | None:
    """The module of that dotted name; None where there is none."""
    part: nn.Module | None = block
    for step in name.split("."):
        part = getattr(part, step, None)
    return part


def _share_attention_output(block: TransformerBlock) -> None:
    """Let `wo` keep what it reads, which attention keeps for its own backward, in place of its codes."""
    wo = block.attention.wo
    if type(block.attention) is Attention and _is_plain(wo) and wo.config.recipe.grad_weight_in_float8:
        wo.config = replace(wo.config, keeps_input=True)


def _converted(module: nn.Module, kind: type[_Module]) -> _Module:
    """A module of another class with the parameters, buffers, children, hooks and mode of `module`."""
    converted = kind.__new__(kind)
    converted.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        converted.__dict__[table] = dict(module.__dict__[table])
    return converted


def _is_plain(linear: nn.Module) -> TypeGuard[Float8Linear]:
    """Whether a linear is ours, computes as its class does, and nobody watches it."""
    return type(linear) is Float8Linear and "forward" not in vars(linear) and not has_hooks(linear)


@dataclass(frozen=True)
class Readers:
    """The linears that read a norm's output.

    Attributes:
        module: what is given the output, and hands it to its linears.
        names: the linears' names in `module`. They are looked up at each call: what stands there may change.
    """

    module: nn.Module
    names: tuple[str, ...]

    def linears(self) -> list[nn.Module]:
        """The linears as they are now."""
        return [getattr(self.module, name) for name in self.names]

    def recipe(self) -> Float8Recipe | None:
        """The one recipe of all linears; None if there is none, or if somebody watches what they are given."""
        linears = [linear for linear in self.linears() if _is_plain(linear)]
        recipes = {linear.config.recipe for linear in linears}
        if len(linears) < len(self.names) or len(recipes) > 1 or has_hooks(self.module):
            return None
        return linears[0].config.recipe

    def shared(self) -> int:
        """How many of them one function multiplies for; 1 if each is called by itself."""
        shares = isinstance(self.module, Float8Attention | Float8FeedForward) and self.module.shares_input()
        return len(self.names) if shares else 1

    def need_gradient(self) -> bool:
        """Whether backward will compute the gradient of a weight."""
        return torch.is_grad_enabled() and any(linear.weight.requires_grad for linear in self.linears())


class Float8RMSNorm(RMSNorm):
    """RMSNorm whose output is made as codes for the linears that read it.

    Attributes:
        readers: those linears.
    """

    readers: Readers

    def forward(self, x: Tensor) -> Any:
        """`[..., dim]` -> the norm as a `QuantizedActivation`, or as a tensor where a reader wants one."""
        recipe = self._recipe(x)
        if recipe is None:
            return super().forward(x)
        return rms_norm(x, self.weight, self._eps(), recipe, **self._needs(recipe))

    def keep_and_norm(self, x: Tensor) -> tuple[Tensor, Any]:
        """`(x, norm of x)`; the norm as `forward` gives it."""
        recipe = self._recipe(x)
        if recipe is None or has_hooks(self):
            return super().keep_and_norm(x)
        return keep_and_rms_norm(x, self.weight, self._eps(), recipe, **self._needs(recipe))

    def add_and_norm(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Any]:
        """`(x + branch, norm of it)`; the norm as `forward` gives it."""
        recipe = self._recipe(x)
        if recipe is None or branch.dtype != x.dtype or has_hooks(self):
            return super().add_and_norm(x, branch)
        return add_rms_norm(x, branch, self.weight, self._eps(), recipe, **self._needs(recipe))

    def _recipe(self, x: Tensor) -> Float8Recipe | None:
        # Under autocast each linear casts a tensor for itself, and the norm runs in another dtype.
        return None if torch.is_autocast_enabled(x.device.type) else self.readers.recipe()

    def _eps(self) -> float:
        assert self.eps is not None
        return self.eps

    def _needs(self, recipe: Float8Recipe) -> dict[str, Any]:
        needs_gradient = self.readers.need_gradient()
        in_float8 = recipe.grad_weight_in_float8
        return {
            "columns": needs_gradient and in_float8,
            "emit": needs_gradient and not in_float8,
            # What else is to happen before the norm's backward, such as a gather of its weight, its hooks do.
            "readers": 1 if has_hooks(self) else self.readers.shared(),
        }


def _can_share(*linears: nn.Module) -> bool:
    """Whether one function can compute the products of these linears with one input, without calling them."""
    first, *_ = linears
    if not _is_plain(first) or not first.config.recipe.grad_weight_in_float8:
        return False
    if not all(_is_plain(linear) and linear.bias is None and linear.config == first.config for linear in linears):
        return False
    # The compiler takes no tensor twice. By `is`: over `id` it would compile the code of a block anew for each.
    return all(one.weight is not other.weight for one, other in combinations(linears, 2))


class Float8Attention(Attention):
    """Attention that multiplies by wq, wk and wv in one function."""

    def shares_input(self) -> bool:
        """Whether it does so now."""
        return _can_share(self.wq, self.wk, self.wv)

    def project(self, x: Any) -> tuple[Tensor, ...]:
        """As in `Attention`."""
        linears = [linear for linear in (self.wq, self.wk, self.wv) if isinstance(linear, Float8Linear)]
        return share_input(x, linears) if self.shares_input() else super().project(x)


def _can_gate(feed_forward: FeedForward) -> bool:
    """Whether one function can compute the products of w1 and w3, without calling them, for w2 to read."""
    w1, w2, w3 = feed_forward.w1, feed_forward.w2, feed_forward.w3
    if not (_can_share(w1, w3) and _is_plain(w2)):
        return False
    assert isinstance(w1, Float8Linear)
    return w2.config.recipe == w1.config.recipe and all(w2.weight is not linear.weight for linear in (w1, w3))


class Float8FeedForward(FeedForward):
    """Gated feed-forward whose hidden activation is made as codes for w2, and not kept for backward if w2 computes as
    w1 and w3 do."""

    def shares_input(self) -> bool:
        """Whether it multiplies by w1 and w3 in one function."""
        return _can_gate(self)

    def forward(self, x: Any) -> Any:
        """`[..., dim]` -> `[..., dim]`."""
        w1, w2, w3 = self.w1, self.w2, self.w3
        if not _can_gate(self) or w2.bias is not None:
            return super().forward(x)
        assert isinstance(w1, Float8Linear)
        assert isinstance(w2, Float8Linear)
        assert isinstance(w3, Float8Linear)
        return gated_feed_forward(x, w1, w3, w2) if w2.config == w1.config else super().forward(x)

    def hidden(self, x: Any) -> Any:
        """`[..., dim]` -> what w2 reads, `[..., hidden_dim]`."""
        if not _can_gate(self):
            return super().hidden(x)
        assert isinstance(self.w1, Float8Linear)
        assert isinstance(self.w3, Float8Linear)
        columns = torch.is_grad_enabled() and self.w2.weight.requires_grad
        return gated_hidden(x, self.w1, self.w3, columns=columns)
