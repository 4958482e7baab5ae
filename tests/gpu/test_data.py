"""Batches in pinned memory, which only exists where there is a GPU."""

import pytest
import torch

from titan_fp8.data.config import DataloaderSection, TrainingSection
from titan_fp8.data.loader import build_train_loader
from titan_fp8.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("document_masking", [False, True])
def test_pinned_batches_hold_the_same_samples(num_workers, document_masking):
    sizes = {"global_batch_sequences": 4, "local_batch_sequences": 2, "dp_rank": 0, "dp_world_size": 1}
    steps = {}
    for pin_memory in (False, True):
        section = TrainingSection(
            seq_len=64,
            document_masking=document_masking,
            dataloader=DataloaderSection(pin_memory=pin_memory, num_workers=num_workers),
        )
        with build_train_loader(section, ByteTokenizer(), seed=0, **sizes) as loader:
            steps[pin_memory] = [batch for _ in range(3) for batch in loader.next_step()]
    for plain, pinned in zip(steps[False], steps[True], strict=True):
        assert not plain.tokens.is_pinned()
        assert pinned.tokens.is_pinned()
        assert pinned.labels.is_pinned()
        moved = pinned.to("cuda", non_blocking=True)
        assert torch.equal(moved.tokens.cpu(), plain.tokens)
        assert torch.equal(moved.labels.cpu(), plain.labels)
        if document_masking:
            assert torch.equal(moved.document_ids.cpu(), plain.document_ids)
