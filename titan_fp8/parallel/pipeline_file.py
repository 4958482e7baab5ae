"""Pipeline schedules from files: which rank runs which stage, and whether every stage runs every microbatch.

A file has the engine's format, a row for each rank of the pp axis and an action in each cell, in the order in which the
rank runs them:

    0F0,0F1,0B0,0B1         stage 0 runs microbatches 0 and 1 forward (F), then backward (B)
    1F0,1B0,1F1,1I1,1W1     I and W: the gradients of inputs and those of weights, apart

`(0F1;1B0)OVERLAP_F_B` is two actions at once. Communication is left out: the engine puts it in. Nothing here imports
torch.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

MICROBATCH = "parallelism.pipeline_parallel_microbatch_size"
_CSV = "parallelism.pipeline_parallel_schedule_csv"
_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_COMMUNICATION = re.compile(r"\d+(SEND|RECV|UNSHARD|RESHARD|REDUCE)")


def placement_of_file(path: str, degree: int, microbatches: int | None) -> tuple[list[int] | None, list[str]]:
    """The rank of each stage in a file, and what is wrong with it, except for the order of actions on several ranks,
    which the engine checks.

    Args:
        path: of the file.
        degree: ranks of the pp axis.
        microbatches: of a local batch; None: nobody knows, and whether each is run is not looked at.

    Returns:
        For each stage its rank, or None if anything is wrong; and a line for each thing that is.
    """
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return None, [f'{_CSV} = "{path}": cannot be read ({reason}); name a file with a row for each rank']
    problems: list[str] = []
    owners: dict[int, int] = {}
    done: dict[tuple[int, str], list[int]] = {}
    for rank, row in enumerate(rows):
        for column, cell in enumerate(row, start=1):
            actions = _actions(cell.strip())
            if actions is None:
                fault = "communicates, which is left out" if _COMMUNICATION.match(cell.strip()) else "is no action"
                problems.append(f'row {rank + 1}, column {column}: "{cell}" {fault}; write 2F0, 2B0, 2I0 or 2W0')
            for stage, kind, microbatch in actions or []:
                done.setdefault((stage, kind), []).append(microbatch)
                if owners.setdefault(stage, rank) != rank:
                    problems.append(f"stage {stage} stands in rows {owners[stage] + 1} and {rank + 1}; give it one")
    if len(rows) != degree:
        problems.append(f"has {len(rows)} rows, but parallelism.pipeline_parallel_degree is {degree}; write as many")
    stages = max(owners, default=-1) + 1
    problems += [f"stage {stage} stands nowhere; number them from 0" for stage in range(stages) if stage not in owners]
    if not problems and microbatches is not None:
        problems += _check_actions(done, stages, microbatches)
    if not owners:
        problems.append("holds no action; write a row for each rank")
    lines = [f'{_CSV} = "{path}": {problem}' for problem in dict.fromkeys(problems)]
    return (None if lines else [owners[stage] for stage in range(stages)]), lines


def _actions(cell: str) -> list[tuple[int, str, int]] | None:
    """The (stage, kind, microbatch) in one cell, several of them in `(0F1;1B0)OVERLAP_F_B`; None if it is neither."""
    inner = re.fullmatch(r"\((.*)\)OVERLAP_F_B", cell)
    matches = [_ACTION.fullmatch(part.strip()) for part in (inner[1].split(";") if inner else [cell] if cell else [])]
    if None in matches:
        return None
    return [(int(match[1]), match[2], int(match[3])) for match in matches if match is not None]


def _check_actions(done: Mapping[tuple[int, str], list[int]], stages: int, microbatches: int) -> list[str]:
    """Whether every stage runs every microbatch forward and backward, once."""
    wanted = list(range(microbatches))
    problems = []
    for stage in range(stages):
        forward = done.get((stage, "F"), [])
        backward = sorted(done.get((stage, "B"), []) + done.get((stage, "I"), []))
        inputs, weights = sorted(done.get((stage, "I"), [])), sorted(done.get((stage, "W"), []))
        if sorted(forward) != wanted or backward != wanted or inputs != weights:
            problems.append(
                f"stage {stage} does not run each of the {microbatches} microbatches (training.local_batch_size / "
                f"{MICROBATCH}) once as F and once as B, or as I and W"
            )
        elif stage == stages - 1 and forward != wanted:
            problems.append(f"stage {stage}, the last, runs F out of order, but the engine keeps losses in order")
    return problems
