"""The families: one module each, with a table of flavors. Data, without torch."""

from titan_fp8.models.dims import ModelDims
from titan_fp8.models.families import deepseek_v3, llama3, llama4, mixtral, qwen3_moe

FLAVORS: dict[str, dict[str, ModelDims]] = {
    "llama3": llama3.FLAVORS,
    "llama4": llama4.FLAVORS,
    "qwen3_moe": qwen3_moe.FLAVORS,
    "deepseek_v3": deepseek_v3.FLAVORS,
    "mixtral": mixtral.FLAVORS,
}
"""Family -> flavor -> dimensions."""
