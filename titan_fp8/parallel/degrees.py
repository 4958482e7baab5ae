"""How many ranks each kind of parallelism gets: the arithmetic of the mesh, without torch.

The ranks of a job form a grid with one axis per kind of parallelism, and the product of the axes' lengths is the
number of processes. A length of -1 in the configuration means "what the others leave". This part of the mesh needs no
process and no torch, so a configuration that does not fit its WORLD_SIZE is refused before anything starts.
"""

from dataclasses import dataclass, replace
from math import prod

from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.runtime.errors import UserError

# Field of MeshDegrees -> key of [parallelism], outermost axis first.
_KEYS = {
    "pipeline": "pipeline_parallel_degree",
    "data_parallel_replicate": "data_parallel_replicate_degree",
    "data_parallel_shard": "data_parallel_shard_degree",
    "context": "context_parallel_degree",
    "tensor": "tensor_parallel_degree",
}


@dataclass(frozen=True)
class MeshDegrees:
    """Lengths of the mesh's axes, in ranks, all at least 1.

    Attributes:
        data_parallel_replicate: copies of the parameters.
        data_parallel_shard: ranks over which one copy of the parameters is sharded.
        tensor, pipeline, context: ranks over which a matrix product, the layers, a sequence are split.
        expert: ranks over which experts are dealt out; they are taken from `data_parallel_shard`, `context` and, where
            experts are not divided, `tensor`.
        expert_tensor: ranks over which each expert is divided: 1, or `tensor`.
    """

    data_parallel_replicate: int = 1
    data_parallel_shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def expert_ranks(self) -> int:
        """Ranks that one copy of the experts is dealt out to and sharded over. Ranks of tensor parallelism that do not
        divide experts have tokens of their own for them, as other ranks do."""
        return self.shards * self.tensor // self.expert_tensor

    @property
    def expert_shards(self) -> int:
        """Parts into which FSDP cuts the experts of a rank."""
        return self.expert_ranks // self.expert

    @property
    def experts_are_apart(self) -> bool:
        """Whether experts lie on the ranks in another way than all other parameters."""
        return self.expert > 1 or self.expert_ranks != self.shards

    def without_experts(self) -> "MeshDegrees":
        """The degrees of a model that has none."""
        return replace(self, expert=1, expert_tensor=self.tensor)

    @property
    def data_parallel(self) -> int:
        """Ranks that see different data."""
        return self.data_parallel_replicate * self.data_parallel_shard

    @property
    def shards(self) -> int:
        """Parts into which FSDP cuts one copy of the parameters: ranks of one sequence have different ones too."""
        return self.data_parallel_shard * self.context

    @property
    def world_size(self) -> int:
        """The product of all degrees."""
        return prod(getattr(self, field) for field in _KEYS)


def resolve_degrees(parallelism: ParallelismSection, world_size: int) -> MeshDegrees:
    """The degrees of `[parallelism]` for a job of `world_size` processes, with -1 replaced by what is left.

    Raises:
        UserError: a degree is 0 or below -1, more than one is -1, or the product is not `world_size`. The message names
            keys without the section; it belongs to the place `parallelism`.
    """
    degrees = {field: getattr(parallelism, key) for field, key in _KEYS.items()}
    for field, degree in degrees.items():
        if degree == 0 or degree < -1:
            raise UserError(f"{_KEYS[field]} = {degree}: expected a number of ranks of at least 1, or -1")
    inferred = [field for field, degree in degrees.items() if degree == -1]
    if len(inferred) > 1:
        names = " and ".join(_KEYS[field] for field in inferred)
        raise UserError(f"{names} are both -1, but only one degree can be inferred; give the others a number")
    given = {field: degree for field, degree in degrees.items() if degree > 1}
    product = prod(given.values())
    factors = " x ".join(f"{_KEYS[field]} {degree}" for field, degree in given.items())
    if inferred:
        if world_size % product:
            raise UserError(
                f"{factors}{_equals(given, product)} does not divide WORLD_SIZE {world_size}, so "
                f"{_KEYS[inferred[0]]} = -1 has no value; choose a divisor of {world_size}"
            )
        degrees[inferred[0]] = world_size // product
    elif product != world_size:
        # A degree of 1 is no factor worth naming, except where all are 1.
        factors = factors or f"{_KEYS['data_parallel_shard']} 1"
        raise UserError(
            f"{factors}{_equals(given, product)}, but WORLD_SIZE is {world_size}; {_remedy(given, product, world_size)}"
        )
    return _with_experts(MeshDegrees(**degrees), parallelism)


def _with_experts(degrees: MeshDegrees, parallelism: ParallelismSection) -> MeshDegrees:
    expert, divided = parallelism.expert_parallel_degree, parallelism.expert_tensor_parallel_degree
    if divided not in (1, degrees.tensor):
        remedy = f"1 or {degrees.tensor}" if degrees.tensor > 1 else "1, or raise tensor_parallel_degree with it"
        raise UserError(
            f"expert_tensor_parallel_degree = {divided}: each expert is either whole or divided over all ranks of "
            f"tensor_parallel_degree = {degrees.tensor}; set it to {remedy}"
        )
    degrees = replace(degrees, expert=expert, expert_tensor=divided)
    ranks = degrees.expert_ranks
    if ranks % expert:
        tensor = f" x tensor_parallel_degree {degrees.tensor}" if degrees.tensor > divided else ""
        raise UserError(
            f"expert_parallel_degree = {expert} takes its ranks from data_parallel_shard_degree "
            f"{degrees.data_parallel_shard} x context_parallel_degree {degrees.context}{tensor} = {ranks}, which is "
            f"no multiple of it; {f'choose a divisor of {ranks}' if ranks > 1 else 'set it to 1'}, or raise "
            "data_parallel_shard_degree"
        )
    return degrees


def given_degrees(parallelism: ParallelismSection) -> MeshDegrees:
    """The degrees as they are given, and 1 for those that are to be inferred or are no degrees: what can be said of a
    mesh whose product is not WORLD_SIZE."""
    return MeshDegrees(**{field: max(getattr(parallelism, key), 1) for field, key in _KEYS.items()})


def _remedy(given: dict[str, int], product: int, world_size: int) -> str:
    """Which of the given degrees -1 would make fit, or what else would."""
    fitting = [_KEYS[field] for field, degree in given.items() if world_size % (product // degree) == 0]
    if len(given) <= 1:
        return "set it to -1"
    if not fitting:
        return f"choose degrees whose product divides {world_size}, and set one to -1"
    return "set one of them to -1" if len(fitting) == len(given) else f"set {' or '.join(fitting)} to -1"


def _equals(given: dict[str, int], product: int) -> str:
    return f" = {product}" if len(given) > 1 else ""
