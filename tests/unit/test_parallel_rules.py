"""Meshes that cannot be: each is refused in one line that names the key and says what to change."""

import pytest

from titan_fp8.config.errors import ConfigErrors
from titan_fp8.job_config import load_job_config

PARALLELISM = "parallelism."
MODEL = {
    "model.flavor": "debugmodel",
    "model.overrides.dim": "96",
    "model.overrides.n_heads": "6",
    "model.overrides.n_kv_heads": "3",
    "model.overrides.n_layers": "4",
    "model.overrides.ffn_dim": "96",
    "model.overrides.vocab_size": "324",
    "training.seq_len": "60",
    "training.local_batch_size": "4",
}

CASES = {
    "product": (
        8,
        {"tensor_parallel_degree": 3, "data_parallel_shard_degree": 2},
        "is 8; set tensor_parallel_degree to -1",
    ),
    "product of which one can be inferred": (
        8,
        {"pipeline_parallel_degree": 3, "data_parallel_shard_degree": 2},
        "is 8; set pipeline_parallel_degree to -1",
    ),
    "product of which none can be inferred": (
        8,
        {"pipeline_parallel_degree": 3, "tensor_parallel_degree": 3, "data_parallel_shard_degree": 1},
        "is 8; choose degrees whose product divides 8, and set one to -1",
    ),
    "heads on a mesh that does not fit": (
        2,
        {"tensor_parallel_degree": 4, "data_parallel_shard_degree": 3},
        "attention heads, 6; use 3 or 2",
    ),
    "no divisor": (8, {"tensor_parallel_degree": 3}, "choose a divisor of 8"),
    "two inferred": (4, {"tensor_parallel_degree": -1}, "only one degree can be inferred"),
    "kv heads": (2, {"tensor_parallel_degree": 2}, "key and value heads, 3; use 1"),
    "heads": (4, {"tensor_parallel_degree": 4}, "attention heads, 6; use 3 or 2"),
    "vocabulary": (5, {"tensor_parallel_degree": 5}, "its vocabulary, 324; use 4 or 3"),
    "hidden features": (
        3,
        {"tensor_parallel_degree": 3, "model.overrides.ffn_dim": 100},
        "its feed-forward's hidden features, 100; use 2 or 1",
    ),
    "tokens of validation": (
        2,
        {"tensor_parallel_degree": 2, "model.overrides.n_kv_heads": 2, "validation.enable": True}
        | {"validation.steps": 1, "validation.local_batch_size": 1, "validation.seq_len": 31},
        "make validation.seq_len a multiple of 2",
    ),
    "loss parallel": (1, {"disable_loss_parallel": True}, "no logits are divided"),
    "overlap without ranks": (1, {"enable_async_tensor_parallel": True}, "tensor_parallel_degree is 1; raise it"),
    "overlap without the compiler": (
        2,
        {"tensor_parallel_degree": 2, "enable_async_tensor_parallel": True, "model.overrides.n_kv_heads": 2},
        'set compile.enable = true with "model" in compile.components',
    ),
    "overlap by another compiler": (
        2,
        {"tensor_parallel_degree": 2, "enable_async_tensor_parallel": True, "compile.enable": True}
        | {"compile.backend": "aot_eager"},
        'compile.backend = "inductor"',
    ),
    "chunks of a divided vocabulary": (
        2,
        {"tensor_parallel_degree": 2, "model.overrides.n_kv_heads": 2, "training.loss_chunk_tokens": 64},
        "training.loss_chunk_tokens = 64: parallelism.tensor_parallel_degree divides the logits",
    ),
    "sums of nothing": (
        2,
        {"tensor_parallel_degree": 2, "model.overrides.n_kv_heads": 2, "training.mixed_precision_reduce": "bfloat16"},
        "no gradients are summed over data-parallel ranks; leave it out",
    ),
    "exchange of nothing": (
        2,
        {"tensor_parallel_degree": 2, "model.overrides.n_kv_heads": 2, "fsdp_exchange": "peer_memory"},
        "nothing is sharded, so nothing is exchanged",
    ),
    "exchange by peers in a pipeline": (
        4,
        {"pipeline_parallel_degree": 2, "fsdp_exchange": "peer_memory"},
        "a pipeline gathers more blocks at a time than there are buffers in peer memory",
    ),
    "chunks of a compiled loss": (
        1,
        {"training.loss_chunk_tokens": 64, "compile.enable": True, "compile.components": "loss"},
        'compile.components = ["loss"]: leaves nothing to compile beside training.loss_chunk_tokens; name "model"',
    ),
    "chunks in a pipeline": (
        2,
        {"pipeline_parallel_degree": 2, "training.loss_chunk_tokens": 64},
        "a pipeline computes the loss of a microbatch at a time instead",
    ),
    "sequence": (8, {"context_parallel_degree": 8}, "training.seq_len = 60 is not a multiple of 2 x 8 = 16"),
    "balancer": (
        2,
        {"context_parallel_degree": 2, "context_parallel_load_balancer": "zigzag"},
        'use "headtail", or leave it out',
    ),
    "rotate without ranks": (1, {"context_parallel_rotate_method": "alltoall"}, "context_parallel_degree is 1"),
    "schedule without ranks": (1, {"pipeline_parallel_schedule": "GPipe"}, "pipeline_parallel_degree is 1"),
    "tokens of a microbatch": (
        8,
        {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 4, "training.seq_len": 6},
        "the 6 tokens that are computed at a time",
    ),
    "layers": (8, {"pipeline_parallel_degree": 8}, "layers"),
    "microbatches": (
        2,
        {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 3},
        "pipeline_parallel_microbatch_size",
    ),
    "schedule": (2, {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "1F2B"}, "1F1B"),
    "early step": (2, {"pipeline_parallel_degree": 2, "optimizer.early_step_in_backward": True}, "one gradient"),
    "all-gather without shards": (
        3,
        {"tensor_parallel_degree": 3, "quantize.linear.float8.enable_fsdp_float8_all_gather": True},
        "nothing is sharded",
    ),
}


def test_ranks_of_one_sequence_are_shards_too() -> None:
    options = {"context_parallel_degree": 2, "data_parallel_shard_degree": 1}
    arguments = [f"--{PARALLELISM}{key}={value}" for key, value in options.items()]
    arguments += ["--model.converters=quantize.linear.float8", "--quantize.linear.float8.enable_fsdp_float8_all_gather"]
    job, _ = load_job_config(arguments, {"WORLD_SIZE": "2"})
    assert job.quantize.linear.float8.enable_fsdp_float8_all_gather


OVERLAP = "pipeline_parallel_expert_parallel_overlap"
DEALT_OUT = {"model.name": "qwen3_moe", PARALLELISM + "expert_parallel_degree": "2"}
WITHOUT_PAIRS = {
    "no pipeline": {},
    "a schedule without pairs": {PARALLELISM + "pipeline_parallel_degree": "2", **DEALT_OUT},
    "experts that are not dealt out": {
        PARALLELISM + "pipeline_parallel_degree": "2",
        PARALLELISM + "pipeline_parallel_schedule": "DualPipeV",
    },
}


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("name", WITHOUT_PAIRS)
def test_whether_pairs_of_passes_overlap_may_be_said_where_there_are_none(name: str, value: str) -> None:
    options = {"model.flavor": "debugmodel", "training.local_batch_size": "4", **WITHOUT_PAIRS[name]}
    arguments = [f"--{key}={each}" for key, each in options.items()]
    job, _ = load_job_config([*arguments, f"--{PARALLELISM}{OVERLAP}={value}"], {"WORLD_SIZE": "4"})
    assert getattr(job.parallelism, OVERLAP) == (value == "true")


@pytest.mark.parametrize("degree", ["expert_parallel_degree", "tensor_parallel_degree"])
def test_a_memory_budget_is_refused_where_experts_are_not_compiled_with_the_rest(degree: str) -> None:
    arguments = ["--model.name=qwen3_moe", "--model.flavor=debugmodel", "--compile.enable"]
    arguments += ["--activation_checkpoint.mode=memory_budget"]
    load_job_config(arguments, {"WORLD_SIZE": "2"})
    with pytest.raises(ConfigErrors, match=f'"memory_budget" is for.*{degree} = 2; set it to "full"'):
        load_job_config([*arguments, f"--{PARALLELISM}{degree}=2"], {"WORLD_SIZE": "2"})


@pytest.mark.parametrize("name", CASES)
def test_an_impossible_mesh_is_refused_with_a_remedy(name: str) -> None:
    ranks, options, words = CASES[name]
    given = {key if "." in key else PARALLELISM + key: str(value) for key, value in options.items()}
    float8 = {"model.converters": "quantize.linear.float8"} if any("float8" in key for key in given) else {}
    arguments = [f"--{key}={value}" for key, value in {**MODEL, **float8, **given}.items()]
    with pytest.raises(ConfigErrors) as caught:
        load_job_config(arguments, {"WORLD_SIZE": str(ranks)})
    lines = [str(violation) for violation in caught.value.violations]
    assert any(words in line for line in lines), lines
    assert all("\n" not in line for line in lines)
