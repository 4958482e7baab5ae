"""Initial weights: the same for one seed on any number of processes, however the parameters are sharded.

Who knows what: a module that owns weights says how they start, by `init_rules() -> {parameter name: Distribution}`;
`initialize` walks the model and fills every parameter.

The scheme. A parameter's rows are cut into blocks of about four million elements, wherever they live. Each block is
drawn by a generator seeded with a hash of (seed, parameter name, block number), so it depends on nothing else: not on
the order of parameters, not on other parameters, not on the mesh. A process draws the blocks that its shard touches and
keeps its part of each; there is no communication, and at most one block exists beside the shards. Drawing happens on
the shard's device. CPUs and GPUs have different generators, so the weights of a seed differ between the two kinds of
device, but not between meshes of one kind.

The distributions are torchtitan's: `wq wk wv w1` have a standard deviation of 0.02; `wo w2 w3`, which end in the
residual stream, 0.02 / sqrt(2 * (layer + 1)) for layers counted from 0, so that the stream's variance grows slowly with
depth; the embedding is standard normal; the output head has 1 / sqrt(dim), so logits start with a variance near 1. All
but the embedding are cut off at three standard deviations. A tied embedding is the output head's weight and starts as
one: with a variance of 1 the logits would start at a scale of sqrt(dim).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_BLOCK_ELEMENTS = 1 << 22
# Path components that activation checkpointing, torch.compile and DDP put into module names.
_WRAPPER_NAMES = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "module"})


class Distribution(Protocol):
    """How a tensor is filled."""

    def fill(self, block: Tensor, generator: torch.Generator) -> None:
        """Overwrite the float32 tensor `block`, drawing from `generator` alone."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float

    def fill(self, block: Tensor, generator: torch.Generator) -> None:
        block.fill_(self.value)


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0 and standard deviation `std`."""

    std: float

    def fill(self, block: Tensor, generator: torch.Generator) -> None:
        block.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal with mean 0 and standard deviation `std`, confined to `bound` standard deviations.

    Drawn by inverting the cumulative distribution: `std * sqrt(2) * erfinv(u)`, u uniform in +-erf(bound / sqrt(2)).
    One pass, no rejection, hence no synchronization with the device.
    """

    std: float
    bound: float = 3.0

    def fill(self, block: Tensor, generator: torch.Generator) -> None:
        edge = math.erf(self.bound / math.sqrt(2.0))
        block.uniform_(-edge, edge, generator=generator).erfinv_().mul_(self.std * math.sqrt(2.0))
        block.clamp_(-self.bound * self.std, self.bound * self.std)  # rounding at the very edge


@runtime_checkable
class Initializable(Protocol):
    """A module that says how the parameters below it start."""

    def init_rules(self) -> dict[str, Distribution]:
        """Parameter name relative to the module -> distribution."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """As `nn.Module` has it."""
        ...

    def get_buffer(self, target: str) -> Tensor:
        """As `nn.Module` has it."""
        ...


@torch.no_grad()
def initialize(model: nn.Module, seed: int, *, device: torch.device | None = None) -> None:
    """Fill every parameter of `model` in place.

    Parameters may be plain tensors or DTensors of any replicated or sharded placement, uneven and empty shards
    included, on any device but meta. They may belong to subclasses of `nn.Linear`, and blocks may be wrapped for
    activation checkpointing. A shared parameter is filled once.

    Args:
        model: a `Decoder`, or any module whose parameters are all covered by `init_rules` of its submodules.
        seed: any integer; the same seed gives the same weights on every mesh.
        device: where to draw, by default where each parameter is. A GPU's generator gives other numbers than a CPU's,
            so parameters that are offloaded to host memory are drawn on the GPU, as all others are.

    Raises:
        RuntimeError: a parameter is not covered by a rule, is still on the meta device, or is a pending sum.
    """
    done: set[int] = set()
    for fqn, parameter, rule in _rules(model):
        if id(parameter) not in done:
            _fill_parameter(parameter, rule, seed, fqn, device)
            done.add(id(parameter))
    missed = [name for name, parameter in model.named_parameters() if id(parameter) not in done]
    if missed:
        raise RuntimeError(
            f"no initialization rule covers {', '.join(missed)}; name them in their module's init_rules()"
        )


def _rules(model: nn.Module) -> Iterator[tuple[str, Tensor, Distribution]]:
    """(clean name, parameter or buffer, rule) for each rule of each module."""
    for prefix, module in model.named_modules():
        if isinstance(module, Initializable):
            for name, rule in module.init_rules().items():
                yield clean_fqn(f"{prefix}.{name}"), _tensor(module, name), rule


def _tensor(module: Initializable, name: str) -> Tensor:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return module.get_buffer(name)


def clean_fqn(name: str) -> str:
    """A dotted name without the components that wrappers insert."""
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPER_NAMES)


def _fill_parameter(parameter: Tensor, rule: Distribution, seed: int, fqn: str, device: torch.device | None) -> None:
    """Draw the blocks that the local part of `parameter` touches and copy that part in."""
    local, offsets = _local_part(parameter, fqn)
    if local.is_meta:
        raise RuntimeError(f"{fqn} is on the meta device; materialize the model (to_empty) before initializing it")
    if local.numel() == 0:
        return
    row_elements = max(1, math.prod(parameter.shape[1:]))
    block_rows = max(1, _BLOCK_ELEMENTS // row_elements)
    first, last = offsets[0], offsets[0] + local.shape[0]  # global rows of the local part
    columns = tuple(slice(start, start + size) for start, size in zip(offsets[1:], local.shape[1:], strict=True))
    device = device or local.device
    generator = torch.Generator(device=device)
    for block_number in range(first // block_rows, -(-last // block_rows)):
        block_start = block_number * block_rows
        block_end = min(block_start + block_rows, parameter.shape[0])
        block = torch.empty(block_end - block_start, *parameter.shape[1:], dtype=torch.float32, device=device)
        generator.manual_seed(_block_seed(seed, fqn, block_number))
        rule.fill(block, generator)
        low, high = max(first, block_start), min(last, block_end)
        local[low - first : high - first].copy_(block[(slice(low - block_start, high - block_start), *columns)])


def _local_part(parameter: Tensor, fqn: str) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor that this process holds and where it begins in the whole parameter, one offset a dim."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), (0,) * parameter.dim()
    if any(placement.is_partial() for placement in parameter.placements):
        raise RuntimeError(
            f"{fqn} is a pending sum ({parameter.placements}); only sharded or replicated can be initialized"
        )
    local = parameter.to_local()
    shape, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(shape) == tuple(local.shape), f"{fqn}: shard of {tuple(local.shape)}, expected {tuple(shape)}"
    return local, tuple(offsets)


def _block_seed(seed: int, fqn: str, block_number: int) -> int:
    """63 bits that depend on all three."""
    digest = hashlib.blake2b(f"{seed}/{fqn}/{block_number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
