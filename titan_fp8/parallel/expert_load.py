"""How evenly the experts of a model are used: counted in each step, balanced after it, told to the metrics.

Each layer counts the tokens of its experts as its backward passes go on (`titan_fp8.models.moe`). After the optimizer's
step the counts of all ranks that have different tokens are summed, once for all layers, and the experts' biases move:

    bias += rate * (sign(mean count - count) - mean of that over the experts)        arXiv 2408.15664

so that the biases of a layer keep their mean. A step that is skipped moves none.

L layers with experts on this rank, E experts.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_fp8.models.dims import ModelDims
from titan_fp8.models.moe import MoE
from titan_fp8.parallel.mesh import TP, ParallelMesh


class ExpertLoad:
    """The loads of a model's experts. Build it when the model's tensors are where they stay.

    Args:
        parts: the model, or the stages of it that this rank has.
        dims: the whole model's dimensions; some layer has experts.
        mesh: from `build_mesh`.
    """

    def __init__(self, parts: Sequence[nn.Module], dims: ModelDims, mesh: ParallelMesh):
        assert dims.n_experts is not None
        self._layers = [module for part in parts for module in part.modules() if isinstance(module, MoE)]
        self._mesh = mesh
        self._rate = dims.balance_rate
        n_layers = sum(dims.has_experts(layer) for layer in range(dims.n_layers))
        self._aux_weight = dims.aux_loss_weight / n_layers
        self._n_layers, self._top_k = n_layers, dims.top_k
        device = torch.device(mesh.device_mesh.device_type)
        # The layers count in parts of these, so that what is done for all of them is done once.
        self._counts = torch.zeros(len(self._layers), dims.n_experts, device=device)
        self._aux_sums = torch.zeros(len(self._layers), device=device)
        self._aux_scale = torch.zeros(1, device=device)
        for number, layer in enumerate(self._layers):
            layer.tokens_per_expert = self._counts[number]
            layer.aux_loss_sum = self._aux_sums[number : number + 1]
            layer.aux_loss_scale = self._aux_scale
        self._last_counts, self._last_aux = self._counts.clone(), self._aux_sums.clone()
        self._tokens = self._last_tokens = 0

    def begin_step(self, tokens: int) -> None:
        """Call before a step's first microbatch.

        Args:
            tokens: of all microbatches and ranks, padding included: each layer chooses experts for every one, and the
                auxiliary loss is a mean over them, whether or not they have labels.
        """
        self._tokens = tokens
        self._aux_scale.fill_(self._aux_weight / tokens)

    @torch.no_grad()
    def end_step(self, skip: Tensor | None = None) -> None:
        """Sum up the step and move the biases. Every rank calls it.

        Args:
            skip: bool `[]`; where it is true, the step counts for nothing.
        """
        sums = torch.cat([self._counts, self._aux_sums.unsqueeze(1)], dim=1)
        dist.all_reduce(sums, dist.ReduceOp.SUM, self._mesh.tokens.get_group())
        if self._mesh.degrees.tensor > 1:  # the same sequences, but each has routed some of the tokens
            dist.all_reduce(sums, dist.ReduceOp.SUM, self._mesh.device_mesh.get_group(TP))
        self._last_counts, self._last_aux, self._last_tokens = sums[:, :-1], sums[:, -1], self._tokens
        self._counts.zero_()
        self._aux_sums.zero_()
        if not self._rate:
            return
        moves = torch.sign(self._last_counts.mean(1, keepdim=True) - self._last_counts)
        moves = self._rate * (moves - moves.mean(1, keepdim=True))
        if skip is not None:
            moves = moves * ~skip
        for layer, move in zip(self._layers, moves, strict=True):
            assert layer.expert_bias is not None
            layer.expert_bias += move

    def metrics(self) -> dict[str, float]:
        """Of the last step, over all layers with experts, those of other pipeline stages included. Every rank calls it.

        - `moe/max_load`: tokens of the fullest expert over the mean, in the worst layer; 1 is balanced.
        - `moe/mean_max_load`: the same, as the mean of the layers.
        - `moe/entropy`: of the distribution of tokens, over its largest value, log E; the mean of the layers.
        - `moe/dropped_tokens`: choices of experts that the step's tokens made, less those that were counted, over all
          layers: 0 unless something is wrong, since experts have room for all.
        - `moe/aux_loss`: the auxiliary loss before its weight; the mean of the layers; 1 is balanced.
        """
        totals = self._last_counts.sum(1, keepdim=True).clamp(min=1)
        shares = self._last_counts / totals
        max_loads = shares.amax(1) * shares.shape[1]
        n_experts = shares.shape[1]
        entropy = -torch.xlogy(shares, shares).sum(1) / math.log(n_experts) if n_experts > 1 else shares.sum(1)
        aux = self._last_aux * self._top_k / totals.squeeze(1)
        # In fp64: each count is exact in fp32, their sum may not be.
        dropped = self._last_tokens * self._top_k - self._last_counts.double().sum(1)
        sums = torch.stack([each.double().sum() for each in (max_loads, entropy, aux, dropped)])
        worst = max_loads.amax().double() if len(self._layers) else sums.new_zeros(())
        if self._mesh.stages is not None:
            dist.all_reduce(sums, dist.ReduceOp.SUM, self._mesh.stages)
            dist.all_reduce(worst, dist.ReduceOp.MAX, self._mesh.stages)
        *of_layers, dropped_tokens = sums.tolist()
        mean_max, mean_entropy, mean_aux = (each / self._n_layers for each in of_layers)
        return {
            "moe/max_load": worst.item(),
            "moe/mean_max_load": mean_max,
            "moe/entropy": mean_entropy,
            "moe/dropped_tokens": int(dropped_tokens),
            "moe/aux_loss": mean_aux,
        }


def expert_load(parts: Sequence[nn.Module], dims: ModelDims, mesh: ParallelMesh) -> ExpertLoad | None:
    """The loads of the experts of a model, or None where it has none."""
    return None if dims.n_experts is None else ExpertLoad(parts, dims, mesh)


def force_balance(model: nn.Module) -> None:
    """Let all routers of `model` choose experts in turns (debug.moe_force_load_balance)."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.router.force_balance = True
