"""Which modules make up a pipeline stage, which rank runs it, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import schedules as engine
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from titan_fp8.converters.fusion import fuse_producers
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.initialization import initialize
from titan_fp8.parallel.apply import materialize
from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.pipeline import split_model
from titan_fp8.parallel.pipeline_split import (
    SCHEDULES,
    PipelinePlan,
    check_parts,
    check_pipeline,
    module_names,
    plan_pipeline,
    split_layers,
)
from titan_fp8.quantization.function import Float8Config
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.recipes import RECIPES
from titan_fp8.quantization.weights import cache_weights
from titan_fp8.runtime.errors import UserError

SINGLE = ("1F1B", "GPipe")
V = ("ZBVZeroBubble", "DualPipeV")


def _arguments(degree: int = 2, n_layers: int = 8, tied: bool = False, batch: int = 8, **keys: Any) -> dict[str, Any]:
    section = ParallelismSection(**{f"pipeline_parallel_{key}": value for key, value in keys.items() if key != "parts"})
    if "parts" in keys:
        section = section.model_copy(update={"module_fqns_per_model_part": keys["parts"]})
    return {
        "parallelism": section,
        "degree": degree,
        "n_layers": n_layers,
        "tied_embeddings": tied,
        "local_batch_size": batch,
    }


def _plan(**options: Any) -> PipelinePlan:
    return plan_pipeline(**_arguments(**options))


def _problems(**options: Any) -> list[str]:
    return check_pipeline(**_arguments(**options))


def _layers(stages: list[list[str]]) -> list[int]:
    return [sum(name.startswith("layers.") for name in stage) for stage in stages]


# ---- the automatic split


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n_layers", [6, 7, 32])
@pytest.mark.parametrize("less", [(0, 0), (1, 1), (0, 2), (2, 1)])
def test_a_split_has_every_module_once_in_order_and_no_stage_costs_two_layers_more(
    n_layers: int, num_stages: int, less: tuple[int, int]
) -> None:
    try:
        stages = split_layers(n_layers, num_stages, first_less=less[0], last_less=less[1])
    except UserError:
        each = (n_layers + sum(less)) // num_stages
        assert each == 0 or max(less) > each
        return
    assert [name for stage in stages for name in stage] == module_names(n_layers)
    assert all(stages)
    costs = _layers(stages)
    costs[0] += less[0]
    costs[-1] += less[1]
    assert max(costs) - min(costs) <= 1
    assert costs == sorted(costs, reverse=True)


def test_embedding_and_head_count_as_layers() -> None:
    assert _layers(split_layers(14, 4)) == [3, 4, 4, 3]
    assert _layers(split_layers(32, 4, first_less=0, last_less=0)) == [8, 8, 8, 8]
    assert split_layers(2, 2) == [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]


def test_the_embedding_may_be_alone() -> None:
    assert split_layers(2, 4) == [["tok_embeddings"], ["layers.0"], ["layers.1"], ["norm", "output"]]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="2 layers, with 1 for the embedding and 1 for the head, do not fill 5 "):
        split_layers(2, 5)


def test_an_embedding_that_costs_more_than_a_stage_is_refused() -> None:
    with pytest.raises(UserError, match=r"first_stage_less_layers = 6: .* set it to 4 or less, or use fewer stages"):
        split_layers(8, 4, first_less=6, last_less=1)
    assert split_layers(8, 4, first_less=4, last_less=1)


# ---- named parts

NAMED = [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (
            [["tok_embeddings", "layer.0"], ["layers.1", "norm", "output"]],
            '"layer.0" is no module of the model (did',
        ),
        ([["tok_embeddings", "layers.0"], ["norm", "output"]], "layers.1 in no part; every module belongs to one"),
        (
            [["tok_embeddings", "layers.0"], ["layers.0", "layers.1", "norm", "output"]],
            '"layers.0" stands in more',
        ),
        ([["tok_embeddings", "layers.1"], ["layers.0", "norm", "output"]], '"layers.1" is out of order; parts go on'),
        ([["layers.0", "tok_embeddings"], ["layers.1", "norm", "output"]], '"layers.0" is out of order'),
        ([["norm", "output"], ["tok_embeddings", "layers.0", "layers.1"]], '"norm" is out of order'),
        ([["tok_embeddings", "layers.0", "layers.1", "norm"], ["output"]], '"norm" and "output" belong to one part'),
        ([["tok_embeddings", "layers.0", "layers.1", "norm", "output"], []], "part 1 is empty; name its modules"),
        ([["tok_embeddings", "layers.0", "layers.2"], ["layers.1", "norm", "output"]], '"layers.2" is no module'),
    ],
)
def test_named_parts_are_checked(parts: list[list[str]], problem: str) -> None:
    found = check_parts(parts, 2)
    assert any(line.startswith(f"parallelism.module_fqns_per_model_part: {problem}") for line in found), found
    assert found[0] in _problems(n_layers=2, parts=parts)


def test_good_parts_are_taken_as_they_are() -> None:
    assert check_parts(NAMED, 2) == []
    assert _plan(n_layers=2, parts=NAMED).stages == tuple(map(tuple, NAMED))


def test_the_number_of_named_parts_fits_the_schedule() -> None:
    (line,) = _problems(n_layers=2, parts=NAMED, schedule="Interleaved1F1B")
    assert "module_fqns_per_model_part has 2 stages, but Interleaved1F1B on 2 ranks" in line
    assert "needs two or more for each rank; name 4 parts" in line


# ---- schedules and placement


def test_the_table_of_schedules_is_the_engines() -> None:
    concrete = {
        name.removeprefix("Schedule")
        for name, kind in vars(engine).items()
        if isinstance(kind, type) and issubclass(kind, engine._PipelineSchedule) and name.startswith("Schedule")
    }
    assert set(SCHEDULES) == concrete
    for name in SCHEDULES:
        kind = engine.get_schedule_class(name)
        assert issubclass(kind, engine.PipelineScheduleSingle) == (name in SINGLE)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_stages_are_placed_where_the_engine_places_them(name: str, degree: int) -> None:
    plan = _plan(schedule=name.lower(), degree=degree, n_layers=14, batch=24)
    assert plan.schedule == name
    assert len(plan.stages) == degree * (1 if name in SINGLE else 2)
    style = "v" if name in V else "loop"
    assert dict(enumerate(plan.placement)) == generate_stage_to_rank_mapping(degree, len(plan.stages), style)
    assert sorted(stage for rank in range(degree) for stage in plan.stages_of(rank)) == list(range(len(plan.stages)))


def test_a_v_has_both_ends_on_the_first_rank() -> None:
    assert _plan(schedule="DualPipeV", degree=4, n_layers=14).stages_of(0) == [0, 7]
    assert _plan(schedule="Interleaved1F1B", degree=4, n_layers=14).stages_of(0) == [0, 4]


def test_an_unknown_schedule_is_answered_with_the_nearest() -> None:
    (line,) = _problems(schedule="Interleaved1F1")
    assert line.startswith('parallelism.pipeline_parallel_schedule = "Interleaved1F1": not one of 1F1B, GPipe, ')
    assert line.endswith('(did you mean "Interleaved1F1B"?)')


def test_layers_per_stage_decides_the_number_of_stages() -> None:
    assert len(_plan(schedule="Interleaved1F1B", n_layers=14, layers_per_stage=2).stages) == 8
    assert len(_plan(schedule="1F1B", n_layers=14, layers_per_stage=8).stages) == 2


@pytest.mark.parametrize(
    ("schedule", "layers", "told"),
    [
        ("1F1B", 4, "make 4 stages, but 1F1B on 2 ranks (parallelism.pipeline_parallel_degree) needs one for"),
        ("1F1B", 5, "needs one for each rank; take 8"),
        ("Interleaved1F1B", 8, "make 2 stages, but Interleaved1F1B on 2 ranks"),
        ("Interleaved1F1B", 6, "needs two or more for each rank; take 5"),
        ("ZBVZeroBubble", 2, "needs two for each rank; take 4"),
    ],
)
def test_layers_per_stage_must_fit_the_ranks_and_the_schedule(schedule: str, layers: int, told: str) -> None:
    (line,) = _problems(schedule=schedule, n_layers=14, layers_per_stage=layers)
    assert line.startswith(f"parallelism.pipeline_parallel_layers_per_stage = {layers}: ")
    assert told in line


class _Fake:
    """As much of a stage as the engine's schedules look at when they are made."""

    def __init__(self, index: int, count: int, ranks: int):
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, count, ranks, 0
        self.submod = nn.Module()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("degree", [2, 4])
def test_the_engine_makes_each_schedule_that_is_accepted_and_no_other(name: str, degree: int) -> None:
    count = degree * (1 if name in SINGLE else 2)
    for microbatches in range(1, 13):
        stages: list[Any] = [_Fake(stage, count, degree) for stage in ([0] if name in SINGLE else [0, degree])]
        kind: Any = engine.get_schedule_class(name)
        try:
            kind(stages[0] if name in SINGLE else stages, microbatches)
            refused = False
        except ValueError:
            refused = True
        told = _problems(schedule=name, degree=degree, n_layers=14, batch=microbatches)
        assert bool(told) == refused, (microbatches, told)


def test_microbatches_that_do_not_make_rounds_are_answered_with_the_next_that_do() -> None:
    (line,) = _problems(schedule="Interleaved1F1B", batch=7)
    assert "= 7 is not a multiple of its 3 rounds; make it 6 or 8" in line


# ---- the rest of the rules


def test_all_broken_rules_are_told_at_once() -> None:
    found = _problems(tied=True, schedule="2F2B", microbatch_size=3, parts=[["tok_embeddings"]])
    assert [line.split(" ", 1)[0].rstrip(":") for line in found] == [
        "model.overrides.tied_embeddings",
        "parallelism.pipeline_parallel_microbatch_size",
        "parallelism.pipeline_parallel_schedule",
    ]
    assert "training.local_batch_size = 8 is not a multiple of it" in found[1]
    with pytest.raises(UserError) as caught:
        _plan(tied=True, schedule="2F2B", microbatch_size=3)
    assert str(caught.value).split("\n") == found


def test_a_sound_pipeline_has_no_problem() -> None:
    assert _problems() == []


def _file(folder: Path, *rows: str) -> str:
    path = folder / "schedule.csv"
    path.write_text("".join(row + "\n" for row in rows))
    return str(path)


def test_a_file_says_where_stages_are(tmp_path: Path) -> None:
    path = _file(tmp_path, "0F0,0F1,,2F0,2B0,2F1,2B1,0B0,0B1", "1F0,(1F1;1B0)OVERLAP_F_B,1I1,1W1")
    plan = _plan(schedule="ignored", schedule_csv=path, batch=2)
    assert plan == PipelinePlan(None, path, plan.stages, (0, 1, 0), 1)
    assert len(plan.stages) == 3


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["0F0,0B0"], "has 1 rows, but parallelism.pipeline_parallel_degree is 2"),
        (["0F0,0B0", "1F0,0B0,1B0"], "stage 0 stands in rows 1 and 2; give it one"),
        (["0F0,0B0", "2F0,2B0"], "stage 1 stands nowhere; number them from 0"),
        (["0F0,0X0", "1F0,1B0"], 'row 1, column 2: "0X0" is no action; write 2F0'),
        (["0F0,0SEND_F0,0B0", "1F0,1B0"], 'row 1, column 2: "0SEND_F0" communicates, which is left out'),
        (["0F0,0B0", "1F0,1I0"], "stage 1 does not run each of the 1 microbatches"),
        (["0F0,0F1,0B0,0B1", "1F0,1B0"], "stage 0 does not run each of the 1 microbatches"),
        (["", ""], "holds no action"),
    ],
)
def test_a_file_is_checked(rows: list[str], told: str, tmp_path: Path) -> None:
    path = _file(tmp_path, *rows)
    found = _problems(schedule_csv=path, batch=1)
    assert any(line.startswith(f'parallelism.pipeline_parallel_schedule_csv = "{path}": {told}') for line in found), (
        found
    )


def test_a_file_whose_last_stage_runs_out_of_order_is_refused(tmp_path: Path) -> None:
    (line,) = _problems(schedule_csv=_file(tmp_path, "0F1,0F0,0B1,0B0", "1F1,1F0,1B1,1B0"), batch=2)
    assert "stage 1, the last, runs F out of order" in line


def test_a_missing_file_is_told() -> None:
    (line,) = _problems(schedule_csv="/nowhere/schedule.csv")
    assert '"/nowhere/schedule.csv": cannot be read (No such file or directory)' in line


def test_planning_imports_no_torch() -> None:
    program = "import sys, titan_fp8.parallel.pipeline_split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


# ---- parts of a model


def _model(*, recipe: str | None = "rowwise", cached: bool = False, fused: bool = False) -> Decoder:
    dims = ModelDims(n_layers=4, dim=48, n_heads=3, n_kv_heads=1, ffn_dim=80, vocab_size=67, max_seq_len=16)
    with torch.device("meta"):
        model = Decoder(dims, compute_dtype=torch.bfloat16)
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if recipe is not None and isinstance(child, nn.Linear):
                linear = Float8Linear.from_linear(child, Float8Config(RECIPES[recipe], emulate=True))
                setattr(parent, name, linear)
    if cached:
        cache_weights(model, [module for module in model.modules() if isinstance(module, Float8Linear)])
    if fused:
        fuse_producers(model)
    return model


STAGES = [["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["layers.3", "norm", "output"]]


def test_parts_hold_the_models_own_modules_under_their_names() -> None:
    model = _model(fused=True)
    before = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    parts = split_model(model, STAGES, [0, 1, 2])
    held = {name: module for part in parts for name, module in part.named_modules()}
    assert {name for name in before if name not in ("", "layers", "rope")} <= held.keys()
    assert all(held[name] is module for name, module in before.items() if name not in ("", "layers", "rope"))
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert names == list(parameters)
    assert dict(model.named_modules()) == before, "the model itself has changed"
    assert [list(part.layers) for part in parts] == [["0"], ["1", "2"], ["3"]]


def test_parts_in_a_row_compute_what_the_model_computes() -> None:
    model = _model(cached=True, fused=True)
    parts = split_model(model, STAGES, [0, 1, 2])
    whole = _model(cached=True, fused=True)
    for each in (*parts, whole):
        materialize(each, torch.device("cpu"))
        initialize(each, seed=5)
    tokens = torch.randint(67, (2, 16))
    x = tokens
    for part in parts:
        x = part(x)
    assert torch.equal(x, whole(tokens))


def test_hooks_of_the_model_act_on_its_parts_and_those_of_a_part_on_it_alone() -> None:
    model = _model(recipe=None)
    seen: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(module))
    first, last = split_model(model, STAGES, [0, 2])
    first.register_forward_pre_hook(lambda module, args: seen.append(module))
    x = first(torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    last(x)
    assert seen == [first, first, last]


def test_moving_one_part_leaves_the_others_tables_alone() -> None:
    first, last = split_model(_model(recipe=None), STAGES, [0, 2])
    materialize(first, torch.device("cpu"))
    assert first.rope.cos.device.type == "cpu"
    assert last.rope.cos.is_meta
