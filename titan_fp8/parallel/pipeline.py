"""Pipeline parallelism on `torch.distributed.pipelining`: parts of a model on different ranks, fed in microbatches.

    rank 0   F0 F1 F2 F3 .  .  B0 .  B1 .  B2 .  B3      F: forward of a microbatch, sends the residual stream on
    rank 1      F0 .  B0 F1 B1 F2 B2 F3 B3               B: backward, sends the stream's gradient back

`split_model` cuts a converted model into parts under their old names; each part is then parallelized by itself, and a
`Pipeline` runs them. The engine keeps the order of passes and communicates; what is ours:

- **The loss is divided by the number of labels that the trainer counted**, and by nothing else, so gradients are the
  sums that one process accumulates over the same microbatches.
- **Shapes are told, not inferred.** The engine would find them out with a forward and backward pass of their own, which
  hooks and weight caches would see. It may check what it was told: PyTorch 2.11 does, later versions when debugging.
- **FSDP.** Within one `step` the engine adds up gradients of whole parameters and reduces them once, at the end, so
  gathered weights stay until then: `fsdp_reshard_after_forward = "default"` means never here. Several `step`s add up.
- **Where backward is split.** The zero-bubble schedules (and I and W of a file) want the gradients of inputs first and
  those of weights later. Linears, float8 or not, then hand the products that make their weights' gradients over
  (`runtime/deferred.py`), and W computes them, so nothing is computed twice, not even what is recomputed. They are
  added up in fp32 and reach FSDP with the last microbatch. A compiled block's backward pass is one program: it
  computes all in I, and nothing is left for W.
- **Pairs.** Where a schedule says that a forward and a backward pass run at once, the engine runs one after the other;
  where experts exchange tokens, `pipeline_overlap.py` lets them take turns.
- **Evaluation** is a wave: in tick t, stage s runs microbatch t - s. It needs no backward, fits every placement, and
  keeps no logits.

Legend: B sequences of the local batch, b of a microbatch, S tokens of a sequence held here, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from titan_fp8.models.decoder import Decoder, TransformerBlock
from titan_fp8.models.initialization import Distribution
from titan_fp8.models.linear import Linear
from titan_fp8.parallel.pipeline_overlap import overlap_exchanges
from titan_fp8.parallel.pipeline_split import EMBEDDING, HEAD, NORM, PipelinePlan
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.quantization.mx_linear import MXFP8Linear
from titan_fp8.runtime.deferred import DeferredWeights, Give, add_to_grad
from titan_fp8.runtime.errors import UserError

LossFn = Callable[[Tensor, Tensor], Tensor]
_COMPILED = "_torchdynamo_orig_callable"  # an attribute of what torch.compile returns
ShapeOf = Callable[[int, int], tuple[int, ...]]
"""(sequences, their tokens held here) -> the shape of what is computed of them."""
_Module = TypeVar("_Module", bound=nn.Module)


class DecoderPart(Decoder):
    """What one stage runs of a decoder: some of its layers, the embedding or None, norm and head or None."""

    def init_rules(self) -> dict[str, Distribution]:
        """Those of the whole decoder for what is here."""
        rules = super().init_rules()
        return {name: rule for name, rule in rules.items() if getattr(self, name.partition(".")[0]) is not None}


def split_model(model: Decoder, stages: Sequence[Sequence[str]], mine: Sequence[int]) -> list[Decoder]:
    """The parts of `model` that this rank runs.

    Parts have the model's own modules, not copies of them, under the same names (`layers.5` stays `layers.5`), and the
    model's own hooks, which see the part they are called for. `model` is left as it is and is to be dropped.

    Args:
        model: converted, on the meta device, not yet parallelized.
        stages: for each stage the names of its modules (`PipelinePlan.stages`).
        mine: the stages of this rank (`PipelinePlan.stages_of`).
    """
    assert not model.dims.tied_embeddings, "refused by check_pipeline"
    return [_part(model, set(stages[stage])) for stage in mine]


def _part(model: Decoder, names: set[str]) -> Decoder:
    part = _with_own_tables(model, DecoderPart)
    for name in (EMBEDDING, NORM, HEAD):
        if name not in names:
            part._modules[name] = None
    # Moving a part moves its tables of positions, so each has its own.
    part.rope = _with_own_tables(model.rope, type(model.rope))
    part.layers = _with_own_tables(model.layers, type(model.layers))
    part.layers._modules = {
        number: block for number, block in model.layers._modules.items() if f"layers.{number}" in names
    }
    return part


def _with_own_tables(module: nn.Module, kind: type[_Module]) -> _Module:
    """A module with the contents of `module`, whose tables of children, parameters, hooks are its own."""
    copy = kind.__new__(kind)
    copy.__dict__.update({k: v.copy() if isinstance(v, dict | set) else v for k, v in module.__dict__.items()})
    return copy


def defer_weight_gradients(part: nn.Module) -> DeferredWeights:
    """Let the linears of `part` hand over the products for their weights' gradients, but for those in compiled code."""
    queue = DeferredWeights()
    inside = {id(module) for compiled in _compiled(part) for module in compiled.modules()}
    linears = [module for module in part.modules() if isinstance(module, Linear | Float8Linear | MXFP8Linear)]
    for module in linears:
        if id(module) not in inside and module.weight.requires_grad:
            module.weight_sink = queue.sink_of(module)
    return queue


def _compiled(part: nn.Module) -> Iterator[nn.Module]:
    """The modules that run in compiled code (`apply_compile`)."""
    for module in part.modules():
        if hasattr(module.forward, _COMPILED):
            yield module
        elif isinstance(module, TransformerBlock) and hasattr(module.attend_and_norm, _COMPILED):
            yield module.attention


def _to_fsdp(part: nn.Module) -> Give:
    """Where the gradients of `part` belong. FSDP adds up microbatches in the dtype in which it reduces, beside `.grad`,
    and wants all gradients of a unit there."""
    places: dict[int, Any] = {}
    for module in part.modules():
        group: Any = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for each in group.fsdp_params if group is not None else ():
            if each.reduce_dtype is not None:
                places[id(getattr(each, "_unsharded_param", None))] = each

    def give(weight: Tensor, grad: Tensor) -> None:
        place = places.get(id(weight))
        if place is None:
            add_to_grad(weight, grad)
            return
        grad, before = grad.to(place.reduce_dtype), place.unsharded_accumulated_grad
        place.unsharded_accumulated_grad = grad if before is None else before + grad

    return give


class Pipeline:
    """The parts of this rank, with the others' in a pipeline. All ranks of the pp axis make one and call it together.

    Args:
        parts: from `split_model`, in the order of `plan.stages_of(rank)`, parallelized and materialized.
        plan: from `plan_pipeline`.
        group: the process group of the pp axis.
        device: where the parts compute.
        batch_sequences: B of `step`.
        seq_len: S of `step`.
        loss_fn: `loss_fn(logits, labels [b, S])` returns the fp32 sum of the losses of the labels that count.
        stream_shape: of the residual stream between parts; None: `[b, S, dim]`.
        logits_shape: of what the last part makes; None: `[b, S, V]`.

    Raises:
        UserError: B is no multiple of the microbatch size, or the order of a schedule's file cannot be run.
    """

    def __init__(
        self,
        parts: Sequence[Decoder],
        plan: PipelinePlan,
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        batch_sequences: int,
        seq_len: int,
        loss_fn: LossFn,
        stream_shape: ShapeOf | None = None,
        logits_shape: ShapeOf | None = None,
    ) -> None:
        if batch_sequences % plan.microbatch_size:
            raise UserError(
                f"a local batch of {batch_sequences} sequences is not a multiple of "
                f"parallelism.pipeline_parallel_microbatch_size = {plan.microbatch_size}; change one of them"
            )
        dims = parts[0].dims
        self.plan = plan
        self.shape = batch_sequences, seq_len
        self._group, self._device, self._loss_fn = group, device, loss_fn
        self._rank = dist.get_rank(group)
        self._parts = dict(zip(plan.stages_of(self._rank), parts, strict=True))
        self._last = len(plan.stages) - 1
        self._stream_shape = stream_shape or (lambda sequences, length: (sequences, length, dims.dim))
        self._stream_dtype = parts[0].compute_dtype or next(parts[0].parameters()).dtype
        self._label_tokens = torch.ones((), device=device)
        self._logits_shape = logits_shape or (lambda sequences, length: (sequences, length, dims.vocab_size))
        self._stages = self._build_stages()
        self._schedule = self._build_schedule()

    def step(
        self,
        tokens: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        *,
        label_tokens: Tensor,
        seq_len: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Forward and backward of one local batch; gradients are added to those that are there.

        Args:
            tokens, labels, document_ids: `[B, S]`, the same on all ranks of the pp axis.
            label_tokens: fp32 scalar on the device, what every loss is divided by.
            seq_len, positions: as `Decoder.forward` has them.

        Returns:
            The sum of the divided losses, an fp32 scalar without gradient; 0 on ranks without the last stage.

        Raises:
            ValueError: the batch has another shape than the pipeline was built for.
        """
        if tuple(tokens.shape) != self.shape:
            raise ValueError(f"a pipeline built for batches of {list(self.shape)} got one of {list(tokens.shape)}")
        self._label_tokens = label_tokens
        for stage in self._stages:
            stage.for_all = {"seq_len": tokens.shape[1] if seq_len is None else seq_len, "positions": positions}
        has_first, has_last = 0 in self._parts, self._last in self._parts
        losses: list[Tensor] = []
        self._schedule.step(
            *([tokens] if has_first else []),
            target=labels if has_last else None,
            losses=losses if has_last else None,
            return_outputs=False,
            **({} if document_ids is None else {"document_ids": document_ids}),
        )
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else self._zero()

    @torch.no_grad()
    def evaluate(
        self,
        tokens: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        *,
        seq_len: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The sum of `loss_fn` over a batch, divided by nothing: an fp32 scalar; 0 on ranks without the last stage.

        Args:
            tokens, labels, document_ids: `[B', S']` of any size, the same on all ranks of the pp axis.
            seq_len, positions: as `Decoder.forward` has them.
        """
        token_parts, label_parts = (each.split(self.plan.microbatch_size) for each in (tokens, labels))
        documents = None if document_ids is None else document_ids.split(self.plan.microbatch_size)
        for_all = {"seq_len": tokens.shape[1] if seq_len is None else seq_len, "positions": positions}
        count, total = len(token_parts), self._zero()
        waiting: dict[int, Tensor] = {}  # stage -> the input of its microbatch in this tick
        for tick in range(count + self._last):
            made: dict[int, Tensor] = {}
            for stage, part in self._parts.items():
                number = tick - stage
                if not 0 <= number < count:
                    continue
                x = token_parts[number] if stage == 0 else waiting.pop(stage)
                made[stage] = part(x, None if documents is None else documents[number], **for_all)
                if stage == self._last:
                    total += self._loss_fn(made.pop(stage), label_parts[number])
            # In the next tick the stage runs the microbatch that its predecessor has run in this one.
            due = {s: tick + 1 - s for s in self._parts if s > 0 and 0 <= tick + 1 - s < count}
            waiting = self._exchange(made, {s: tuple(token_parts[number].shape) for s, number in due.items()})
        self._free_gathered()
        return total

    def _exchange(self, made: dict[int, Tensor], due: dict[int, tuple[int, ...]]) -> dict[int, Tensor]:
        """Hand outputs of stages to the stages after them.

        Args:
            made: stage of this rank -> its output.
            due: stage of this rank -> the shape `[b, S]` of the microbatch that it gets.

        Returns:
            Stage of this rank -> its input.
        """
        placement, inputs = self.plan.placement, {}
        # In one group of operations, each pair of ranks in the order of stages: whoever comes first waits for nobody.
        operations = []
        for stage, output in made.items():
            if placement[stage + 1] == self._rank:
                inputs[stage + 1] = output
            else:
                operations.append(self._operation(dist.isend, output.contiguous(), placement[stage + 1]))
        for stage, (sequences, length) in due.items():
            if placement[stage - 1] != self._rank:
                shape = self._stream_shape(sequences, length)
                inputs[stage] = torch.empty(shape, dtype=self._stream_dtype, device=self._device)
                operations.append(self._operation(dist.irecv, inputs[stage], placement[stage - 1]))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return inputs

    def _operation(self, kind: Callable[..., Any], tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group, group_peer=rank)

    def _free_gathered(self) -> None:
        """Free the weights that FSDP has gathered: what keeps them through a step keeps them after an evaluation."""
        for part in self._parts.values():
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=self._device)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._loss_fn(logits, labels) / self._label_tokens

    def _build_stages(self) -> list["_Stage"]:
        sequences, length = self.plan.microbatch_size, self.shape[1]
        with torch.device("meta"):
            stream = torch.empty(self._stream_shape(sequences, length), dtype=self._stream_dtype, requires_grad=True)
            tokens = torch.empty(sequences, length, dtype=torch.int64)
            logits = torch.empty(self._logits_shape(sequences, length), dtype=self._stream_dtype, requires_grad=True)
        return [
            _Stage(
                part,
                stage,
                len(self.plan.stages),
                self._device,
                input_args=(tokens if stage == 0 else stream,),
                output_args=(logits if stage == self._last else stream,),
                group=self._group,
                dw_builder=self._later(part) if self.plan.splits_backward else None,
            )
            for stage, part in self._parts.items()
        ]

    def _later(self, part: nn.Module) -> Callable[[], Callable[[], None]]:
        """What the engine calls after each backward pass of a part: it returns what is left to do for the gradients of
        weights. With the last microbatch of a step they are complete."""
        queue, done = defer_weight_gradients(part), itertools.count(1)
        microbatches = self.shape[0] // self.plan.microbatch_size

        def take() -> Callable[[], None]:
            compute = queue.take()

            def run() -> None:
                compute()
                if next(done) % microbatches == 0:
                    queue.flush(_to_fsdp(part))

            return run

        return take

    def _build_schedule(self) -> Any:
        """The engine's schedule object."""
        microbatches = self.shape[0] // self.plan.microbatch_size
        options: dict[str, Any] = {"n_microbatches": microbatches, "loss_fn": self._loss, "scale_grads": False}
        if self.plan.csv_path is not None:
            schedule = _PipelineScheduleRuntime(self._stages, **options)
            _load(schedule, self.plan.csv_path)
        else:
            assert self.plan.schedule is not None
            kind = get_schedule_class(self.plan.schedule)
            if issubclass(kind, PipelineScheduleSingle):
                return kind(self._stages[0], **options)
            schedule = kind(self._stages, **options)
        assert schedule.stage_index_to_group_rank == dict(enumerate(self.plan.placement))
        if self.plan.overlaps:
            overlap_exchanges(schedule, list(self._parts.values()), self._device)
        return schedule


class _Stage(PipelineStage):
    """A stage that gives its part, beside what the engine cuts into microbatches, what is the same for all of them."""

    for_all: dict[str, Any]

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward_maybe_with_nosync(*args, **kwargs, **self.for_all)


def _load(schedule: _PipelineScheduleRuntime, path: str) -> None:
    try:
        schedule._load_csv(str(Path(path).expanduser()))
    except (AssertionError, ValueError, RuntimeError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise UserError(
            f'parallelism.pipeline_parallel_schedule_csv = "{path}": the actions cannot be run in this order '
            f"({first_line or type(error).__name__}); every stage's input must come before it"
        ) from error
