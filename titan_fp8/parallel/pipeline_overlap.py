"""Pairs of a pipeline's passes that run in turns: while the tokens of one are on their way to experts or back, the
other one computes.

DualPipeV (arXiv 2412.19437) has two stages on every rank, and in its steady state pairs the forward pass of one
microbatch in one of them with the backward pass of another microbatch in the other. Neither needs anything of the
other:

    forward     attention  a goes  |                         |  experts  a returns  |                        |  ...
    backward                       |  ...  b's gradients go  |                      |  experts  they return  |

Wherever a pass has begun an exchange of tokens it hands over to the other one (`runtime/turns.py`), and it waits for
the exchange when it has its turn again. What is computed, and the order in which gradients add up, is that of passes
one after the other: the two have no parameter in common. Whatever a layer recomputes in the backward pass, exchanges
included, belongs to the backward pass.

Ranks of a group that exchanges tokens are ranks of one place on the pp axis: they run the same pairs of the same
layers, hand over as often, and so begin all their collectives in the same order.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    FORWARD,
    FULL_BACKWARD,
    OVERLAP_F_B,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)

from titan_fp8.models.moe import MoE
from titan_fp8.parallel.expert import ExchangeDispatcher
from titan_fp8.runtime.turns import Turns


def overlap_exchanges(schedule: Any, parts: Sequence[nn.Module], device: torch.device) -> None:
    """Have the pairs of `schedule` run in turns where `parts` exchange tokens; elsewhere nothing changes.

    Args:
        schedule: the engine's. Of its own schedules DualPipeV has pairs; a file has those that it writes.
        parts: of this rank, in which experts are dealt out already.
        device: where they compute.
    """
    layers = [module for part in parts for module in part.modules() if isinstance(module, MoE)]
    dispatchers = [layer.dispatcher for layer in layers if isinstance(layer.dispatcher, ExchangeDispatcher)]
    if not dispatchers or not isinstance(schedule, _PipelineScheduleRuntime):
        return
    turns = Turns(device)
    for dispatcher in dispatchers:
        dispatcher.hand_over = turns.hand_over
    order = schedule.pipeline_order_with_comms
    assert order is not None
    order[schedule.rank] = [each for action in order[schedule.rank] for each in _unless_overlapped(action)]
    schedule.register_custom_function(OVERLAP_F_B, partial(_run_pair, turns))


def _unless_overlapped(action: _Action) -> Sequence[_Action]:
    """An action, or the parts of a pair that is not to run in turns, as the engine would run them.

    Two passes of one stage use the same parameters, whose gathering and freeing by FSDP is that of one pass at a time.
    """
    parts = action.sub_actions
    if parts is None:
        return [action]
    kinds = [part.computation_type for part in parts]
    is_pair = len(parts) == 2 and kinds[0] == FORWARD and kinds[1] in (FULL_BACKWARD, BACKWARD_INPUT)
    return [action] if is_pair and parts[0].stage_index != parts[1].stage_index else parts


def _run_pair(turns: Turns, action: _Action, ctx: _PipelineContext) -> None:
    assert action.sub_actions is not None
    forward, backward = action.sub_actions
    turns.run(partial(_run_forward, forward, ctx), partial(_run_backward, backward, ctx))


def _run_forward(action: _Action, context: _PipelineContext) -> None:
    """What the engine does with an F."""
    schedule: Any = context.schedule_ref
    stages, microbatch = _stages(schedule), action.microbatch_index
    assert microbatch is not None
    assert context.arg_mbs is not None
    assert context.kwarg_mbs is not None
    stage = stages[action.stage_index]
    schedule._assert_unsharded(stage)
    if not stage.is_first and stage.stage_index - 1 not in stages:
        _wait_batch_p2p(schedule.fwd_recv_ops.pop((stage.stage_index, microbatch)))
    inputs, others = context.arg_mbs[microbatch], context.kwarg_mbs[microbatch]
    output = stage.forward_one_chunk(microbatch, inputs, others, save_forward_output=False)
    schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
    if after := stages.get(stage.stage_index + 1):
        after.set_local_fwd_input(output, microbatch)


def _run_backward(action: _Action, context: _PipelineContext) -> None:
    """What the engine does with a B or an I."""
    schedule: Any = context.schedule_ref
    stages, microbatch = _stages(schedule), action.microbatch_index
    assert microbatch is not None
    stage = stages[action.stage_index]
    schedule._assert_unsharded(stage)
    if not stage.is_last and stage.stage_index + 1 not in stages:
        _wait_batch_p2p(schedule.bwd_recv_ops.pop((stage.stage_index, microbatch)))
    is_full = action.computation_type == FULL_BACKWARD
    schedule.backward_counter[stage.stage_index] += is_full
    stage.backward_one_chunk(
        microbatch,
        loss=schedule._maybe_get_loss(stage, microbatch),
        full_backward=is_full,
        last_backward=is_full and schedule.backward_counter[stage.stage_index] == schedule._n_microbatches,
    )
    if before := stages.get(stage.stage_index - 1):
        before.set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)


def _stages(schedule: Any) -> dict[int, Any]:
    """The stages of this rank by their numbers."""
    return {stage.stage_index: stage for stage in schedule._stages}
