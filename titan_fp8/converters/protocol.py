"""What a converter is, what it is told of the devices, and the one error it raises."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from titan_fp8.converters.report import ConversionReport
from titan_fp8.models.splits import division_problem, local_dims
from titan_fp8.runtime.errors import UserError


class ConversionError(UserError):
    """A model cannot be converted as asked. Nothing of it has been changed.

    Attributes:
        violations: everything that is wrong, one message each; each names a module or a setting, the rule and the
            remedy.
    """

    def __init__(self, violations: Iterable[str]) -> None:
        self.violations = list(violations)
        super().__init__("\n".join(self.violations))


@dataclass(frozen=True)
class Placement:
    """Where a model's parameters will lie once it is converted: the dimensions of the mesh, as far as they matter here.

    Attributes:
        ranks: processes of the job.
        shards: ranks over which one copy of the parameters is sharded.
        offloaded: parameters stay in host memory and come to the device unit by unit.
        tensor: ranks over which each matrix product of our decoder is split.
        expert_tensor: ranks over which each expert is.
        expert: ranks that experts are dealt out to.
        expert_shards: ranks over which the experts of a rank, or its part of them, are sharded.
        experts_stay: experts are dealt out to ranks such that each has its own for good, and nobody gathers them.
    """

    ranks: int = 1
    shards: int = 1
    offloaded: bool = False
    tensor: int = 1
    expert_tensor: int = 1
    expert: int = 1
    expert_shards: int = 1
    experts_stay: bool = False

    @property
    def is_managed(self) -> bool:
        """Whether FSDP takes the parameters over; otherwise they stay where they are, the same tensors for ever."""
        return self.ranks > 1 or self.offloaded

    def local_dims(self, fqn: str, linear: nn.Linear) -> tuple[int, int]:
        """(N, K) of what one rank multiplies of the linear called `fqn`; of the whole where `division_problem` says why
        it cannot be divided."""
        dims = linear.out_features, linear.in_features
        return dims if self.division_problem(fqn, linear) else local_dims(fqn, *dims, self.tensor)

    def division_problem(self, fqn: str, linear: nn.Linear) -> str | None:
        """Why the ranks cannot divide the linear called `fqn`, with the remedy, or None."""
        return division_problem(fqn, linear.out_features, linear.in_features, self.tensor)


def modules_of(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """The modules of `model` that are a converter's to cast: what is another one's may be cast ahead already."""
    return [module for module in model.modules() if isinstance(module, kind)]


ONE_PROCESS = Placement()
"""One process that keeps its parameters on its device."""


class Converter(Protocol):
    """Rewrites a model in place before it is sharded, and may act before the first step and after each optimizer step.

    Conversion needs no data: it works on the meta device, where a dry run finds every violation in a second.
    """

    name: str
    """Its name in `model.converters`, which is also the path of its section."""

    def convert(self, model: nn.Module) -> ConversionReport:
        """Replace the modules this converter is for.

        Raises:
            ConversionError: with all violations; the model is then unchanged.
        """
        ...

    def pre_training(self, model_parts: Sequence[nn.Module]) -> None:
        """Called once the weights are there, before the first step, as `post_optimizer` is after each."""
        ...

    def post_optimizer(self, model_parts: Sequence[nn.Module]) -> None:
        """Called after every optimizer step with the parts of the model that this rank holds."""
        ...
