"""What a pipeline tells its engine of the tensors between stages is what flows there, on every mesh."""

from pathlib import Path

import pytest
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.trainings import Mesh, train
from titan_fp8.parallel import pipeline

Form = tuple


class _Watched(pipeline._Stage):
    """A stage that notes what it was told of its input and output, and what they are."""

    seen: "list[tuple[Form, Form]]"

    def __init__(self, *args, input_args, output_args, **options):
        super().__init__(*args, input_args=input_args, output_args=output_args, **options)
        self.told = [_form(each) for each in (*input_args, *output_args)]

    def forward_maybe_with_nosync(self, *args, **kwargs):
        output = super().forward_maybe_with_nosync(*args, **kwargs)
        self.seen += zip(self.told, [_form(args[0]), _form(output)], strict=True)
        return output


def _form(tensor: Tensor) -> Form:
    return tuple(tensor.shape), tensor.dtype, tensor.stride()


def _forms_on_a_rank(rank: int, world_size: int, arguments: list[str], folder: str) -> list[tuple[Form, Form]]:
    """(told, real) of every input and output of the stages of this rank in one step."""
    _Watched.seen = []
    original, pipeline._Stage = pipeline._Stage, _Watched
    try:
        train(rank, world_size, arguments, folder, steps=1)
    finally:
        pipeline._Stage = original
    return _Watched.seen


MICROBATCH = ("parallelism.pipeline_parallel_microbatch_size", "2")
BF16 = ("training.mixed_precision_param", "bfloat16")
TOKENS, LOCAL = 32, 2
LOGITS = {
    Mesh("pp2", (MICROBATCH, BF16)): (LOCAL, TOKENS, 320),
    Mesh("pp2 cp2", (MICROBATCH,)): (LOCAL, TOKENS // 2, 320),
    Mesh("pp2 tp2", (MICROBATCH, BF16)): (1, LOCAL * TOKENS, 160),
    Mesh("pp2 tp2", (MICROBATCH, ("parallelism.disable_loss_parallel", "true"))): (1, LOCAL * TOKENS, 320),
}


@pytest.mark.parametrize("mesh", LOGITS, ids=lambda mesh: f"{mesh.axes.replace(' ', '_')}_{len(mesh.options)}")
def test_inputs_and_outputs_of_stages_are_what_the_engine_was_told(mesh: Mesh, tmp_path: Path) -> None:
    ranks = run_distributed(_forms_on_a_rank, mesh.ranks, mesh.arguments(), str(tmp_path), timeout_s=240.0)
    for forms in ranks:
        assert len(forms) == 2 * 4 // LOCAL, "an input and an output of each microbatch"
        assert [told for told, _ in forms] == [real for _, real in forms]
    assert ranks[-1][1][1][0] == LOGITS[mesh]
