"""`torch.compile`, block by block.

All blocks of a decoder are the same program on different weights. Compiled one by one they share one compilation,
which takes seconds where the whole model takes minutes, and FSDP's hooks, which gather a block's weights before it
runs and cannot be compiled, stay between the compiled regions.

What is compiled is the block's `forward` method, replaced on the instance: hooks stay outside, names of modules and
parameters stay as they are. `fullgraph=True` because a graph break in a block is a defect and should say so.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed.tensor import DTensor

from titan_fp8.models.decoder import Decoder, TransformerBlock
from titan_fp8.parallel.config import CompileSection
from titan_fp8.quantization.graph_pass import DropUnusedLayouts, InOrder
from titan_fp8.quantization.tensor_parallel import local_weights_outside
from titan_fp8.runtime.collectives import Axis
from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def compiles(section: CompileSection, component: str) -> bool:
    """Whether `section` asks for `component` ("model" or "loss") to be compiled."""
    return section.enable and component in section.components


def apply_compile(
    model: Decoder,
    section: CompileSection,
    *,
    overlapped: Axis | None = None,
    around_experts: bool = False,
    routes: bool = True,
) -> None:
    """Compile the blocks of `model` in place, if `section` says so. Compilation itself happens at the first call.

    Args:
        model: with its parallelism and activation checkpointing, not yet sharded.
        section: the section.
        overlapped: an axis whose gathers and sums shall overlap with the matrix products beside them; Inductor only.
        around_experts: experts are dealt out to ranks or sharded by themselves. What an exchange needs to know is found
            out as the step goes on, so of a block with experts the parts before and beside them are compiled, and they
            are not.
        routes: with `around_experts`, whether the choice of experts is compiled too. Activation checkpointing by
            operation counts a layer's products, the router's among them, and sees none that is compiled.

    Raises:
        UserError: no such backend.
    """
    check_backend(section)
    if not compiles(section, "model"):
        return
    # One object for all blocks: the compiler takes blocks for the same program only if their options are equal.
    options = _inductor_options(overlapped) if section.backend == "inductor" else None
    for block in model.layers.values():
        if around_experts and isinstance(block, TransformerBlock) and block.moe is not None:
            _compile_around_experts(block, section, options, routes=routes)
            continue
        compiled = torch.compile(block.forward, backend=section.backend, fullgraph=True, options=options)
        block.forward = _with_local_weights(compiled, block.modules())


def _compile_around_experts(
    block: TransformerBlock, section: CompileSection, options: dict[str, Any] | None, *, routes: bool
) -> None:
    assert block.moe is not None
    compile_part = functools.partial(torch.compile, backend=section.backend, fullgraph=True, options=options)
    before = [*block.attention.modules(), block.attention_norm, block.ffn_norm]
    block.attend_and_norm = _with_local_weights(compile_part(block.attend_and_norm), before)
    if routes:
        block.moe.route = _with_local_weights(compile_part(block.moe.route), block.moe.router.modules())
    shared = block.moe.shared_experts
    if shared is not None:
        shared.forward = _with_local_weights(compile_part(shared.forward), shared.modules())


def _with_local_weights(compiled: Callable[P, R], modules: Iterable[nn.Module]) -> Callable[P, R]:
    """What is compiled of these modules. Under tensor parallelism its graph sees plain tensors: PyTorch 2.13 cannot
    keep what DTensors carry, their mesh, from forward to backward where a block is recomputed."""
    divided = [module for module in modules if isinstance(module._parameters.get("weight"), DTensor)]
    if not divided:
        return compiled

    @functools.wraps(compiled)
    def forward(*args: P.args, **kwargs: P.kwargs) -> R:
        with local_weights_outside(divided):
            return compiled(*args, **kwargs)

    return forward


def _inductor_options(overlapped: Axis | None) -> dict[str, Any]:
    passes: list[CustomGraphPass] = [DropUnusedLayouts()]
    if overlapped is not None:
        # By name, because it imports the compiler, for which a check of the configuration would wait.
        passes.append(importlib.import_module("titan_fp8.quantization.overlap_pass").OverlapExchanges(overlapped))
    return {"post_grad_custom_pre_pass": InOrder(*passes)}


def compile_loss(loss: Callable[P, R], section: CompileSection) -> Callable[P, R]:
    """`loss`, compiled if `section` says so.

    Raises:
        UserError: no such backend.
    """
    check_backend(section)
    if not compiles(section, "loss"):
        return loss
    return torch.compile(loss, backend=section.backend, fullgraph=True)


def check_backend(section: CompileSection) -> None:
    """Raise a `UserError` if something is to be compiled by a backend that PyTorch does not know."""
    if not section.enable:
        return
    known = torch._dynamo.list_backends(exclude_tags=())
    if section.backend not in known:
        common = ", ".join(torch._dynamo.list_backends())
        raise UserError(
            f'compile.backend = "{section.backend}": no such backend of torch.compile'
            f"{did_you_mean(section.backend, known)}; "
            f"the usual ones are {common}"
        )
