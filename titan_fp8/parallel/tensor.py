"""Tensor and sequence parallelism: every block's weights divided over the ranks of the `tp` axis.

    tok_embeddings     rows of the table (tokens of the vocabulary); partial lookups are summed and scattered
    attention_norm     each rank norms its T / t tokens
    wq, wk, wv         by output features, so each rank has some of the heads; their input is gathered once
    wo                 by input features; the ranks' outputs are summed and scattered
    ffn_norm, w1, w3, w2                likewise
    norm, output       each rank has the logits of some of the vocabulary, of all tokens

In other families:

    wq_a, wkv_a        of latent attention: whole, each rank multiplies its T / t tokens. What is gathered is narrow,
                       the normed latent vectors and the one rotated key: in DeepSeek-V3 2112 features a token in place
                       of the stream's 7168, and no token is multiplied twice. The gradient of a weight is summed over
                       the ranks, which it would be after a gather of the stream too, since each rank has its heads'
                       part of the gradient
    wq, wq_b, wkv_b    by output features, that is by heads
    router.gate        whole; of experts see `expert_tensor.py`
    shared_experts     as w1, w3, w2

Between exchanges, every rank holds T / t whole tokens: the residual stream has the shape [1, T / t, dim], T = B x S,
the tokens of all sequences in one row. How a module exchanges follows from what it is, not from what the job converts:
the input of linears that are all float8 of one recipe travels as codes (`quantization/tensor_parallel.py`), and where
one of them stays in high precision the numbers travel.

Parameters become DTensors on the `tp` axis, so FSDP can shard them further, and checkpoints know what they are. What
modules compute with are the plain tensors inside. What has whole weights on every rank and sees some of the tokens is
in `tensor_whole.py`.

T tokens, t ranks of the axis. Source: arXiv 1909.08053, 2205.05198.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titan_fp8.models.decoder import Decoder
from titan_fp8.models.linear import Linear, linear
from titan_fp8.models.loss import IGNORE_INDEX
from titan_fp8.models.mla import LatentAttention
from titan_fp8.models.moe import Experts, Gate
from titan_fp8.models.norm import RMSNorm
from titan_fp8.models.splits import readers_of, way_of
from titan_fp8.parallel.mesh import TP, ParallelMesh
from titan_fp8.parallel.tensor_rules import check_tensor_parallel
from titan_fp8.parallel.tensor_whole import (
    SequenceParallelGate,
    SequenceParallelLinear,
    SequenceParallelRMSNorm,
)
from titan_fp8.quantization.linear import Float8Linear, shared_codes_recipe
from titan_fp8.quantization.mx_linear import MXFP8Linear
from titan_fp8.quantization.tensor_parallel import (
    GatherTokens,
    ScatterSum,
    Split,
    TensorParallel,
    gather_quantized,
    local_weight,
)
from titan_fp8.runtime.collectives import Axis, all_gather, all_reduce


def apply_tensor_parallel(model: Decoder, mesh: ParallelMesh, *, loss_parallel: bool) -> None:
    """Divide `model` over the `tp` axis of `mesh`, in place; nothing happens where its length is 1.

    Args:
        model: converted, not yet compiled or sharded, on any device, the meta device included. Its heads divide
            (`job_rules.py`).
        mesh: from `build_mesh`.
        loss_parallel: leave the logits divided by the vocabulary; otherwise they are gathered.

    Raises:
        UserError: a module that nothing says how to divide (`check_tensor_parallel`); the model is then unchanged.
    """
    if mesh.degrees.tensor == 1:
        return
    check_tensor_parallel(model, mesh.degrees.tensor)
    tp_mesh = mesh.device_mesh[TP]
    axis = Axis.of(tp_mesh.get_group())
    divided: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            split = Split(way_of(name))
            _divide(module, tp_mesh, _PLACEMENTS[split], divided)
            _make_parallel_linear(module, split, axis)
        elif isinstance(module, nn.Embedding):
            _divide(module, tp_mesh, Shard(0), divided)
            _become(module, VocabParallelEmbedding, axis=axis, compute_dtype=model.compute_dtype)
        elif isinstance(module, RMSNorm):
            _divide(module, tp_mesh, Replicate(), divided)
            _become(module, SequenceParallelRMSNorm, axis=axis)
        elif not isinstance(module, Experts):  # `divide_experts` does that
            assert not any(p is not None for p in module._parameters.values()), name
    for block in model.layers.values():
        for name, readers in readers_of(block).items():
            if name == "moe.shared_experts" and mesh.degrees.expert_tensor > 1:
                continue  # it reads what is gathered for the experts
            _gather_input(block.get_submodule(name), readers, axis)
        if isinstance(block.attention, LatentAttention):
            _gather_rotated_keys(block.attention, axis)
    if model.output is not None:
        _gather_input(model.output, (), axis)
        if not loss_parallel:
            _gather_output(model.output, axis)


_PLACEMENTS: dict[Split, Placement] = {Split.COLUMN: Shard(0), Split.ROW: Shard(1), Split.WHOLE: Replicate()}


def _divide(module: nn.Module, mesh: DeviceMesh, placement: Placement, divided: dict[int, nn.Parameter]) -> None:
    """Make DTensors of a module's parameters, of which each rank keeps its part; what is shared stays shared."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        assert name == "weight", name
        if id(parameter) not in divided:
            divided[id(parameter)] = _part_of(parameter, mesh, placement)
        module._parameters[name] = divided[id(parameter)]


def _part_of(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    local = parameter.detach()
    if isinstance(placement, Shard):
        length = local.shape[placement.dim] // mesh.size()
        local = local.narrow(placement.dim, mesh.get_local_rank() * length, length).contiguous()
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    dtensor = DTensor.from_local(local, mesh, [placement], run_check=False, **whole)
    return nn.Parameter(dtensor, requires_grad=parameter.requires_grad)


def _become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Give a module the class of its parallel kind, so that whoever holds it finds it changed."""
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)


def _make_parallel_linear(linear: nn.Linear, split: Split, axis: Axis) -> None:
    if isinstance(linear, Float8Linear):
        linear.config = replace(linear.config, parallel=TensorParallel(split, axis))
        if linear.fsdp_weight_state is not None:
            linear.fsdp_weight_state.axis = linear.config.weight_axis
        return
    assert type(linear) in (Linear, Gate, MXFP8Linear), type(linear)
    if isinstance(linear, MXFP8Linear) and linear.fsdp_weight_state is not None and split is not Split.WHOLE:
        linear.fsdp_weight_state.parts = (axis,)
    kinds = _MX_KINDS if type(linear) is MXFP8Linear else _KINDS
    _become(linear, SequenceParallelGate if type(linear) is Gate else kinds[split], axis=axis)


class ColumnParallelLinear(Linear):
    """Some of the output features: `[..., K]` -> `[..., N / t]`."""

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, local_weight(self), None, self.weight_sink)


class RowParallelLinear(Linear):
    """From some of the input features `[..., T, K / t]` to this rank's tokens of the sum, `[1, T / t, N]`."""

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        return ScatterSum.apply(linear(input, local_weight(self), None, self.weight_sink), self.axis)


class ColumnParallelMXFP8Linear(MXFP8Linear):
    """`ColumnParallelLinear` in MXFP8. A rank's part has the codes that it has of the whole: blocks lie along K, or
    along its own rows, of which there are whole blocks."""

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, local_weight(self), self.weight_sink)


class RowParallelMXFP8Linear(MXFP8Linear):
    """`RowParallelLinear` in MXFP8."""

    axis: Axis

    def forward(self, input: Tensor) -> Tensor:
        return ScatterSum.apply(self.multiply(input, local_weight(self), self.weight_sink), self.axis)


class SequenceParallelMXFP8Linear(MXFP8Linear):
    """`SequenceParallelLinear` in MXFP8."""

    axis: Axis
    # Its weight's gradient is a sum over ranks, which nobody rounds before FSDP adds it up.
    reads_master_weights = True  # pyright: ignore[reportAssignmentType]

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, local_weight(self), None, self.axis)


_MX_KINDS: dict[Split, type[nn.Module]] = {
    Split.COLUMN: ColumnParallelMXFP8Linear,
    Split.ROW: RowParallelMXFP8Linear,
    Split.WHOLE: SequenceParallelMXFP8Linear,
}
_KINDS: dict[Split, type[nn.Module]] = {
    Split.COLUMN: ColumnParallelLinear,
    Split.ROW: RowParallelLinear,
    Split.WHOLE: SequenceParallelLinear,
}


class VocabParallelEmbedding(nn.Embedding):
    """Rows of the table: token codes `[B, S]` of all tokens -> this rank's tokens `[1, T / t, dim]`."""

    axis: Axis
    compute_dtype: torch.dtype | None

    def forward(self, input: Tensor) -> Tensor:
        table = local_weight(self)
        rows = table.shape[0]
        index = input - self.axis.rank * rows
        elsewhere = (index < 0) | (index >= rows)
        nowhere = (input < 0) | (input >= rows * self.axis.size)
        # Any row will do for those; not one for all, whose gradient would be added up one by one.
        found = F.embedding(index.remainder(rows), table)
        missing = torch.where(nowhere, torch.nan, 0.0).to(found.dtype)
        found = torch.where(elsewhere.unsqueeze(-1), missing.unsqueeze(-1), found)
        # All but one of the summands are zero, so nothing is rounded twice.
        return ScatterSum.apply(found if self.compute_dtype is None else found.to(self.compute_dtype), self.axis)


def _gather_input(module: nn.Module, readers: tuple[str, ...], axis: Axis) -> None:
    """Let `module` see all tokens, of which its caller has some. readers: the names of its linears that read them;
    none: it is the linear itself."""
    inner = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        linears = [getattr(module, name) for name in readers] or [module]
        recipe = shared_codes_recipe(linears)
        if recipe is None:
            return inner(GatherTokens.apply(x, axis), *args, **kwargs)
        columns = torch.is_grad_enabled() and any(linear.weight.requires_grad for linear in linears)
        return inner(gather_quantized(x, recipe, axis, columns=columns), *args, **kwargs)

    module.forward = forward


def _gather_rotated_keys(attention: LatentAttention, axis: Axis) -> None:
    """Let the heads of `attention` have the rotated keys of all tokens, of which `project` gives this rank's."""
    inner = attention.project

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, latent, rotated = inner(x)
        return q, latent, GatherTokens.apply(rotated, axis)

    attention.project = project


def _gather_output(module: nn.Module, axis: Axis) -> None:
    inner = module.forward
    module.forward = lambda x: _GatherFeatures.apply(inner(x), axis)


class _GatherFeatures(torch.autograd.Function):
    """All features `[..., N]` of all ranks, each of which then computes the same with them; N / t of them come in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        parts = all_gather(x.unsqueeze(0), axis)  # [t, ..., N / t]
        return parts.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.axis.size, dim=-1)[ctx.axis.rank], None


def vocab_parallel_loss(mesh: ParallelMesh) -> Callable[[Tensor, Tensor], Tensor]:
    """`models.loss.cross_entropy_sum` of logits that are divided by the vocabulary over the `tp` axis."""
    axis = Axis.of(mesh.device_mesh.get_group(TP))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return VocabParallelCrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), axis)

    return loss


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of all tokens, each rank having some of the vocabulary's logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
        """logits `[T, V / t]`, any floating dtype; labels `[T]`, -100 where a token does not count: fp32 `[]`, NaN for
        a label that is none."""
        values = logits.float()
        largest = all_reduce(values.amax(-1), axis, "max").unsqueeze(-1)
        exponentials = (values - largest).exp()
        normalizer = all_reduce(exponentials.sum(-1), axis)
        index = labels - axis.rank * values.shape[-1]
        mine = (index >= 0) & (index < values.shape[-1])
        index = index.masked_fill(~mine, 0).unsqueeze(-1)
        chosen = (values - largest).gather(-1, index).squeeze(-1).masked_fill(~mine, 0.0)
        chosen = all_reduce(chosen, axis)
        counts = labels != IGNORE_INDEX
        nowhere = counts & ((labels < 0) | (labels >= values.shape[-1] * axis.size))
        chosen = chosen.masked_fill(nowhere, torch.nan)
        ctx.save_for_backward(logits, largest, normalizer.unsqueeze(-1), index, mine, counts)
        return (normalizer.log() - chosen).masked_fill(~counts, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, largest, normalizer, index, mine, counts = ctx.saved_tensors
        probabilities = (logits.float() - largest).exp_().div_(normalizer)
        result = probabilities.scatter_add_(-1, index, -mine.unsqueeze(-1).float())
        return result.mul_((grad * counts).unsqueeze(-1)).to(logits.dtype), None, None
