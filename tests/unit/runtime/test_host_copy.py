"""What the host reads is what the tensor was. On a GPU, without a wait for later work: tests/gpu/test_host_copy.py."""

import torch

from titan_fp8.runtime.host_copy import HostCopy


def test_it_is_the_value_and_knows_nothing_of_autograd() -> None:
    value = torch.tensor([1.5, float("nan"), float("inf")], requires_grad=True)
    copy = HostCopy(value)
    with torch.no_grad():
        value += 1  # what comes later does not count
    found = copy.read()
    assert found.tolist()[0::2] == [1.5, float("inf")]
    assert torch.isnan(found[1])
    assert not found.requires_grad
