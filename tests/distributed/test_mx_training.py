"""Training in MXFP8 whose weights FSDP2 gathers as codes equals, bit for bit, that which gathers master weights: every
loss, norm and gradient of four steps, on every kind of mesh, through the trainer."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.cases import some_by_hand
from tests.distributed.harness import run_distributed
from tests.distributed.trainings import COMPILED, FULL, PER_OP, Mesh, Options, Run, run_on, train, train_afresh

MX, MX_GROUPED = "quantize.linear.mx", "quantize.grouped_mm.mx"
STEPS = 4
GATHERS = {f"{section}.enable_fsdp_mxfp8_all_gather": "true" for section in (MX, MX_GROUPED)}
BF16 = {"training.mixed_precision_param": "bfloat16"}
LINEARS = {"model.converters": MX, f"{MX}.recipe_name": "mxfp8_cublas", f"{MX}.emulate": "true"}
EXPERTS = {
    **LINEARS,
    "model.converters": f"{MX},{MX_GROUPED}",
    f"{MX_GROUPED}.fqns": "experts",
    f"{MX_GROUPED}.emulate": "true",
    "model.name": "qwen3_moe",
    "model.overrides.n_experts": "4",
    "model.overrides.top_k": "2",
    "model.overrides.moe_ffn_dim": "128",
    "model.overrides.n_shared_experts": "0",
    "model.overrides.head_dim": "64",
}
THREE_EACH = {"model.overrides.n_experts": "6"}
"""Of three experts two shards have no whole number: each expert is cut by rows."""
LATENT = {
    **EXPERTS,
    "model.name": "deepseek_v3",
    "model.overrides.n_shared_experts": "1",
    "model.overrides.q_lora_rank": "128",
    "model.overrides.kv_lora_rank": "96",
    "model.overrides.qk_nope_head_dim": "32",
    "model.overrides.qk_rope_head_dim": "32",
    "model.overrides.v_head_dim": "32",
    "model.overrides.first_dense_layers": "1",
    "model.overrides.expert_groups": "2",
    "model.overrides.expert_groups_per_token": "1",
    **{f"model.overrides.{name}": "None" for name in ("head_dim", "n_kv_heads")},
}
VALIDATED = {
    "validation.enable": "true",
    "validation.dataset": "synthetic",
    "validation.freq": "2",
    "validation.steps": "1",
    "validation.seq_len": "32",
}
FROM_MASTERS = LINEARS | VALIDATED
CASES = {
    "full AC": ("fsdp2", FROM_MASTERS, FULL),
    "compiled": ("fsdp2", FROM_MASTERS, COMPILED),
    "tensor parallel": ("fsdp2 tp2", LINEARS, {}),
    "pipeline": ("pp2 fsdp2", LINEARS | BF16, {}),
    "experts cut by rows": ("fsdp4 ep2", EXPERTS | THREE_EACH, {}),
}
"""Axes, options, and what the run that gathers codes has besides: it changes no bit either."""
SLOW = {
    "experts": ("fsdp4 ep2", EXPERTS | BF16, {}),
    "HSDP, selective AC": ("rep2 fsdp2", LINEARS | BF16, PER_OP),
    "context parallel": ("fsdp2 cp2", LINEARS | BF16, {}),
    "four shards": ("fsdp4", LINEARS, {"parallelism.fsdp_reshard_after_forward": "always"}),
    "never freed": ("fsdp2", LINEARS, {"parallelism.fsdp_reshard_after_forward": "never"}),
    "one pass": ("fsdp2", LINEARS | {"optimizer.implementation": "one_pass"}, {}),
    "compiled, full AC": ("fsdp2", LINEARS, COMPILED | FULL),
    "compiled, tensor parallel": ("fsdp2 tp2", LINEARS, COMPILED | FULL),
    "high-precision grad_weight": ("fsdp2", LINEARS | {f"{MX}.grad_weight_in_high_precision": "true"}, {}),
    "compiled experts cut by rows": ("fsdp4 ep2", EXPERTS | THREE_EACH, COMPILED | FULL),
    "experts in blocks": ("fsdp2", EXPERTS, PER_OP),
    "divided experts": ("fsdp2 tp2 etp2", EXPERTS, {}),
    "latent attention": ("fsdp2 tp2", LATENT, {}),
    "latent attention in 16 bits": ("fsdp2 tp2", LATENT | BF16, {}),
    "latent attention, compiled": ("fsdp2 tp2", LATENT, COMPILED),
}


def same_bits(actual: Run, expected: Run) -> None:
    assert actual.losses == expected.losses
    assert actual.norms == expected.norms
    assert actual.validated == expected.validated
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert torch.equal(actual.grads[name], grad), name


def gathers(options: Options) -> Options:
    return {key: value for key, value in GATHERS.items() if key.rpartition(".")[0] in options["model.converters"]}


def on(axes: str, options: Options, folder: Path) -> Run:
    folder.mkdir(exist_ok=True)
    return run_on(Mesh(axes, tuple(options.items())), folder, steps=STEPS, how=train_afresh)


@cache
def from_masters(axes: str, options: tuple[tuple[str, str], ...]) -> Run:
    """The run that gathers master weights, once for all that are compared with it."""
    with tempfile.TemporaryDirectory() as folder:
        return on(axes, dict(options), Path(folder))


def check(axes: str, options: Options, besides: Options, folder: Path) -> None:
    coded = on(axes, options | besides | gathers(options), folder / "codes")
    same_bits(coded, from_masters(axes, tuple(options.items())))
    assert len(coded.validated) == (2 if "validation.enable" in options else 0)


@pytest.mark.parametrize("name", some_by_hand(CASES, "compiled"))
def test_codes_on_the_wire_change_no_bit(name: str, tmp_path: Path) -> None:
    check(*CASES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_codes_on_the_wire_change_no_bit_on_more_meshes(name: str, tmp_path: Path) -> None:
    check(*SLOW[name], tmp_path)


def test_a_head_that_computes_the_loss_some_tokens_at_a_time(tmp_path: Path) -> None:
    """As one process: each rank has one microbatch, two addends have one sum, and nothing is clipped."""
    options = LINEARS | {
        f"{MX}.filter_fqns": "layers.0",
        "training.seq_len": "320",  # as many tokens as rows: the table is gathered, sums are in one order
        "training.global_batch_size": "2",
        "training.max_norm": "0",
        "training.loss_chunk_tokens": "100",
    }
    wanted = on("fsdp1", options, tmp_path)
    for gathered in ({}, gathers(options)):
        actual = on("fsdp2", options | gathered, tmp_path)
        assert actual.losses == pytest.approx(wanted.losses, rel=1e-6)
        for name, grad in wanted.grads.items():
            assert torch.equal(actual.grads[name], grad), name


@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_serves_runs_with_and_without_codes_on_the_wire(before: bool, tmp_path: Path) -> None:
    half = STEPS // 2
    options = LINEARS | {"checkpoint.enable": "true", "checkpoint.interval": str(half)}
    first, second = (options | (gathers(options) if on else {}) for on in (before, not before))
    run_distributed(train, 2, Mesh("fsdp2", tuple(first.items())).arguments(), str(tmp_path), half)
    resumed = on("fsdp2", second, tmp_path)
    whole = from_masters("fsdp2", tuple(FROM_MASTERS.items()))
    assert len(resumed.losses) == STEPS - half
    same_bits(resumed, Run(whole.losses[half:], whole.norms[half:], whole.grads))
