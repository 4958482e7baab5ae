"""A host that reads a number does not wait for what the device was asked for after it."""

import pytest
import torch

from titan_fp8.runtime.host_copy import HostCopy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CYCLES = 2_000_000_000
"""About a second."""


def test_a_number_is_read_while_later_work_is_still_to_be_done() -> None:
    device = torch.device("cuda")
    HostCopy(torch.zeros((), device=device)).read()  # the first allocation of page-locked memory waits for the device
    value = torch.arange(3.0, device=device)
    copy = HostCopy(value.square())
    torch.cuda._sleep(CYCLES)
    value.zero_()
    later = torch.cuda.current_stream().record_event()
    assert copy.read().tolist() == [0.0, 1.0, 4.0]
    assert not later.query(), "it has waited for all"
    torch.cuda.synchronize()


def test_it_waits_for_what_the_number_depends_on() -> None:
    value = torch.zeros(2, device="cuda")
    torch.cuda._sleep(CYCLES // 4)
    value += 3
    copy = HostCopy(value)
    assert copy.read().tolist() == [3.0, 3.0]
    assert copy.read().tolist() == [3.0, 3.0]
