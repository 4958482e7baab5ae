"""Float8 linears to shard, and what to watch while they are gathered; for the tests of FP8 all-gather."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.quantization import shard_cast
from titan_fp8.quantization.casts import Codes, cast_weight
from titan_fp8.quantization.fsdp_weight import wrap_weights_for_fsdp
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.gathered_weight import GatheredFloat8Weight
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES

SHAPES = [(48, 32), (272, 64), (16, 16)]
BLOCK_SHAPES = [(384, 128), (128, 256)]


class Linears(nn.Module):
    """Float8 linears beside each other, each with an input of its own, and a norm, in one unit or one unit each.

    `whole` are the initial weights. `seen` collects what each linear's weight was in the last forward pass.
    """

    def __init__(
        self,
        recipe: str,
        *,
        cache: bool = True,
        keep_codes: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = BLOCK_SHAPES if recipe == "blockwise" else SHAPES
        config = Float8Config(RECIPES[recipe], emulate=device == "cpu")
        plain = [nn.Linear(k, n, bias=False, dtype=dtype, device=device) for n, k in shapes]
        self.linears = nn.ModuleList(Float8Linear.from_linear(linear, config) for linear in plain)
        self.norm = nn.LayerNorm(32, dtype=dtype, device=device)
        self.whole = [linear.weight.detach().clone() for linear in plain]
        self.seen: list[Codes] = []
        wrap_weights_for_fsdp(list(self.linears), cache=cache, keep_codes=keep_codes)  # pyright: ignore
        for linear in self.linears:
            linear.register_forward_pre_hook(self._look)

    def _look(self, linear: nn.Module, args: Any) -> None:
        weight = linear.weight
        assert isinstance(weight, GatheredFloat8Weight)
        self.seen.append(Codes(weight.codes.clone(), weight.scale.clone()))

    def forward(self, tokens: int = 16) -> Tensor:
        self.seen = []
        device = self.whole[0].device
        total = self.norm(torch.ones(1, 32, dtype=torch.bfloat16, device=device)).float().square().sum()
        for linear in self.linears:
            x = torch.linspace(-1, 1, tokens * linear.in_features, device=device).view(tokens, -1)
            x = x.bfloat16().requires_grad_()
            total = total + linear(x).float().square().mean()
        return total

    def shard(self, mesh: DeviceMesh, **keys: Any) -> "Linears":
        fully_shard(self, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32), **keys)
        return self

    def masters(self) -> list[Tensor]:
        """The whole weights as they are now, where they are cast."""
        assert isinstance(self, FSDPModule)
        self.reshard()
        return [linear.weight.full_tensor().detach().to(self.whole[0].device) for linear in self.linears]

    def assert_current(self) -> None:
        """What the last forward pass saw are the codes of the weights as they are now, bit for bit."""
        assert len(self.seen) == len(self.linears)
        for seen, weight, linear in zip(self.seen, self.masters(), self.linears, strict=True):
            wanted = cast_weight(weight, linear.config.recipe)
            assert torch.equal(seen.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
            assert torch.equal(seen.scale, wanted.scale)
            assert seen.scale.stride() == wanted.scale.stride()


class Wire(TorchDispatchMode):
    """The collectives of this rank, in order: (kind, bytes that this rank puts in)."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.sent.append(("all_gather", args[1].nbytes))
        elif name == "c10d::allreduce_":
            (tensor,) = args[0]
            self.sent.append((f"all_reduce {tensor.dtype}", tensor.nbytes))
        elif name == "c10d::_reduce_scatter_base_":
            self.sent.append(("reduce_scatter", args[0].nbytes))
        else:
            assert not name.startswith("c10d::") or "barrier" in name, name
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_casts() -> Iterator[dict[str, int]]:
    """Calls of each kernel function that a shard is cast by."""
    counts: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **keys)

        return call

    with mock.patch.multiple(
        shard_cast,
        float8=mock.Mock(
            amax=counting("amax", shard_cast.float8.amax),
            cast_tensor=counting("cast", shard_cast.float8.cast_tensor),
            cast_rows=counting("cast", shard_cast.float8.cast_rows),
        ),
    ):
        yield counts
