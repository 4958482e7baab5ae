"""What families do to attention: chunks of the sequence, layers without positions, temperature, latent vectors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan_fp8.models import flash4
from titan_fp8.models.attention import Attention
from titan_fp8.models.attention_backends import AttentionTask, attention_mask, resolve_backend
from titan_fp8.models.decoder import Decoder
from titan_fp8.models.dims import ModelDims, YarnScaling
from titan_fp8.models.initialization import initialize
from titan_fp8.models.rope import RotaryEmbedding, rope_frequencies
from titan_fp8.runtime.device import DeviceCapabilities

CPU = torch.device("cpu")
VOCAB, SEQ_LEN, CHUNK = 61, 29, 8
SIZES: dict[str, Any] = {
    "dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "ffn_dim": 64, "max_seq_len": 64, "rope_theta": 100.0,
}  # fmt: skip
CHUNKED = ModelDims(**SIZES, n_kv_heads=2, attention_chunk=CHUNK)
EXPERTS: dict[str, Any] = {"n_experts": 6, "moe_ffn_dim": 32, "n_shared_experts": 1, "router_score": "sigmoid"}
LLAMA4 = ModelDims(
    **SIZES, **EXPERTS, n_kv_heads=2, attention_chunk=CHUNK, qk_norm="l2", nope_interval=2, temperature_floor=4,
    score_before_experts=True,
)  # fmt: skip
LATENT = ModelDims(
    **SIZES, **EXPERTS, kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    top_k=2, router_norm=True, yarn_factor=4.0, rope_original_max_position=16,
)  # fmt: skip
BACKENDS = pytest.mark.parametrize("backend", ["math", "flash"])


def build(dims: ModelDims, **options: Any) -> Decoder:
    """Far from the start, so that attention is not nearly uniform."""
    model = Decoder(dims, **options)
    initialize(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and name != "tok_embeddings.weight":
                parameter.mul_(4.0)
    return model


def tokens_of(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, SEQ_LEN), generator=torch.Generator().manual_seed(seed))


def documents(*lengths: tuple[int, ...]) -> Tensor:
    """Document numbers of each row, `[B, S]`."""
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    return torch.stack(rows).int()


DOCUMENTS = documents((5, 17, 7), (1, 26, 2))


def assert_equals_spans_alone(model: Decoder, ids: Tensor | None, spans_of_rows: list[list[Tensor]]) -> None:
    """Logits and every gradient of two rows are those of their spans, each run alone."""
    tokens = tokens_of()
    weight = torch.randn(2, SEQ_LEN, VOCAB, generator=torch.Generator().manual_seed(1))
    together = model(tokens, ids)
    (together * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, spans in enumerate(spans_of_rows):
        for span in spans:
            alone = model(tokens[row : row + 1, span], seq_len=SEQ_LEN, positions=span)
            torch.testing.assert_close(together[row, span], alone[0], rtol=1e-4, atol=1e-4)
            (alone * weight[row, span]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def _runs(*numbers: Tensor) -> list[Tensor]:
    """The positions of each run of tokens for which all numbers, `[S]` each, stay the same."""
    changes = torch.stack(numbers).diff().any(0).nonzero().flatten() + 1
    return list(torch.arange(SEQ_LEN).tensor_split(changes.tolist()))


CHUNKS = torch.arange(SEQ_LEN) // CHUNK


@BACKENDS
@pytest.mark.parametrize("document_masking", [False, True])
def test_attention_in_chunks_equals_each_chunk_run_alone(backend: str, document_masking: bool) -> None:
    model = build(CHUNKED, attention_backend=backend, document_masking=document_masking)
    assert_equals_spans_alone(model, None, [_runs(CHUNKS)] * 2)


@BACKENDS
def test_documents_in_chunks_equal_each_piece_of_a_document_in_a_chunk_run_alone(backend: str) -> None:
    model = build(CHUNKED, attention_backend=backend, document_masking=True)
    spans = [_runs(CHUNKS, row) for row in DOCUMENTS]
    assert [len(row) for row in spans] == [6, 6], "documents and chunks end at different places"
    assert_equals_spans_alone(model, DOCUMENTS, spans)


@pytest.mark.parametrize("dims", [CHUNKED, LLAMA4], ids=["chunks", "llama4"])
def test_documents_in_chunks_may_have_any_numbers(dims: ModelDims) -> None:
    model = build(dims, document_masking=True)
    expected = model(tokens_of(), DOCUMENTS)
    for renamed in (2 - DOCUMENTS, 3 * DOCUMENTS - 4, torch.tensor([5, -1, 1000])[DOCUMENTS]):
        assert torch.equal(model(tokens_of(), renamed), expected)


def test_a_backend_that_always_has_a_mask_is_given_that_of_the_chunks() -> None:
    """As flex is; here with dense masks."""

    def mask(seq_len: int, device: torch.device, document_ids: Tensor | None, chunk: int | None = None) -> Any:
        ids = torch.zeros(1, seq_len, dtype=torch.int32) if document_ids is None else document_ids
        return attention_mask("math", seq_len, device, ids, chunk)

    plain, masked = build(CHUNKED), build(CHUNKED)
    masked.mask = mask
    torch.testing.assert_close(masked(tokens_of()), plain(tokens_of()), rtol=1e-4, atol=1e-4)
    assert_equals_spans_alone(masked, None, [_runs(CHUNKS)] * 2)


@BACKENDS
@pytest.mark.parametrize("dims", [CHUNKED, LLAMA4], ids=["all layers", "not those without positions"])
@pytest.mark.parametrize("ids", [None, documents((SEQ_LEN,), (SEQ_LEN,))], ids=["plain", "masked"])
def test_only_layers_without_positions_see_beyond_the_chunk(dims: ModelDims, backend: str, ids: Tensor | None) -> None:
    model = build(dims, attention_backend=backend, document_masking=True)
    before, after = tokens_of(), tokens_of()
    after[:, 2] = (after[:, 2] + 1) % VOCAB
    moved = (model(before, ids) - model(after, ids)).abs().amax((0, 2)) > 1e-4
    assert not moved[:2].any()
    assert moved[2:CHUNK].all(), "later tokens of its chunk"
    assert moved[CHUNK:].any() == (dims.nope_interval is not None)


def test_a_sequence_that_fits_in_a_chunk_is_seen_whole() -> None:
    tokens = tokens_of()[:, :CHUNK]
    whole = build(replace(CHUNKED, attention_chunk=None))
    assert torch.equal(build(CHUNKED)(tokens), whole(tokens))
    assert not torch.allclose(build(CHUNKED)(tokens_of()), whole(tokens_of()), atol=1e-2)


@BACKENDS
@pytest.mark.parametrize("dims", [LLAMA4, LATENT], ids=["llama4", "latent"])
@pytest.mark.parametrize("ids", [None, documents((SEQ_LEN,), (SEQ_LEN,))], ids=["plain", "masked"])
def test_logits_of_a_position_do_not_depend_on_later_tokens(dims: ModelDims, backend: str, ids: Tensor | None) -> None:
    model, tokens = build(dims, attention_backend=backend, document_masking=True), tokens_of()
    for position in (1, CHUNK, 20):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % VOCAB
        before, after = model(tokens, ids), model(changed, ids)
        torch.testing.assert_close(before[:, :position], after[:, :position], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before[:, position:], after[:, position:], atol=1e-2)


@BACKENDS
def test_masked_documents_equal_each_document_run_alone_in_latent_attention(backend: str) -> None:
    model = build(LATENT, attention_backend=backend, document_masking=True)
    assert_equals_spans_alone(model, DOCUMENTS, [_runs(row) for row in DOCUMENTS])


@pytest.mark.parametrize("dims", [{}, {"v_head_dim": 32}], ids=["narrow", "wide"])
def test_math_and_flash_agree_for_a_whole_latent_model(dims: dict[str, Any]) -> None:
    results = []
    for backend in ("math", "flash"):
        model = build(replace(LATENT, **dims), attention_backend=backend)
        logits = model(tokens_of())
        logits.square().mean().backward()
        results.append({"logits": logits} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_latent_attention_is_never_given_to_a_kernel_of_one_width_and_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "obstacle", lambda: None)
    hopper = DeviceCapabilities("cuda", "NVIDIA H200", (9, 0), False, None, None, None)
    assert resolve_backend("auto", AttentionTask(hopper, torch.bfloat16, 128)) == "flash4"
    assert resolve_backend("auto", AttentionTask(hopper, torch.bfloat16, 128, scaled=True)) == "cudnn"
    assert resolve_backend("auto", AttentionTask(hopper, torch.bfloat16, 192, scaled=True)) == "flash"
    with torch.device("meta"):
        model = Decoder(LATENT, compute_dtype=torch.bfloat16, device=hopper)
    assert model.attention_backend == "cudnn"


FLOOR = 8
WARM = ModelDims(**SIZES, nope_interval=2, temperature_floor=FLOOR, temperature_scale=0.5)


@pytest.mark.parametrize("length", [FLOOR - 1, FLOOR, FLOOR + 1, SEQ_LEN])
def test_temperature_changes_logits_from_the_floor_on_and_none_before(length: int) -> None:
    tokens = tokens_of()[:, :length]
    warm, plain = build(WARM)(tokens), build(replace(WARM, temperature_floor=None))(tokens)
    torch.testing.assert_close(warm[:, : FLOOR - 1], plain[:, : FLOOR - 1], rtol=1e-5, atol=1e-5)
    moved = (warm - plain).abs().amax((0, 2))
    assert (moved[FLOOR - 1 :] > 1e-3).all(), "position p counts as p + 1"


def test_temperature_is_that_of_the_formula_in_layers_without_positions_alone() -> None:
    model = build(WARM)
    positions = torch.tensor([0, 6, 7, 14, 15, 23, 60])
    rope = model.rope(61, CPU, positions)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 7, 4, 12, generator=generator) for _ in range(2))
    without, with_positions = model.layers["1"].attention, model.layers["0"].attention
    assert isinstance(without, Attention)
    assert isinstance(with_positions, Attention)
    factor = [1 + 0.5 * math.log(1 + (position + 1) // FLOOR) for position in positions.tolist()]
    placed_q, placed_k = without.place(q, k, rope)
    torch.testing.assert_close(placed_q, q * torch.tensor(factor)[:, None, None])
    assert torch.equal(placed_k, k)
    turned, _ = with_positions.place(q, k, rope)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    half, _ = without.place(q.bfloat16(), k.bfloat16(), rope)
    assert torch.equal(half, (q.bfloat16() * torch.tensor(factor)[:, None, None]).bfloat16()), "rounded once"


def test_queries_and_keys_are_normed_by_head_before_they_are_turned_or_without_a_scale_after() -> None:
    rope = RotaryEmbedding(12, SEQ_LEN, theta=100.0)(SEQ_LEN, CPU)
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, SEQ_LEN, 4, 12, generator=generator) for _ in range(2))

    def placed(**options: Any) -> tuple[Tensor, Tensor, nn.Module]:
        attention = build(ModelDims(**SIZES, **options)).layers["0"].attention
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None:
                nn.init.constant_(norm.weight, 2.0)
        return *attention.place(q, k, rope), attention

    plain_q, plain_k, _ = placed()
    for kind, scale in (("l2", 1.0), ("head", 2.0)):
        heads = placed(qk_norm=kind)
        for head, plain in zip(heads[:2], (plain_q, plain_k), strict=True):
            rms = plain.square().mean(-1, keepdim=True).add(1e-5).sqrt()
            torch.testing.assert_close(head, scale * plain / rms)


DEEPSEEK = YarnScaling(factor=40.0, beta_fast=32.0, beta_slow=1.0, original_max_position=4096)


def test_yarn_leaves_fast_pairs_stretches_slow_ones_and_blends_in_proportion_between() -> None:
    plain, scaled = rope_frequencies(64, 10000.0), rope_frequencies(64, 10000.0, DEEPSEEK)
    turns = 4096 * plain / (2 * math.pi)
    fast, slow = turns >= 32, turns <= 1
    assert fast.any()
    assert slow.any()
    assert torch.equal(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 40, rtol=1e-12, atol=0)
    low, high = 10, 23  # floor(10.47) and ceil(22.51), the numbers of the pairs that turn 32 times and once
    kept = (40 * scaled / plain - 1) / 39  # 1 where a pair stays, 0 where it is stretched in full
    expected = [min(max((high - pair) / (high - low), 0.0), 1.0) for pair in range(32)]
    assert kept.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("context", "stretched"), [(1, range(16)), (10**12, [])])
def test_yarn_stretches_all_pairs_of_a_short_context_and_none_of_an_endless_one(
    context: int, stretched: list[int]
) -> None:
    scaling = replace(DEEPSEEK, original_max_position=context)
    ratio = rope_frequencies(32, 100.0, scaling) / rope_frequencies(32, 100.0)
    expected = [1 / 40 if pair in stretched else 1.0 for pair in range(16)]
    assert ratio[1:].tolist() == pytest.approx(expected[1:], rel=1e-12)


YARN = replace(CHUNKED, yarn_factor=4.0, rope_original_max_position=16)
SHARPENING = 1 + 0.1 * math.log(4)


def test_yarn_multiplies_rotated_queries_and_keys_by_its_factor_and_none_without_positions() -> None:
    model = build(replace(YARN, nope_interval=2))
    rope = model.rope(SEQ_LEN, CPU)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, SEQ_LEN, 4, 12, generator=generator) for _ in range(2))
    for heads, placed in zip((q, k), model.layers["0"].attention.place(q, k, rope), strict=True):
        torch.testing.assert_close(placed.norm(dim=-1), SHARPENING * heads.norm(dim=-1))
    for heads, placed in zip((q, k), model.layers["1"].attention.place(q, k, rope), strict=True):
        assert torch.equal(placed, heads)


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ({}, SHARPENING),
        ({"yarn_mscale": 0.7}, 1 + 0.07 * math.log(4)),
        ({"yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.7}, 1.0),
        ({"yarn_mscale_all_dim": 0.5}, SHARPENING / (1 + 0.05 * math.log(4))),
        ({"yarn_factor": 1.0}, 1.0),
        ({"yarn_factor": 0.5}, 1.0),
    ],
)
def test_tables_of_yarn_have_the_factor_of_its_two_scales(given: dict[str, float], factor: float) -> None:
    model = build(replace(YARN, **given))
    model.to(torch.bfloat16)
    torch.testing.assert_close(model.rope.cos[0], torch.full((6,), factor))
    torch.testing.assert_close(torch.hypot(model.rope.cos, model.rope.sin), torch.full((64, 6), factor))


@BACKENDS
def test_documents_in_chunks_with_yarn_equal_each_piece_run_alone(backend: str) -> None:
    model = build(YARN, attention_backend=backend, document_masking=True)
    assert_equals_spans_alone(model, DOCUMENTS, [_runs(CHUNKS, row) for row in DOCUMENTS])


def test_yarn_sharpens_latent_attention_by_the_square_of_its_factor() -> None:
    (block, *_) = build(replace(LATENT, yarn_mscale=0.7)).layers.values()
    (unscaled, *_) = build(replace(LATENT, yarn_factor=1.0)).layers.values()
    assert unscaled.attention.scale == pytest.approx(1 / math.sqrt(24))
    assert block.attention.scale == pytest.approx((1 + 0.07 * math.log(4)) ** 2 / math.sqrt(24))
    tables = build(LATENT).rope
    torch.testing.assert_close(torch.hypot(tables.cos, tables.sin), torch.ones(64, 4))
