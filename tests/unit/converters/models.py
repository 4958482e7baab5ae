"""A small model and its conversion, for the tests of this folder."""

import pytest
from torch import nn

from titan_fp8.converters import ConversionError, build_converters
from titan_fp8.converters.config import Float8LinearSection, QuantizeLinearSection, QuantizeSection
from titan_fp8.converters.protocol import ONE_PROCESS, Placement
from titan_fp8.models.linear import Linear
from titan_fp8.quantization.linear import Float8Linear
from titan_fp8.runtime.device import DeviceCapabilities

CPU = DeviceCapabilities("cpu", "CPU", None, False, None, None, None)
H200 = DeviceCapabilities("cuda", "NVIDIA H200", (9, 0), True, 989e12, 1979e12, 141.0, (13, 0))
B200 = DeviceCapabilities("cuda", "NVIDIA B200", (10, 0), True, 2250e12, 4500e12, 180.0, (13, 0))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wo = Linear(width, width), Linear(width, width // 2), Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.norm = nn.RMSNorm(width)
        self.w1 = nn.Linear(width, 2 * width, bias=False)


class Model(nn.Module):
    """Nine linears in two blocks and a head. Blockwise takes a width of 256."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(128, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.output = nn.Linear(width, 128, bias=False)


def converter(device: DeviceCapabilities = CPU, placement: Placement = ONE_PROCESS, **settings):
    """The float8 converter with these settings; they stand for a section that was checked."""
    section = Float8LinearSection(**({"emulate": "auto"} | settings))
    quantize = QuantizeSection(linear=QuantizeLinearSection(float8=section))
    (result,) = build_converters(["quantize.linear.float8"], quantize, device, placement)
    return result


def converted_names(model: nn.Module) -> set[str]:
    """Names of the float8 linears."""
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def violations(model: nn.Module, device: DeviceCapabilities = CPU, **settings) -> list[str]:
    """What a conversion answers that is refused; it has left the model as it was."""
    with pytest.raises(ConversionError) as error:
        converter(device, **settings).convert(model)
    assert converted_names(model) == set()
    return error.value.violations
