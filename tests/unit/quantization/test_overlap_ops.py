"""What overlapping exchanges needs of GPUs is asked for before the training."""

import os

import pytest

from titan_fp8.quantization import overlap_ops
from titan_fp8.runtime.collectives import Axis
from titan_fp8.runtime.errors import UserError

AXIS = Axis("tp", (4, 5), 0)


def test_gpus_that_cannot_read_each_others_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(group_name: str, min_size: int) -> None:
        raise RuntimeError("peer access is not supported between these two devices\nException raised from here")

    monkeypatch.setattr(overlap_ops._symm, "get_symm_mem_workspace", fail)
    with pytest.raises(UserError) as caught:
        overlap_ops.check_direct_access(AXIS)
    message = str(caught.value)
    assert message.startswith(
        "parallelism.enable_async_tensor_parallel: the GPUs of one tensor-parallel group (ranks 4, 5)"
    )
    assert "(peer access is not supported between these two devices)" in message
    assert "\n" not in message


def test_multicast_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", raising=False)
    found = []
    monkeypatch.setattr(
        overlap_ops._symm,
        "get_symm_mem_workspace",
        lambda group_name, min_size: found.append(os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"]),
    )
    overlap_ops.check_direct_access(AXIS)
    assert found == ["1"]
