"""A mixture of experts in place of a feed-forward (arXiv 1701.06538): each token goes to k of E small feed-forwards.

    router           scores of all experts for each token, and the choice of k
    dispatcher       brings tokens to their experts, sorted by expert, and sums what comes back
    experts          SwiGLU feed-forwards, their weights stacked: w1, w3 [E, hidden, dim], w2 [E, dim, hidden]
    shared_experts   a feed-forward that every token goes through, in some families

Loads are kept balanced in two ways, which families choose from. Without a loss of its own (arXiv 2408.15664): each
expert has a bias that takes part in the choice but not in the scores, and after each step experts with too few tokens
gain `balance_rate`, and the others lose it. By the auxiliary loss (arXiv 2101.03961, as in 2405.04434):

    loss = sum over e of f_e P_e,   f_e = E / (k T) * tokens of e,   P_e = mean over tokens of e's part of all scores

which is 1 at balanced loads. It is the mean over the layers and over the tokens of the global batch.

Legend: T tokens, k choices of each, E experts.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titan_fp8.kernels.moe.functions import Rows
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.dispatch import Dispatcher, Groups, LocalDispatcher, UnderWay
from titan_fp8.models.feed_forward import FeedForward
from titan_fp8.models.grouped import grouped_linear
from titan_fp8.models.initialization import Constant, Distribution, TruncatedNormal
from titan_fp8.models.linear import Linear
from titan_fp8.runtime.collectives import Axis, all_reduce
from titan_fp8.runtime.operators import register_operator
from titan_fp8.runtime.recomputation import recalled, recalled_or


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        scores: fp32 `[T, k]`, the factors of the chosen experts.
        experts: int64 `[T, k]`, which they are.
        probabilities: fp32 `[T, E]`, the scores of all experts, summing to 1 for each token.
    """

    scores: Tensor
    experts: Tensor
    probabilities: Tensor


class Gate(Linear):
    """The linear that makes a router's logits: from inputs and weights in the compute dtype, in float32."""

    casts_weight_to_input_dtype: ClassVar[bool] = True

    def forward(self, input: Tensor) -> Tensor:
        """`[T, dim]` of any floating dtype to fp32 `[T, E]`."""
        return Logits.apply(input, self.weight.to(input.dtype))


class Logits(torch.autograd.Function):
    """`x @ w.T` of x `[T, dim]` and w `[E, dim]`, of one dtype, in fp32: the choice of experts depends on small
    differences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x, w.t(), out_dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ w.t().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        grad = grad.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad @ w if ctx.needs_input_grad[0] else None
            return grad_x, grad.t() @ x if ctx.needs_input_grad[1] else None


class Router(nn.Module):
    """Scores all experts for each token, in float32, and chooses.

    Attributes:
        gate: makes the logits, `[E, dim]`.
        force_balance: choose experts in turns, whatever the scores; for measurements of speed.
    """

    def __init__(self, dims: ModelDims):
        super().__init__()
        assert dims.n_experts is not None
        self.dims = dims
        self.gate = Gate(dims.dim, dims.n_experts, bias=False)
        self.force_balance = False

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        return {"gate.weight": TruncatedNormal(0.02)}

    def forward(self, x: Tensor, bias: Tensor | None = None, chosen: Tensor | None = None) -> Routing:
        """Tokens `[T, dim]`; bias fp32 `[E]`, added to the scores for the choice alone; chosen int64 `[T, k]`, the
        choice where it is made already, and -1 elsewhere."""
        dims = self.dims
        logits = self.gate(x).float()
        if dims.router_score == "softmax":
            every = probabilities = logits.softmax(-1)
        else:
            every = logits.sigmoid()
            probabilities = every / (every.sum(-1, keepdim=True) + 1e-20)
        experts = self._choose(every.detach(), bias)
        if chosen is not None:
            experts = torch.where(chosen < 0, experts, chosen)
        scores = every.gather(1, experts)
        if dims.router_norm:
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores * dims.router_scale, experts, probabilities)

    def _choose(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """The chosen experts, int64 `[T, k]`."""
        dims = self.dims
        if self.force_balance:
            turns = torch.arange(scores.shape[0] * dims.top_k, device=scores.device)
            return (turns % scores.shape[1]).view(-1, dims.top_k)
        if bias is not None:
            scores = scores + bias
        if dims.expert_groups > 1:
            scores = scores.masked_fill(~self._in_chosen_groups(scores), -torch.inf)
        return scores.topk(dims.top_k, dim=-1, sorted=False).indices

    def _in_chosen_groups(self, scores: Tensor) -> Tensor:
        """Whether an expert's group is one that the token may use, bool `[T, E]`."""
        dims = self.dims
        in_groups = scores.unflatten(-1, (dims.expert_groups, -1))
        best = in_groups.topk(1 if dims.expert_group_score == "max" else 2, dim=-1).values.sum(-1)
        chosen = best.topk(dims.expert_groups_per_token, dim=-1, sorted=False).indices
        is_chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
        return is_chosen.unsqueeze(-1).expand_as(in_groups).flatten(1)


class Experts(nn.Module):
    """E gated feed-forwards `dim -> hidden_dim -> dim`.

    Attributes:
        w1, w3: `[E, hidden_dim, dim]`.
        w2: `[E, dim, hidden_dim]`.
    """

    def __init__(self, n_experts: int, dim: int, hidden_dim: int, residual_std: float):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(n_experts, hidden_dim, dim))
        self.residual_std = residual_std

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        return {
            "w1": TruncatedNormal(0.02),
            "w2": TruncatedNormal(self.residual_std),
            "w3": TruncatedNormal(self.residual_std),
        }

    def forward(self, x: Tensor | Rows, ends: Tensor) -> Tensor:
        """Rows `[M, dim]` sorted by expert and ends int32 `[E]`: `[M, dim]`, same dtype. Of what makes rows of tokens:
        tokens again, `[T, dim]`."""
        w1, w3, w2 = self.weights()
        rows = x if isinstance(x, Tensor) else x.make()
        hidden = F.silu(grouped_linear(rows, w1, ends)) * grouped_linear(rows, w3, ends)
        y = grouped_linear(hidden, w2, ends)
        return y if isinstance(x, Tensor) else x.bring_back(y)

    def in_turn(self, under_way: Sequence[Tensor], then: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """Several batches in one use of the weights, which FSDP gathers once for it.

        Args:
            under_way: rows that travel to the experts.
            then: for each, what waits for them, calls `forward`, and sends the results back: tensors that travel.
        """
        return [each(rows) for rows, each in zip(under_way, then, strict=True)]

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w3 and w2 of the experts that are here. Where they are spread over ranks there is another function."""
        return self.w1, self.w3, self.w2


@dataclass(frozen=True)
class Sent:
    """Tokens on their way to their experts.

    Attributes:
        rows: what travels.
        tokens: what the experts here work on, `[T, dim]`.
        shape: of what the layer was given.
    """

    rows: UnderWay[Groups]
    tokens: Tensor
    shape: torch.Size


class MoE(nn.Module):
    """Router, experts and what every token goes through.

    Attributes:
        dispatcher: brings tokens to experts.
        token_axis: ranks that route other tokens of the same microbatch; None: this one routes all.
        expert_bias: fp32 `[E]`, part of the state dict; None where the choice knows no biases.
        tokens_per_expert: fp32 `[E]`, choices since it was last set to zero, of microbatches whose backward is done.
        aux_loss_sum: fp32 `[1]`, the auxiliary loss times tokens since it was last set to zero.
        aux_loss_scale: fp32 `[1]`, by what the auxiliary loss of a microbatch counts for each token.
    """

    expert_bias: Tensor | None
    tokens_per_expert: Tensor
    aux_loss_sum: Tensor
    aux_loss_scale: Tensor

    def __init__(self, dims: ModelDims, residual_std: float):
        super().__init__()
        assert dims.n_experts is not None
        hidden = dims.expert_hidden_dim
        self.dims = dims
        self.router = Router(dims)
        self.experts = Experts(dims.n_experts, dims.dim, hidden, residual_std)
        self.shared_experts = (
            FeedForward(dims.dim, dims.n_shared_experts * hidden, residual_std) if dims.n_shared_experts else None
        )
        self.dispatcher: Dispatcher = LocalDispatcher(dims.n_experts)
        self.token_axis: Axis | None = None
        # In fp32 whatever dtype parameters are trained in (`_apply`).
        per_expert, number = torch.zeros(dims.n_experts, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
        self.register_buffer("expert_bias", per_expert.clone() if dims.has_router_bias else None)
        self.register_buffer("tokens_per_expert", per_expert, persistent=False)
        self.register_buffer("aux_loss_sum", number, persistent=False)
        self.register_buffer("aux_loss_scale", number.clone(), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # the hook behind to(), to_empty(), cuda(), half()...
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = new.to(old.dtype) if old.is_meta or new.is_meta else old.to(new.device)
        return self

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        names = ["tokens_per_expert", "aux_loss_sum", "aux_loss_scale"]
        return dict.fromkeys(names if self.expert_bias is None else [*names, "expert_bias"], Constant(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`, same dtype."""
        sent = self.send(x)
        shared = self.share(sent)
        groups = sent.rows.wait()
        returned = self.dispatcher.combine(self.experts(groups.rows, groups.ends), groups)
        return self.join(sent, returned.wait(), shared)

    def send(self, x: Tensor) -> "Sent":
        """Route tokens `[..., dim]` and send them to their experts."""
        tokens = x.flatten(0, -2)
        # Recomputation sends tokens where they were sent at first: scores that differ in their last bits would choose
        # other experts. It is the same program in both passes, since what it keeps for backward must be the same.
        undecided = functools.partial(tokens.new_full, (len(tokens), self.dims.top_k), -1, dtype=torch.int64)
        scores, experts = self.route(tokens, recalled_or(undecided))
        tokens, scores, experts = self.gather(tokens, scores, recalled(lambda: experts))
        before, after = (scores, None) if self.dims.score_before_experts else (None, scores)
        return Sent(self.dispatcher.dispatch(tokens, experts, before, after), tokens, x.shape)

    def route(self, tokens: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores fp32 and experts int64 of tokens `[T, dim]`, `[T, k]` each; where a backward pass will follow, it
        counts them. chosen: see `Router`. Of what runs before tokens travel, this is all that the compiler can have in
        one piece."""
        routing = self.router(tokens, self.expert_bias, chosen)
        return self._watched(routing), routing.experts

    def share(self, sent: "Sent") -> Tensor | None:
        """What the shared experts make of the same tokens, `[..., dim]`, if there are any."""
        if self.shared_experts is None:
            return None
        # A tensor of their own: what their linears add to its gradient is one summand of the tokens' gradient.
        return self.shared_experts(sent.tokens.view_as(sent.tokens)).view(sent.shape)

    def join(self, sent: "Sent", routed: Tensor, shared: Tensor | None) -> Tensor:
        """The layer's result `[..., dim]`, of what came back `[T, dim]` and what the shared experts made."""
        routed = self.scatter(routed).view(sent.shape)
        return routed if shared is None else shared + routed

    def gather(self, tokens: Tensor, scores: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[T, dim]`, scores and choices `[T, k]` of all that experts here work on: those of this rank. Where
        experts are divided over ranks there is another function, and another `scatter`."""
        return tokens, scores, experts

    def scatter(self, routed: Tensor) -> Tensor:
        """What experts made of the tokens of this rank, `[T, dim]`, of all that were gathered."""
        return routed

    def _watched(self, routing: Routing) -> Tensor:
        """The scores, whose backward counts tokens and adds the auxiliary loss's gradient."""
        if not torch.is_grad_enabled() or not routing.scores.requires_grad:
            return routing.scores
        counts = torch.zeros_like(self.tokens_per_expert)
        counts.scatter_add_(0, routing.experts.flatten(), torch.ones_like(routing.scores).flatten())
        in_all, choices = counts, routing.experts.numel()
        if self.token_axis is not None:
            in_all, choices = all_reduce(counts, self.token_axis), choices * self.token_axis.size
        aux = routing.probabilities.sum(0) @ in_all * (counts.numel() / max(choices, 1))  # times T
        totals = (self.tokens_per_expert, self.aux_loss_sum, self.aux_loss_scale)
        return _Watch.apply(routing.scores, aux, counts, *totals)


class _Watch(torch.autograd.Function):
    """Scores as they are. Their backward happens once a microbatch, also where a layer is computed twice, so it is
    there that tokens are counted; and it gives the auxiliary loss its gradient, whichever part of a model has the
    layer."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, aux: Tensor, counts: Tensor, *totals: Tensor) -> Tensor:
        """scores `[T, k]`; aux `[]`: the layer's auxiliary loss times T; counts `[E]`; what `MoE` has of totals."""
        ctx.save_for_backward(aux, counts, *totals)
        return scores.view_as(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, of_aux = watch(grad, *ctx.saved_tensors)
        return grad, of_aux, None, None, None, None


def _count(
    grad: Tensor, aux: Tensor, counts: Tensor, tokens_per_expert: Tensor, aux_loss_sum: Tensor, aux_loss_scale: Tensor
) -> tuple[Tensor, Tensor]:
    # Autograd keeps the totals of one microbatch while another one's are added: through `data` it does not see that.
    tokens_per_expert.data.add_(counts)
    aux_loss_sum.data.add_(aux)
    return grad.clone(), aux_loss_scale.clone().view(())


watch = register_operator(
    "moe_watch(Tensor grad, Tensor aux, Tensor counts, Tensor tokens_per_expert, Tensor aux_loss_sum, "
    "Tensor aux_loss_scale) -> (Tensor, Tensor)",
    _count,
    lambda grad, aux, counts, tokens_per_expert, aux_loss_sum, aux_loss_scale: (
        torch.empty_like(grad),
        aux.new_empty(()),
    ),
)
"""`moe_watch(grad [T, k], aux [], counts [E], totals...)` -> grad, gradient of aux. Besides, it adds counts and aux to
the totals. Its schema does not say so: the compiler would take the totals apart from the tensors that a layer has."""
