"""What tests of quantized layers share."""

import pytest
import torch
from torch import Tensor

from titan_fp8.kernels import mx
from titan_fp8.quantization import mx_ops


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of blocks on a CPU: of what codes and unswizzled scales stand for, summed in fp32."""

    def values(codes: Tensor, scale: Tensor) -> Tensor:
        return mx.from_mx(mx.unswizzle(scale, codes.shape[0], codes.shape[1] // mx.BLOCK), codes, torch.float32)

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
        return mx_ops.emulated_mm(values(a, scale_a), values(b, scale_b).t(), dtype)

    monkeypatch.setattr(mx_ops, "scaled_mm_op", scaled_mm)
    monkeypatch.setattr("titan_fp8.quantization.mx_linear.runs_natively_on", lambda device: True)
