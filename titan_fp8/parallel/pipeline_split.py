"""Which modules make up each pipeline stage, and which rank runs it: the arithmetic of pipeline parallelism.

A *stage* is a run of consecutive modules; a *rank* of the pp axis runs one or several. A local batch is cut into
*microbatches* that follow each other through the stages. A *schedule* is the order in which a rank runs the forward and
backward passes of its stages (`SCHEDULES`):

    placement   ranks 0 1 2 3 run stages
    loop, one   0 | 1 | 2 | 3               1F1B, GPipe
    loop        0 4 | 1 5 | 2 6 | 3 7       Interleaved1F1B, LoopedBFS, InterleavedZeroBubble
    v           0 7 | 1 6 | 2 5 | 3 4       ZBVZeroBubble, DualPipeV
    a file      as its rows say             pipeline_parallel_schedule_csv (`pipeline_file.py`)

With several stages a rank waits less, and sends more. Layers are shared out evenly, where the embedding counts as
`pipeline_parallel_first_stage_less_layers` layers and the head as `pipeline_parallel_last_stage_less_layers`;
`pipeline_parallel_layers_per_stage` sets how many there are to a stage, and `module_fqns_per_model_part` says it all.

Nothing here imports torch, so that a mistake is answered before anything starts (`check_pipeline`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.pipeline_file import MICROBATCH, placement_of_file
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean

_SCHEDULE = "parallelism.pipeline_parallel_schedule"
_LAYERS = "parallelism.pipeline_parallel_layers_per_stage"
_NAMES = "parallelism.module_fqns_per_model_part"
_FIRST_LESS = "parallelism.pipeline_parallel_first_stage_less_layers"
_LAST_LESS = "parallelism.pipeline_parallel_last_stage_less_layers"

EMBEDDING, NORM, HEAD = "tok_embeddings", "norm", "output"


@dataclass(frozen=True)
class Schedule:
    """What a schedule of `torch.distributed.pipelining` asks for.

    Attributes:
        fewest, most: stages a rank; without an automatic split, `fewest` of them.
        v: stages turn back at the last rank, so that rank 0 runs the first and the last.
        fills: there must be a microbatch for each stage.
        rounds: microbatches come in rounds of one length, of at least as many as there are ranks.
        splits: gradients of weights are computed later than those of inputs.
    """

    fewest: int = 2
    most: int | None = None
    v: bool = False
    fills: bool = False
    rounds: bool = False
    splits: bool = False


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "1F1B": Schedule(1, 1, fills=True),
        "GPipe": Schedule(1, 1),
        "Interleaved1F1B": Schedule(rounds=True),
        "LoopedBFS": Schedule(),
        "InterleavedZeroBubble": Schedule(rounds=True, splits=True),
        "ZBVZeroBubble": Schedule(2, 2, v=True, splits=True),
        "DualPipeV": Schedule(2, 2, v=True, fills=True, splits=True),
    }
)
"""The engine's schedules by its names for them, which it reads in upper or lower case."""


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline without its tensors.

    Attributes:
        schedule: the engine's name, or None where `csv_path` says the order.
        csv_path: the file of a custom schedule, or None.
        stages: for each stage, the names of its modules.
        placement: for each stage, the rank of the pp axis that runs it.
        microbatch_size: sequences in one microbatch.
        overlaps: run pairs of a forward and a backward pass in turns, where their experts exchange tokens.
    """

    schedule: str | None
    csv_path: str | None
    stages: tuple[tuple[str, ...], ...]
    placement: tuple[int, ...]
    microbatch_size: int
    overlaps: bool = True

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are, or may be, computed later than those of inputs."""
        return self.schedule is None or SCHEDULES[self.schedule].splits

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank of the pp axis runs, in ascending order."""
        return [stage for stage, owner in enumerate(self.placement) if owner == rank]


def plan_pipeline(
    parallelism: ParallelismSection, *, degree: int, n_layers: int, tied_embeddings: bool, local_batch_size: int
) -> PipelinePlan:
    """The pipeline that `[parallelism]` asks for.

    Args:
        parallelism: for its `pipeline_parallel_*` keys and `module_fqns_per_model_part`.
        degree: ranks of the pp axis, at least 2 (`MeshDegrees.pipeline`).
        n_layers: the model's.
        tied_embeddings: whether the model's head uses the embedding's table.
        local_batch_size: sequences in the batch of one forward and backward pass.

    Raises:
        UserError: with every line of `check_pipeline`.
    """
    plan, problems = _draft(parallelism, degree, n_layers, tied_embeddings, local_batch_size)
    if problems:
        raise UserError("\n".join(problems))
    assert plan is not None
    return plan


def check_pipeline(
    parallelism: ParallelismSection, *, degree: int, n_layers: int, tied_embeddings: bool, local_batch_size: int
) -> list[str]:
    """Every rule that the pipeline breaks, a line each: key, value, rule, remedy. Arguments as `plan_pipeline`'s."""
    return _draft(parallelism, degree, n_layers, tied_embeddings, local_batch_size)[1]


def module_names(n_layers: int) -> list[str]:
    """The modules of a decoder that stages are made of, in the order in which they run."""
    return [EMBEDDING, *(f"layers.{layer}" for layer in range(n_layers)), NORM, HEAD]


def split_layers(n_layers: int, num_stages: int, *, first_less: int = 1, last_less: int = 1) -> list[list[str]]:
    """`num_stages` stages of about the same cost, in layers; the larger ones come first.

    Args:
        n_layers: layers of the model.
        num_stages: at least 1.
        first_less, last_less: layers that the embedding, and the head with its norm, cost.

    Returns:
        For each stage the names of its modules, every module of the model once.

    Raises:
        UserError: a stage would have nothing, or the embedding or the head alone costs more than a stage.
    """
    total = n_layers + first_less + last_less
    each, larger = divmod(total, num_stages)
    costs = [each + (stage < larger) for stage in range(num_stages)]
    if each == 0:
        raise UserError(
            f"{n_layers} layers, with {first_less} for the embedding and {last_less} for the head, do not fill "
            f"{num_stages} pipeline stages; use fewer stages (parallelism.pipeline_parallel_degree, {_LAYERS})"
        )
    costs[0] -= first_less
    costs[-1] -= last_less
    for key, less, left in ((_FIRST_LESS, first_less, costs[0]), (_LAST_LESS, last_less, costs[-1])):
        if left < 0:
            raise UserError(
                f"{key} = {less}: with {num_stages} stages over {n_layers} layers a stage has the cost of {each} "
                f"layers; set it to {max(0, less + left)} or less, or use fewer stages"
            )
    names = iter(module_names(n_layers))
    counts = [costs[0] + 1, *costs[1:]]
    counts[-1] += 2
    return [[next(names) for _ in range(count)] for count in counts]


def check_parts(parts: Sequence[Sequence[str]], n_layers: int) -> list[str]:
    """What is wrong with stages given by the names of their modules (`module_fqns_per_model_part`), a line each."""
    known = module_names(n_layers)
    given = [name for part in parts for name in part]
    problems = [f"part {number} is empty; name its modules" for number, part in enumerate(parts) if not part]
    for name in dict.fromkeys(given):
        if name not in known:
            problems.append(f'"{name}" is no module of the model{did_you_mean(name, known)}')
        elif given.count(name) > 1:
            problems.append(f'"{name}" stands in more than one place; name it once')
    if missing := [name for name in known if name not in given]:
        problems.append(f"{', '.join(missing)} in no part; every module belongs to one")
    if not problems and given != known:
        first = next(name for name, wanted in zip(given, known, strict=True) if name != wanted)
        problems.append(f'"{first}" is out of order; parts go on one another: {known[0]}, layers.0, ..., {HEAD}')
    if not problems and NORM not in parts[-1]:
        problems.append(f'"{NORM}" and "{HEAD}" belong to one part, the last')
    return [f"{_NAMES}: {problem}" for problem in problems]


def _draft(
    parallelism: ParallelismSection, degree: int, n_layers: int, tied_embeddings: bool, local_batch_size: int
) -> tuple[PipelinePlan | None, list[str]]:
    """The plan, as far as there is one, and what is wrong with it."""
    problems: list[str] = []
    if tied_embeddings:
        problems.append(
            "model.overrides.tied_embeddings = true: the embedding and the head are in different pipeline stages and "
            "cannot share their table; set it to false, or parallelism.pipeline_parallel_degree = 1"
        )
    size = parallelism.pipeline_parallel_microbatch_size
    microbatches: int | None = local_batch_size // size
    if local_batch_size % size:
        microbatches = None
        problems.append(
            f"{MICROBATCH} = {size}: training.local_batch_size = {local_batch_size} is not a multiple of it; change "
            "one of them"
        )
    if parallelism.pipeline_parallel_schedule_csv:
        path = parallelism.pipeline_parallel_schedule_csv
        name, placement, found = None, *placement_of_file(path, degree, microbatches)
        problems += found
        stages = None if placement is None else _split(parallelism, n_layers, len(placement), problems)
    else:
        path = None
        name = _find_schedule(parallelism.pipeline_parallel_schedule, problems)
        stages = None if name is None else _stages_of_schedule(parallelism, name, degree, n_layers, problems)
        placement = None
        if name is not None and stages is not None:
            placement = _place(len(stages), degree, v=SCHEDULES[name].v)
            if microbatches is not None:
                problems += _check_microbatches(name, microbatches, len(stages), degree)
    if problems or stages is None or placement is None:
        return None, problems
    overlaps = parallelism.pipeline_parallel_expert_parallel_overlap
    return PipelinePlan(name, path, tuple(map(tuple, stages)), tuple(placement), size, overlaps), []


def _find_schedule(given: str, problems: list[str]) -> str | None:
    """The engine's spelling of a schedule's name."""
    for name in SCHEDULES:
        if name.lower() == given.lower():
            return name
    listed = ", ".join(SCHEDULES)
    problems.append(f'{_SCHEDULE} = "{given}": not one of {listed}{did_you_mean(given, SCHEDULES)}')
    return None


def _stages_of_schedule(
    parallelism: ParallelismSection, name: str, degree: int, n_layers: int, problems: list[str]
) -> list[list[str]] | None:
    """The stages of a schedule that leaves their number open."""
    schedule = SCHEDULES[name]
    per_stage = parallelism.pipeline_parallel_layers_per_stage
    total = n_layers + parallelism.pipeline_parallel_first_stage_less_layers
    total += parallelism.pipeline_parallel_last_stage_less_layers
    if parallelism.module_fqns_per_model_part is not None:
        stages, what = len(parallelism.module_fqns_per_model_part), f"{_NAMES} has"
        remedy = f"name {schedule.fewest * degree} parts"
    elif per_stage is not None:
        stages, what = -(-total // per_stage), f"{_LAYERS} = {per_stage}: with embedding and head, {total} layers make"
        sizes = [n for n in range(1, total + 1) if _stages_fit(-(-total // n), degree, schedule)]
        remedy = f"take {min(sizes, key=lambda n: abs(n - per_stage))}" if sizes else "unset it"
    else:
        return _split(parallelism, n_layers, schedule.fewest * degree, problems)
    if not _stages_fit(stages, degree, schedule):
        wanted = {1: "one", 2: "two"}[schedule.fewest] + ("" if schedule.most else " or more")
        problems.append(
            f"{what} {stages} stages, but {name} on {degree} ranks (parallelism.pipeline_parallel_degree) needs "
            f"{wanted} for each rank; {remedy}, or choose another {_SCHEDULE}"
        )
        return None
    return _split(parallelism, n_layers, stages, problems)


def _stages_fit(stages: int, degree: int, schedule: Schedule) -> bool:
    each, rest = divmod(stages, degree)
    return rest == 0 and each >= schedule.fewest and (schedule.most is None or each <= schedule.most)


def _split(
    parallelism: ParallelismSection, n_layers: int, num_stages: int, problems: list[str]
) -> list[list[str]] | None:
    """The stages, of which there are `num_stages`: as named, or automatically."""
    parts = parallelism.module_fqns_per_model_part
    if parts is not None:
        found = check_parts(parts, n_layers)
        if len(parts) != num_stages:
            found.append(f"{_NAMES} has {len(parts)} parts, but the schedule has {num_stages} stages; name as many")
        problems += found
        return None if found else parts
    first_less = parallelism.pipeline_parallel_first_stage_less_layers
    last_less = parallelism.pipeline_parallel_last_stage_less_layers
    try:
        return split_layers(n_layers, num_stages, first_less=first_less, last_less=last_less)
    except UserError as error:
        problems.append(str(error))
        return None


def _place(num_stages: int, degree: int, *, v: bool) -> list[int]:
    """The rank of each stage."""
    placement = []
    for stage in range(num_stages):
        lap, place = divmod(stage, degree)
        placement.append(degree - 1 - place if v and lap % 2 else place)
    return placement


def _check_microbatches(name: str, microbatches: int, stages: int, degree: int) -> list[str]:
    """What is wrong with the number of microbatches for a schedule."""
    batch = f"training.local_batch_size / {MICROBATCH}"
    schedule = SCHEDULES[name]
    if schedule.fills and microbatches < stages:
        return [
            f"{_SCHEDULE}: {name} needs a microbatch for each of its {stages} stages, but {batch} = {microbatches}; "
            "raise training.local_batch_size, or use fewer stages"
        ]
    rounds = max(1, microbatches // degree)
    if schedule.rounds and microbatches % rounds:
        lower = next(n for n in range(microbatches, 0, -1) if n % max(1, n // degree) == 0)
        upper = next(n for n in range(microbatches, 2 * microbatches + degree) if n % max(1, n // degree) == 0)
        return [
            f"{_SCHEDULE}: {name} runs microbatches in rounds of one length, but {batch} = {microbatches} is not a "
            f"multiple of its {rounds} rounds; make it {lower} or {upper}"
        ]
    return []
