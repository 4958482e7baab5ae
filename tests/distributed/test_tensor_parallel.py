"""Tensor and sequence parallelism against one process: the same losses, gradients and weights, by name."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from tests.distributed.test_parallel import (
    FLOAT8,
    FP32,
    ROWS,
    SEQ_LEN,
    Case,
    assert_same,
    built,
    spread,
    train_alone,
    train_on_ranks,
)
from titan_fp8.converters.api import convert_to_float8_training
from titan_fp8.converters.exchanges import exchanges
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims
from titan_fp8.models.loss import IGNORE_INDEX, cross_entropy_sum
from titan_fp8.parallel.activation_checkpoint import _recomputed_shapes
from titan_fp8.parallel.config import ActivationCheckpointSection
from titan_fp8.parallel.tensor import vocab_parallel_loss
from titan_fp8.quantization.fsdp_weight import precompute_float8_dynamic_scale_for_fsdp
from titan_fp8.runtime.collectives import all_gather

DIMS = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128}
LATENT_DIMS = {
    "dim": 64, "n_heads": 4, "n_kv_heads": None, "ffn_dim": 128, "kv_lora_rank": 32, "q_lora_rank": 48,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
BLOCK_DIMS = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 256, "n_layers": 2}
TP2 = Case(tensor=2, vocab_size=68, dims=DIMS)
LOCAL_SCALES = 0.15
"""Under context parallelism each rank's tokens have scales of their own, so the codes are others than one process has:
gradients differ by the rounding of float8."""

CASES = {
    "tp2": (TP2, FP32),
    "tp2_gathered_logits": (replace(TP2, loss_parallel=False), FP32),
    "tp2_tied": (replace(TP2, tied_embeddings=True), FP32),
    "tp4_one_head_each": (replace(TP2, tensor=4, dims=DIMS | {"n_kv_heads": 4}), FP32),
    "tp2_fsdp2_accumulating": (replace(TP2, shard=2, microbatches=2), FP32),
    "tp2_hsdp_full_ac": (replace(TP2, replicate=2, activation_checkpoint={"mode": "full"}), FP32),
    "tp2_tensorwise": (replace(TP2, float8_recipe="tensorwise"), FLOAT8),
    "tp2_rowwise": (replace(TP2, float8_recipe="rowwise"), FLOAT8),
    "tp2_rowwise_with_gw_hp": (replace(TP2, float8_recipe="rowwise_with_gw_hp"), FLOAT8),
    "tp2_blockwise": (replace(TP2, float8_recipe="blockwise", dims=BLOCK_DIMS), FLOAT8),
    "tp2_fsdp2_tensorwise_all_gather": (
        replace(TP2, shard=2, float8_recipe="tensorwise", float8_all_gather=True, precomputed_scales=True),
        FLOAT8,
    ),
    "tp2_compiled_full_ac": (
        replace(TP2, compile_backend="aot_eager", activation_checkpoint={"mode": "full"}),
        FP32,
    ),
    "tp2_fsdp2_rowwise_all_gather_compiled_every_second_ac": (
        replace(
            TP2,
            shard=2,
            float8_recipe="rowwise",
            float8_all_gather=True,
            compile_backend="aot_eager",
            activation_checkpoint={"mode": "selective"},
        ),
        FLOAT8,
    ),
    "tp2_cp2": (replace(TP2, context=2), FP32),
    "tp2_cp2_tensorwise": (replace(TP2, context=2, float8_recipe="tensorwise"), LOCAL_SCALES),
    "cp2_fsdp2_rowwise_all_gather": (
        replace(TP2, tensor=1, context=2, shard=2, float8_recipe="rowwise", float8_all_gather=True),
        LOCAL_SCALES,
    ),
    "tp2_fsdp2_rowwise_all_gather": (
        replace(TP2, shard=2, float8_recipe="rowwise", float8_all_gather=True),
        FLOAT8,
    ),
}


@pytest.mark.parametrize("name", some_by_hand(CASES, "tp2_fsdp2_rowwise_all_gather_compiled_every_second_ac"))
def test_tensor_parallel_training_equals_one_process(name: str) -> None:
    case, tolerance = CASES[name]
    assert_same(run_distributed(train_on_ranks, case.ranks, case)[0], train_alone(case), tolerance)


class _Wire(TorchDispatchMode):
    """Notes what is gathered, (dtype, bytes of this rank's part), and counts the amaxes that are reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[tuple[torch.dtype, int]] = []
        self.amaxes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.gathered.append((args[0].dtype, args[0].nbytes))
        self.amaxes += func is torch.ops._c10d_functional.all_reduce.default and args[1] == "max"
        return func(*args, **(kwargs or {}))


def _gathered_by_a_block(rank: int, world_size: int, case: Case) -> list[list]:
    """What the last block's forward and backward pass gather over the ranks of tensor parallelism."""
    model, _ = spread(case)
    block = list(model.layers.values())[-1]
    tokens = ROWS * SEQ_LEN // case.tensor
    model(torch.zeros(ROWS, SEQ_LEN, dtype=torch.int64))  # FSDP's own gathers are over by now
    x = torch.randn(1, tokens, model.dims.dim, dtype=case.compute_dtype, requires_grad=True)
    with _Wire() as forward:
        y = block(x, model.rope(SEQ_LEN, x.device))
    with _Wire() as backward:
        y.sum().backward()
    assert x.grad is not None
    return [forward.gathered, backward.gathered]


BYTES = torch.uint8
TOKENS = ROWS * SEQ_LEN // 2


def _codes(dim: int) -> list[tuple[torch.dtype, int]]:
    return [(BYTES, TOKENS * dim)]


def _numbers(dim: int) -> list[tuple[torch.dtype, int]]:
    return [(torch.bfloat16, 2 * TOKENS * dim)]


SCALES = [(torch.float32, 4 * TOKENS)]
ROWWISE = [*_codes(64), *SCALES]
# recipe, linears in high precision, what the forward and what the backward pass gathers: one gather serves wq, wk and
# wv, one w1 and w3; in backward one serves w2's gradient and one wo's.
WIRES: dict[str, tuple[str | None, tuple[str, ...], list, list]] = {
    "bf16": (None, (), 2 * _numbers(64), 2 * _numbers(64)),
    "tensorwise": ("tensorwise", (), 2 * _codes(64), 2 * _codes(64)),
    "rowwise": ("rowwise", (), 2 * ROWWISE, 2 * ROWWISE),
    "rowwise_with_gw_hp": ("rowwise_with_gw_hp", (), 2 * _numbers(64), 2 * _numbers(64)),
    "blockwise": ("blockwise", (), 2 * _numbers(256), 2 * _numbers(256)),
    "tensorwise but wk": ("tensorwise", ("wk",), [*_numbers(64), *_codes(64)], 2 * _codes(64)),
    "tensorwise but w1, w2": ("tensorwise", ("w1", "w2"), [*_codes(64), *_numbers(64)], [*_numbers(64), *_codes(64)]),
    "rowwise but wo, w3": ("rowwise", ("wo", "w3"), [*ROWWISE, *_numbers(64)], [*ROWWISE, *_numbers(64)]),
    # Latent vectors of queries, the rotated key, and latent vectors of keys and values, in place of the stream.
    "latent bf16": (None, (), [*_numbers(48), *_numbers(16), *_numbers(32), *_numbers(64)], 2 * _numbers(64)),
    "latent rowwise": (
        "rowwise",
        (),
        [*_codes(48), *SCALES, *_numbers(16), *_codes(32), *SCALES, *ROWWISE],
        2 * ROWWISE,
    ),
}


def _wire_case(name: str) -> Case:
    recipe, filtered, *_ = WIRES[name]
    dims = BLOCK_DIMS if recipe == "blockwise" else LATENT_DIMS if name.startswith("latent") else DIMS
    return replace(TP2, float8_recipe=recipe, filtered=filtered, dims=dims, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("name", WIRES)
def test_float8_codes_travel_where_the_readers_are_float8(name: str) -> None:
    for gathered in run_distributed(_gathered_by_a_block, 2, _wire_case(name)):
        assert gathered == list(WIRES[name][2:])


@pytest.mark.parametrize("name", [name for name in WIRES if "but" in name])
def test_the_report_says_what_travels_as_what(name: str) -> None:
    *_, forward, backward = WIRES[name]
    model = built(_wire_case(name))
    ways = {key.removeprefix("layers.2."): way for key, way in exchanges(model).items() if key.startswith("layers.2.")}
    travels = [
        *(ways[f"{part} input"] for part in ("attention", "feed_forward")),
        *(ways[f"{linear} gradient"] for linear in ("feed_forward.w2", "attention.wo")),
    ]
    of_bytes = [dtype is BYTES for dtype, _ in [*forward, *backward] if dtype is not torch.float32]
    assert [way == "float8 codes" for way in travels] == of_bytes
    assert {way for way in travels if way != "float8 codes"} == {"high precision (a reader is not float8)"}


def test_the_report_knows_latent_attention_and_shared_experts() -> None:
    sizes = {"n_layers": 1, "n_experts": 4, "n_shared_experts": 1, "moe_ffn_dim": 32, "vocab_size": 64}
    with torch.device("meta"):
        model = Decoder(ModelDims(**{**LATENT_DIMS, **sizes}, max_seq_len=SEQ_LEN))
    convert_to_float8_training(model, recipe_name="rowwise", filter_fqns=["output"], emulate=True)
    attention = {f"attention.{name}": "float8 codes" for name in ("wq_b input", "wkv_b input", "wo gradient")}
    experts = {"moe.shared_experts.w2 gradient": "float8 codes", "moe.shared_experts input": "float8 codes"}
    expected = {f"layers.0.{name}": way for name, way in (attention | experts).items()}
    expected["output input"] = "high precision (a reader is not float8)"
    assert exchanges(model) == expected
    expected["layers.0.moe.shared_experts input"] = "high precision (with that of the experts)"
    assert exchanges(model, experts_divided=True) == expected


@pytest.mark.parametrize("name", ["tensorwise but wk", "tensorwise but w1, w2", "rowwise but wo, w3"])
def test_a_filtered_linear_in_a_converted_block_is_ordinary(name: str) -> None:
    case = replace(_wire_case(name), compute_dtype=torch.float32)
    assert_same(run_distributed(train_on_ranks, case.ranks, case)[0], train_alone(case), FLOAT8)


def _reduced_amaxes(rank: int, world_size: int) -> list[int]:
    """Of the weights after a step, and of all else in the next forward pass."""
    model, _ = spread(replace(TP2, float8_recipe="tensorwise", float8_all_gather=True))
    tokens = torch.zeros(ROWS, SEQ_LEN, dtype=torch.int64)
    model(tokens)
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)  # pyright: ignore[reportPrivateImportUsage]
    with _Wire() as of_weights:
        precompute_float8_dynamic_scale_for_fsdp(model)
    with _Wire() as of_activations:
        model(tokens)
    return [of_weights.amaxes, of_activations.amaxes]


def test_the_amaxes_of_all_weights_are_reduced_at_once() -> None:
    """Of activations: the inputs of attention, wo, feed-forward and w2 of two float8 blocks."""
    assert run_distributed(_reduced_amaxes, 2)[0] == [1, 2 * 4]


def _outside_the_vocabulary(rank: int, world_size: int) -> tuple[list[float], float, list[bool]]:
    """Losses of labels that count, that are left out and that are none; the last one process's; embedded tokens."""
    model, mesh = spread(TP2)
    logits = torch.linspace(-1, 1, 2 * TP2.vocab_size).view(2, -1)
    mine = logits.chunk(2, dim=-1)[rank]
    loss_fn = vocab_parallel_loss(mesh)
    losses = [loss_fn(mine, torch.tensor([3, label])).item() for label in (IGNORE_INDEX, TP2.vocab_size, -1)]
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    tokens[0, 1], tokens[0, 3] = -1, TP2.vocab_size
    assert model.tok_embeddings is not None
    embedded = all_gather(model.tok_embeddings(tokens).detach().flatten(0, 1), model.tok_embeddings.axis)
    return losses, cross_entropy_sum(logits[:1, None], torch.tensor([[3]])).item(), embedded.isnan().any(-1).tolist()


def test_what_is_outside_the_vocabulary_shows() -> None:
    for (left_out, too_large, negative), expected, is_nan in run_distributed(_outside_the_vocabulary, 2):
        assert left_out == pytest.approx(expected, rel=1e-6)
        assert math.isnan(too_large)
        assert math.isnan(negative)
        assert is_nan == [False, True, False, True]


def _what_ranks_hold(rank: int, world_size: int) -> tuple[frozenset, bool]:
    """Shapes that per-op checkpointing recomputes for w1 and w2; whether a copy of a weight's state knows its ranks."""
    model, _ = spread(replace(TP2, float8_recipe="tensorwise", float8_all_gather=True))
    section = ActivationCheckpointSection(
        selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=["w1", "w2"]
    )
    state = model.layers["1"].attention.wq.fsdp_weight_state
    assert state.axis is not None
    return _recomputed_shapes(model, section), copy.deepcopy(state).axis == state.axis


def test_checkpointing_and_copies_know_the_parts_of_a_weight() -> None:
    for shapes, copied in run_distributed(_what_ranks_hold, 2):
        assert shapes == {(64, 64)}, "w1 [128 / 2, 64] and w2 [64, 128 / 2] as (K, N)"
        assert copied
