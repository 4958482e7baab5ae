"""What the device can do: kind, compute capability, FP8 tensor cores and peak rates.

Peak rates are dense tensor-core rates from the vendors' datasheets (without sparsity), in FLOP/s, and serve MFU only. A
device that is not in the table has no peak, and MFU is then reported as unknown instead of being guessed.
"""

from dataclasses import dataclass

import torch

# (substring of the device name, bf16 FLOP/s, FP8 FLOP/s); the first match counts, so longer names stand first.
_PEAKS = (
    ("GB200", 2500e12, 5000e12),
    ("B200", 2250e12, 4500e12),
    ("H200", 989e12, 1979e12),
    ("H100 NVL", 835e12, 1671e12),
    ("H100 PCIe", 756e12, 1513e12),
    ("H100", 989e12, 1979e12),
    ("H20", 148e12, 296e12),
    ("A100", 312e12, None),
    ("L40S", 362e12, 733e12),
    ("RTX 5090", 209.5e12, 419e12),
    ("RTX 4090", 165.2e12, 330.3e12),
)


@dataclass(frozen=True)
class DeviceCapabilities:
    """The device a process trains on.

    Attributes:
        kind: "cpu" or "cuda" (the latter also for ROCm builds of PyTorch).
        name: the device's own name, e.g. "NVIDIA H200".
        compute_capability: (major, minor) on CUDA, otherwise None.
        has_fp8_tensor_cores: whether `torch._scaled_mm` on e4m3/e5m2 runs natively.
        peak_bf16_flops, peak_fp8_flops: dense FLOP/s, None when unknown.
        memory_gib: device memory in GiB, None on a CPU.
        cuda_version: (major, minor) of the CUDA that PyTorch is built for, None without CUDA.
    """

    kind: str
    name: str
    compute_capability: tuple[int, int] | None
    has_fp8_tensor_cores: bool
    peak_bf16_flops: float | None
    peak_fp8_flops: float | None
    memory_gib: float | None
    cuda_version: tuple[int, int] | None = None


def peak_flops(name: str) -> tuple[float | None, float | None]:
    """Dense (bf16, FP8) tensor-core peaks in FLOP/s of the device called `name`; None where unknown."""
    for pattern, bf16, fp8 in _PEAKS:
        if pattern.lower() in name.lower():
            return bf16, fp8
    return None, None


def detect_device(index: int = 0) -> DeviceCapabilities:
    """Capabilities of CUDA device `index` if PyTorch sees one, otherwise of the CPU."""
    if not torch.cuda.is_available():
        return DeviceCapabilities("cpu", "CPU", None, False, None, None, None)
    properties = torch.cuda.get_device_properties(index)
    bf16, fp8 = peak_flops(properties.name)
    is_nvidia = torch.version.hip is None
    capability = (properties.major, properties.minor) if is_nvidia else None
    major, _, minor = (torch.version.cuda or "").partition(".")
    return DeviceCapabilities(
        kind="cuda",
        name=properties.name,
        compute_capability=capability,
        has_fp8_tensor_cores=capability is not None and capability >= (8, 9),
        peak_bf16_flops=bf16,
        peak_fp8_flops=fp8,
        memory_gib=properties.total_memory / 2**30,
        cuda_version=(int(major), int(minor)) if minor else None,
    )
