"""Which pairs of a schedule run in turns."""

import pytest
from torch.distributed.pipelining.schedules import _Action

from titan_fp8.parallel.config import ParallelismSection
from titan_fp8.parallel.pipeline_overlap import _unless_overlapped
from titan_fp8.parallel.pipeline_split import plan_pipeline


def _pair(text: str) -> _Action:
    action = _Action.from_str(text)
    assert action is not None
    return action


@pytest.mark.parametrize("text", ["(2F1;1B0)OVERLAP_F_B", "(1F1;2B0)OVERLAP_F_B", "(2F1;1I0)OVERLAP_F_B", "1F0", "2W0"])
def test_a_forward_and_a_backward_pass_of_two_stages_stay_together(text: str) -> None:
    assert _unless_overlapped(_pair(text)) == [_pair(text)]


@pytest.mark.parametrize(
    "parts",
    [("1F1", "1B0"), ("1B0", "2F1"), ("2F1", "1W0"), ("1F0", "2F1"), ("1B0", "2B1"), ("1F1", "2B0", "2F1")],
    ids=";".join,
)
def test_other_actions_run_one_after_the_other(parts: tuple[str, ...]) -> None:
    pair = _Action(-1, _pair("(2F1;1B0)OVERLAP_F_B").computation_type, None, tuple(map(_pair, parts)))
    assert list(_unless_overlapped(pair)) == [_pair(part) for part in parts]


@pytest.mark.parametrize("key", [True, False])
def test_the_plan_says_what_the_key_says(key: bool) -> None:
    section = ParallelismSection(pipeline_parallel_expert_parallel_overlap=key)
    plan = plan_pipeline(section, degree=2, n_layers=4, tied_embeddings=False, local_batch_size=4)
    assert plan.overlaps is key
