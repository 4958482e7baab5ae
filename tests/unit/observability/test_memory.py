"""Peak memory: what GPUs read from each other counts, though PyTorch's allocator does not know it."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from titan_fp8.observability.memory import PeakMemory
from titan_fp8.runtime import peer_memory


class _Handle:
    def get_buffer(self, peer: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)


def test_peer_buffers_count_as_long_as_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    symmetric = SimpleNamespace(
        empty=lambda size, dtype, device: torch.zeros(size, dtype=dtype), rendezvous=lambda *_: _Handle()
    )
    monkeypatch.setattr(peer_memory, "_symm", symmetric)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    for name in ("max_memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2, group_name="0")
    memory, before = PeakMemory(torch.device("cuda")), peer_memory.bytes_held()
    buffer = peer_memory.PeerBuffer(group, 2**20, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    assert peer_memory.bytes_held() - before == 2**20
    peak = memory.take()
    assert peak.reserved_gib == 3 + (before + 2**20) / 2**30
    assert peak.allocated_gib == 3
    gone = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert gone() is None
    assert peer_memory.bytes_held() == before
