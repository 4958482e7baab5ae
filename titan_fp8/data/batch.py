"""What a training step receives: tokens, the labels to predict, and which document each token belongs to.

A causal language model predicts token t + 1 from tokens 0..t, so a sample of S + 1 tokens gives S inputs and S labels:

    window         a  b  c  d  e        S + 1 = 5 tokens
    tokens         a  b  c  d           window[:-1]
    labels         b  c  d  e           window[1:]

A label of -100 is left out of the loss. Two things cause one: the padding behind the end of a finite validation set,
and, under document masking, the step from the last token of a document to the first token of the next one, which the
model could only guess.

Shapes: B sequences of S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from titan_fp8.data.packing import Window

IGNORE_INDEX = -100
"""Label that cross entropy leaves out."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One microbatch of one rank.

    Attributes:
        tokens: [B, S] int64, the inputs.
        labels: [B, S] int64, the token after each input; `IGNORE_INDEX` where there is nothing to learn.
        document_ids: [B, S] int32, equal for the tokens of one document within a row; None without document masking.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`; `non_blocking` overlaps the copy if the batch is in pinned memory."""
        ids = self.document_ids
        return Batch(
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            document_ids=None if ids is None else ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked host memory."""
        ids = self.document_ids
        return Batch(
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            document_ids=None if ids is None else ids.pin_memory(),
        )


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """Several samples stacked, as plain arrays that travel cheaply between processes.

    Attributes:
        tokens: [B, S + 1] int32.
        document_ids: [B, S + 1] int32, or None without document masking.
        lengths: [B] int32, the real tokens of each row; the rest is padding.
    """

    tokens: np.ndarray
    document_ids: np.ndarray | None
    lengths: np.ndarray

    @classmethod
    def stack(cls, windows: Sequence[Window]) -> "WindowBlock":
        """Rows in the order given."""
        ids = [window.document_ids for window in windows if window.document_ids is not None]
        return cls(
            tokens=np.stack([window.tokens for window in windows]),
            document_ids=np.stack(ids) if ids else None,
            lengths=np.asarray([window.length for window in windows], dtype=np.int32),
        )

    @classmethod
    def concatenate(cls, blocks: Sequence["WindowBlock"]) -> "WindowBlock":
        """The rows of all blocks, in order."""
        if len(blocks) == 1:
            return blocks[0]
        ids = [block.document_ids for block in blocks if block.document_ids is not None]
        return cls(
            tokens=np.concatenate([block.tokens for block in blocks]),
            document_ids=np.concatenate(ids) if ids else None,
            lengths=np.concatenate([block.lengths for block in blocks]),
        )

    def batches(self, local_batch_sequences: int) -> list[Batch]:
        """Cut the rows into microbatches of `local_batch_sequences` rows each."""
        return [
            self._batch(slice(start, start + local_batch_sequences))
            for start in range(0, len(self.tokens), local_batch_sequences)
        ]

    def _batch(self, rows: slice) -> Batch:
        tokens = self.tokens[rows].astype(np.int64)
        labels = tokens[:, 1:].copy()
        positions = np.arange(1, tokens.shape[1])
        labels[positions[None, :] >= self.lengths[rows, None]] = IGNORE_INDEX
        ids = None if self.document_ids is None else self.document_ids[rows]
        if ids is not None:
            labels[ids[:, 1:] != ids[:, :-1]] = IGNORE_INDEX
        return Batch(
            tokens=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(labels),
            document_ids=None if ids is None else torch.from_numpy(ids[:, :-1].astype(np.int32)),
        )
