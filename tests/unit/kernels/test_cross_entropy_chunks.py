"""A gradient is rounded in its own memory: the values of a copy, without the copy."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from titan_fp8.kernels.cross_entropy.chunks import LossWithGradients, narrow_


class _Allocations(TorchDispatchMode):
    """Notes the bytes of every memory that comes into being."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (7, 19), (129, 256), (3, 5, 1031)])
def test_it_holds_what_a_copy_would(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    wide.view(-1)[0] = float("inf")
    expected, place = wide.to(dtype), wide.data_ptr()
    with _Allocations(wide) as allocations:
        narrow = narrow_(wide, dtype)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == place
    assert narrow.is_contiguous()
    assert allocations.largest <= 2 * (wide.numel() // 64 + 1)


def test_memory_that_is_not_in_one_piece_is_refused() -> None:
    with pytest.raises(RuntimeError, match="view"):
        narrow_(torch.zeros(8, 4).t(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_backward_makes_no_second_gradient_of_the_weight(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 128, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(512, 128, generator=generator).to(weight_dtype).requires_grad_()
    total = torch.randn(512, 128, generator=generator)
    expected = (total * 0.3).to(dtype).to(weight_dtype)
    loss = LossWithGradients.apply(hidden, weight, torch.zeros(()), torch.randn(4, 128), total, dtype)
    with _Allocations(total) as allocations:
        (gradient,) = torch.autograd.grad(loss, [weight], torch.tensor(0.3))
    assert gradient.dtype == weight_dtype
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == total.data_ptr()
    assert allocations.largest <= 2 * total.numel() // 32
