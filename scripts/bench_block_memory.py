#!/usr/bin/env python3
"""Memory that one whole Llama block takes in a forward and a backward pass, without activation checkpointing.

    python scripts/bench_block_memory.py --out DIR                    # 8B dims, one sequence of 8192 tokens
    python scripts/bench_block_memory.py --out DIR --device cpu --tiny

Two figures, both without what is there before: parameters, their gradients, the block's input and output gradient.

* peak: the most that forward and backward add to what is allocated (`torch.cuda.max_memory_allocated`), temporary
  tensors included. Gradients exist beforehand, as with gradient accumulation, so each new one is temporary;
* kept: what is still allocated between forward and backward, less the block's output: the price of each layer.

`bf16` and all float8 rows have fp32 parameters (masters); bf16 then keeps a bf16 copy of each weight for backward,
which under FSDP is the gathered weight. `bf16-plain` has bf16 parameters. The block's input requires a gradient, as in
the middle of a model. Figures are exact, not timed: one step after a warm-up. On a CPU the allocator cannot be asked;
"kept" is then the size of what autograd saved, the parameters left out, and there is no peak.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    append_records,
    choose_rows,
    compiler_settings,
    markdown_table,
    pick_device,
    reset_compiler,
    synchronize,
    versions,
)
from torch import Tensor, nn

import titan_fp8
from titan_fp8.models.attention_backends import AttentionTask, resolve_backend
from titan_fp8.models.decoder import TransformerBlock
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.flavors import resolve_dims
from titan_fp8.models.rope import RopeTables, RotaryEmbedding
from titan_fp8.runtime.device import detect_device

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise")
ROWS = (
    *(f"{row}{mode}" for row in ("bf16", "bf16-plain") for mode in ("", "-compiled")),
    *(f"ours-{recipe}{mode}" for recipe in RECIPES for mode in ("", "-compiled")),
    *(f"torchao-{recipe}-compiled" for recipe in RECIPES[:3]),
)
KNOWN_ROWS = (*ROWS, *(f"torchao-{recipe}" for recipe in RECIPES[:3]))
MIB = 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results.jsonl")
    add("--rows", help="comma-separated; known: " + ", ".join(KNOWN_ROWS))
    add("--batch", type=int, default=1, help="sequences")
    add("--seq-len", type=int, help="tokens in a sequence (default: 8192)")
    add("--cache-weights", action="store_true", help="our rows keep the weights' codes; these count as kept")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU emulates float8")
    add("--tiny", action="store_true", help="small dimensions")
    return parser.parse_args()


def dims_of(args: argparse.Namespace) -> ModelDims:
    """Llama 3 8B, or something small of the same kind."""
    tiny = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512, "ffn_dim_multiplier": None}
    return resolve_dims("llama3", "8B", tiny if args.tiny else None)


def build(row: str, dims: ModelDims, device: torch.device, args: argparse.Namespace) -> nn.Module:
    """A model of one block, converted and compiled as `row` says; its only child is called `block`."""
    side, _, rest = row.partition("-")
    task = AttentionTask(device=detect_device(), dtype=torch.bfloat16, head_dim=dims.head_width)
    with device:
        model = nn.ModuleDict({"block": TransformerBlock(dims, 0, resolve_backend("auto", task))})
    recipe, emulate = rest.removesuffix("-compiled"), device.type != "cuda"
    if recipe == "plain":
        model.bfloat16()
    if side == "ours":
        options = {"cache_weights": True} if args.cache_weights else {}
        titan_fp8.convert_to_float8_training(model, recipe_name=recipe, emulate=emulate, **options)
    elif side == "torchao":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
        convert_to_float8_training(model, config=config)
    if row.endswith("-compiled"):
        model["block"].forward = torch.compile(model["block"].forward, **compiler_settings(device))
    return model


def measure_cuda(forward: Callable[[], Tensor], grad_output: Tensor) -> dict[str, float]:
    """MiB that forward and backward add, and that is kept between them."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = forward()
    kept = torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
    output.backward(grad_output)
    torch.cuda.synchronize()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / MIB, "kept_mib": kept / MIB}


def measure_saved(forward: Callable[[], Tensor], model: nn.Module) -> dict[str, float | None]:
    """MiB of the distinct storages that autograd saves, the parameters' left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until here, so that no two storages have one address
    del output
    return {"peak_mib": None, "kept_mib": sum(saved.values()) / MIB}


def bench_row(row: str, dims: ModelDims, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one row."""
    reset_compiler()
    torch.manual_seed(0)
    seq_len = args.seq_len or (64 if args.tiny else 8192)
    model = build(row, dims, device, args)
    rotary = RotaryEmbedding(dims.head_width, seq_len, dims.rope_theta, dims.rope_scaling).to(device)
    rope: RopeTables = rotary(seq_len, device)
    shape = (args.batch, seq_len, dims.dim)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
    grad_output = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def forward() -> Tensor:
        return model["block"](x, rope)

    for _ in range(2):  # the first makes gradients, workspaces and compiled code, the second adds to the gradients
        forward().backward(grad_output)
        x.grad = None
    synchronize(device)
    figures = measure_cuda(forward, grad_output) if device.type == "cuda" else measure_saved(forward, model)
    parameters = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    return {"row": row, "batch": args.batch, "seq_len": seq_len, **figures, "parameters_mib": parameters}


def table(records: list[dict[str, Any]]) -> str:
    """All rows, each beside bf16 in the same mode."""
    by_row = {record["row"]: record for record in records}
    cells = []
    for record in records:
        mode = "-compiled" if record["row"].endswith("-compiled") else ""
        base = by_row.get(f"bf16-plain{mode}")
        share = "" if base is None else f"{100 * record['kept_mib'] / base['kept_mib']:.0f} %"
        peak = "n/a" if record["peak_mib"] is None else f"{record['peak_mib']:,.0f}"
        cells.append((record["row"], peak, f"{record['kept_mib']:,.1f}", share, f"{record['parameters_mib']:,.0f}"))
    columns = ("row", "peak MiB", "kept MiB", "kept, of bf16-plain", "parameters MiB (not counted)")
    return markdown_table(columns, cells)


def main() -> int:
    args = arguments()
    device = pick_device(args.device)
    rows = choose_rows(args.rows, KNOWN_ROWS, ROWS)
    dims = dims_of(args)
    common = {**versions(device), "cache_weights": args.cache_weights}
    print(", ".join(f"{key} {value}" for key, value in common.items()))
    records: list[dict[str, Any]] = []
    failed = False
    for row in rows:
        try:
            record = bench_row(row, dims, device, args)
        except Exception as error:  # one row's trouble must not cost the others their run
            print(f"{row} failed: {type(error).__name__}: {str(error)[:400]}", flush=True)
            failed = True
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        append_records(args.out, [{**common, **record}])
        records.append(record)
        print(f"{row}: kept {record['kept_mib']:,.1f} MiB", flush=True)
    print("\n" + table(records))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
