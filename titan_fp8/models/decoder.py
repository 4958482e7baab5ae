"""The decoder: a Llama-style language model (arXiv 2302.13971, 2407.21783), the one model of this project.

    tokens -> tok_embeddings -> layers.0 ... layers.N-1 -> norm -> output -> logits

Each layer adds twice to the residual stream: attention of the normed stream, then the feed-forward of the normed
stream. Everything is a plain single-device module that knows neither quantization nor parallelism; both are applied
from outside, and the module names are the field's (`layers.0.attention.wq`, `layers.0.feed_forward.w1`), so that
filters written for other stacks mean the same here.

Building order of a job: build on the meta device (`with torch.device("meta")`), convert, shard, `to_empty`, then
`titan_fp8.models.initialize(model, seed)` or load a checkpoint.

Legend: B sequences, S tokens, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from titan_fp8.models.attention import Attention
from titan_fp8.models.attention_backends import AttentionTask, Backend, Mask, attention_mask, resolve_backend
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.feed_forward import FeedForward
from titan_fp8.models.initialization import Distribution, Normal, TruncatedNormal
from titan_fp8.models.linear import Linear
from titan_fp8.models.mla import LatentAttention
from titan_fp8.models.moe import MoE
from titan_fp8.models.norm import RMSNorm
from titan_fp8.models.rope import RopeTables, RotaryEmbedding
from titan_fp8.runtime.device import DeviceCapabilities, detect_device
from titan_fp8.runtime.errors import UserError


class TransformerBlock(nn.Module):
    """One layer: `x + attention(attention_norm(x))`, then `x + feed_forward(ffn_norm(x))`, where `moe` may stand in
    the place of `feed_forward`.

    Args:
        dims: the model's dimensions.
        layer: the layer's number from 0; deeper layers start with smaller writes into the residual stream.
        backend: a resolved attention backend.
    """

    def __init__(self, dims: ModelDims, layer: int, backend: Backend):
        super().__init__()
        residual_std = 0.02 / math.sqrt(2 * (layer + 1))
        self.attention: Attention | LatentAttention = (
            LatentAttention(dims, backend, residual_std)
            if dims.is_latent
            else Attention(dims, layer, backend, residual_std)
        )
        has_experts = dims.has_experts(layer)
        self.feed_forward = None if has_experts else FeedForward(dims.dim, dims.ffn_hidden_dim, residual_std)
        self.moe = MoE(dims, residual_std) if has_experts else None
        self.attention_norm = RMSNorm(dims.dim, dims.norm_eps)
        self.ffn_norm = RMSNorm(dims.dim, dims.norm_eps)

    def forward(self, x: Tensor, rope: RopeTables, mask: Mask = None) -> Tensor:
        """`[B, S, dim]` to `[B, S, dim]`, same dtype."""
        x, normed = self.attend_and_norm(x, rope, mask)
        if self.moe is not None:
            return x + self.moe(normed)
        assert self.feed_forward is not None
        return x + self.feed_forward(normed)

    def attend_and_norm(self, x: Tensor, rope: RopeTables, mask: Mask) -> tuple[Tensor, Any]:
        """`x + attention(attention_norm(x))` and the `ffn_norm` of it, `[B, S, dim]` each."""
        x, normed = self.attention_norm.keep_and_norm(x)
        return self.ffn_norm.add_and_norm(x, self.attention(normed, rope, mask))


class Decoder(nn.Module):
    """Decoder-only transformer.

    Args:
        dims: dimensions, from `titan_fp8.models.resolve_dims`.
        attention_backend: `"auto"` or a backend of `titan_fp8.models.attention_backends`.
        document_masking: whether `forward` will be given `document_ids`.
        seq_len: longest sequence to prepare for, at most (and by default) `dims.max_seq_len`.
        compute_dtype: dtype of the activations; None: the embedding's dtype.
        device: the device that the model will run on, which decides the attention backend; None: the device found.

    Raises:
        UserError: the attention backend cannot run on the device, or `seq_len` is longer than the model allows.

    Attributes:
        dims: as given.
        compute_dtype: as given. The embedding's output is cast to it and everything after follows.
        attention_backend: the resolved backend.
    """

    def __init__(
        self,
        dims: ModelDims,
        *,
        attention_backend: str = "auto",
        document_masking: bool = False,
        seq_len: int | None = None,
        compute_dtype: torch.dtype | None = None,
        device: DeviceCapabilities | None = None,
    ):
        super().__init__()
        seq_len = dims.max_seq_len if seq_len is None else seq_len
        if seq_len > dims.max_seq_len:
            raise UserError(
                f"training.seq_len = {seq_len} is longer than the model's {dims.max_seq_len} positions; "
                "shorten it or raise model.overrides.max_seq_len"
            )
        self.dims = dims
        self.document_masking = document_masking
        self.compute_dtype = compute_dtype
        task = AttentionTask(
            device=detect_device() if device is None else device,
            dtype=compute_dtype or torch.get_default_dtype(),
            head_dim=max(dims.head_width, dims.value_width),
            scaled=dims.is_latent,
            document_masking=document_masking,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        self.attention_backend: Backend = resolve_backend(attention_backend, task)

        self.tok_embeddings: nn.Embedding | None = nn.Embedding(dims.vocab_size, dims.dim)
        self.rope = RotaryEmbedding(dims.rope_width, seq_len, dims.rope_theta, dims.rope_scaling)
        self.layers = nn.ModuleDict(
            {str(layer): TransformerBlock(dims, layer, self.attention_backend) for layer in range(dims.n_layers)}
        )
        self.norm: nn.Module = RMSNorm(dims.dim, dims.norm_eps)
        self.output: nn.Module | None = Linear(dims.dim, dims.vocab_size, bias=False)
        self._tie()

    def _tie(self) -> None:
        if self.dims.tied_embeddings:
            assert self.output is not None
            assert self.tok_embeddings is not None
            self.output.weight = self.tok_embeddings.weight

    def _apply(self, fn, recurse: bool = True):
        # to_empty() and moves between devices give each module a parameter of its own.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def init_rules(self) -> dict[str, Distribution]:
        """See `titan_fp8.models.initialization`."""
        head = TruncatedNormal(self.dims.dim**-0.5)
        if self.dims.tied_embeddings:
            return {"tok_embeddings.weight": head}
        return {"tok_embeddings.weight": Normal(1.0), "output.weight": head}

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor | None = None,
        *,
        seq_len: int | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position, or the loss.

        A part of a model, whose embedding or head is None, takes or gives the residual stream `[B, S, dim]` there.

        Args:
            x: tokens `[B, S]`, int64 in `0 .. V-1`.
            document_ids: `[B, S]` integers; a token sees only tokens with its own number, before it or itself. Only
                for a model built with `document_masking=True`. None: every row is one document.
            seq_len: the longest position + 1; None: S.
            positions: `[S]`, the positions of the tokens in their sequence; None: 0 to S - 1.
            labels: `[B, S]`, for a head that computes the loss itself (`models/chunked_loss.py`).

        Returns:
            `[B, S, V]` in the compute dtype; with labels, the fp32 sum of the cross-entropy.
        """
        if document_ids is not None and not self.document_masking:
            raise ValueError("document_ids given to a model that was built with document_masking=False")
        seq_len = x.shape[1] if seq_len is None else seq_len
        rope = self.rope(seq_len, x.device, positions)
        mask = self.mask(rope.seq_len, x.device, document_ids)
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
            if self.compute_dtype is not None:
                x = x.to(self.compute_dtype)
        in_chunks = self._mask_in_chunks(rope, mask, x.device, document_ids)
        for layer in self.layers.values():
            x = layer(x, rope, mask if layer.attention.chunk is None else in_chunks)
        if self.output is None:
            return x
        return self.output(self.norm(x)) if labels is None else self.output(self.norm(x), labels)

    def _mask_in_chunks(self, rope: RopeTables, mask: Mask, device: torch.device, document_ids: Tensor | None) -> Mask:
        """The mask of layers that see a chunk of the sequence alone; None where their attention cuts it itself."""
        chunk = self.dims.attention_chunk
        if chunk is None or mask is None or rope.longest <= chunk:
            return mask
        return self.mask(rope.seq_len, device, document_ids, chunk)

    def mask(self, seq_len: int, device: torch.device, document_ids: Tensor | None, chunk: int | None = None) -> Mask:
        """What a token may see, for `Attention.attend`: of its own chunk alone where there is one. A model that is
        spread along S has another function here."""
        return attention_mask(self.attention_backend, seq_len, device, document_ids, chunk)
