"""Experts under tensor parallelism: whole ones, or each divided over the ranks of the `tp` axis.

Between exchanges every rank of `tp` holds T / t whole tokens. What experts make of that is
`parallelism.expert_tensor_parallel_degree`:

    1    Experts are whole. For them the ranks of `tp` are further ranks with tokens of their own: `ep` and
         `expert_shards` take them as they take those of `dp_shard` and `cp`.
    t    Each expert's hidden features are divided: w1 and w3 by rows, w2 by columns. The tokens of all ranks are
         gathered, with their scores and choices, and what experts give are parts of a sum, which is scattered to T / t
         tokens a rank. In backward the gradients of scores are parts of a sum too, and scattered.

In both, each rank routes its own T / t tokens: no token is scored twice, and all ranks have one choice for it, whatever
the last bits of a product are. The gate's gradient is a sum over the axis. What the auxiliary loss counts is summed
over it in each layer, so that it is that of all T tokens.

Whole experts move a token once for each choice that is on another rank of `ep`; divided ones move all tokens to all
ranks of `tp`, and what a rank multiplies is 1 / t as wide. Source: arXiv 1909.08053.

T tokens of a microbatch, k choices of each, t ranks of `tp`, E experts, D features of the stream.
"""

from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from titan_fp8.models.decoder import Decoder
from titan_fp8.models.moe import Experts, MoE
from titan_fp8.parallel.mesh import EP, EXPERT_TP, TP, ParallelMesh
from titan_fp8.quantization.tensor_parallel import GatherTokens, ScatterSum
from titan_fp8.runtime.collectives import Axis, all_gather

_HIDDEN_DIM = {"w1": 1, "w3": 1, "w2": 2}


def apply_expert_tensor_parallel(model: Decoder, mesh: ParallelMesh) -> None:
    """Have the layers with experts of `model` route over the `tp` axis of `mesh`, in place; nothing happens where its
    length is 1. What each rank has of the experts is `divide_experts`' doing.

    Args:
        model: converted, not yet compiled or sharded.
        mesh: from `build_mesh`.
    """
    if mesh.degrees.tensor == 1:
        return
    axis = Axis.of(mesh.device_mesh[TP].get_group())
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        module.token_axis = axis
        if mesh.degrees.expert_tensor > 1:
            module.gather, module.scatter = partial(_gather, axis=axis), partial(_scatter, axis=axis)


def _gather(tokens: Tensor, scores: Tensor, experts: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[T / t, D]`, fp32 scores and choices `[T / t, k]` -> those of all T; the gradients of each rank's are
    summed and scattered."""
    tokens, scores = (GatherTokens.apply(each, axis).flatten(0, 1) for each in (tokens, scores))
    return tokens, scores, all_gather(experts, axis)


def _scatter(routed: Tensor, axis: Axis) -> Tensor:
    """Parts of a sum `[T, D]` -> this rank's tokens of it, `[T / t, D]`."""
    return ScatterSum.apply(routed, axis).flatten(0, 1)


def divide_experts(experts: Experts, mesh: ParallelMesh) -> None:
    """Make DTensors of the weights of `experts`, in place, of which each rank keeps its part: of all E those that the
    `ep` axis gives it, and of these the hidden features that `tp` does. Both divide."""
    degrees = mesh.degrees
    for name, parameter in list(experts.named_parameters()):
        of_experts, of_hidden = Shard(0), Shard(_HIDDEN_DIM[name])
        if degrees.expert_tensor == 1:
            divided = _part_of(parameter, mesh.expert_mesh[EP], [of_experts])
        elif degrees.expert == 1:
            divided = _part_of(parameter, mesh.device_mesh[TP], [of_hidden])
        else:
            divided = _part_of(parameter, mesh.expert_mesh[EP, EXPERT_TP], [of_experts, of_hidden])
        setattr(experts, name, divided)


def _part_of(parameter: nn.Parameter, mesh: DeviceMesh, placements: list[Shard]) -> nn.Parameter:
    """This rank's part of a weight, as a DTensor that knows of all."""
    part = parameter.detach()
    for number, placement in enumerate(placements):
        part = part.chunk(mesh.size(number), placement.dim)[mesh.get_local_rank(number)]
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    as_placements: list[Placement] = [*placements]
    dtensor = DTensor.from_local(part.contiguous(), mesh, as_placements, run_check=False, **whole)
    return nn.Parameter(dtensor, requires_grad=parameter.requires_grad)
