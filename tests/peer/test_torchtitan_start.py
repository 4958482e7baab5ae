"""With the weights and the sequences of ours, torchtitan computes the same losses as we do."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.peer.titan_on_cpu import count_integers
from tests.tolerances import TRANSFORMERS_RELATIVE_ERROR, relative_error
from titan_fp8.cli import prepare
from titan_fp8.models import initialize, resolve_dims
from titan_fp8.models.decoder import Decoder

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.peer

REPO = Path(__file__).parents[2]
SIZES = {"n_layers": 3, "vocab_size": 512, "max_seq_len": 64}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Ours, its dimensions, and those of the peer's, where they have other names.
    "llama3/8B": ("llama3/8B", {"dim": 256, "n_heads": 8, "n_kv_heads": 4}, {}),
    "llama4/17bx16e": (
        "llama4/17bx16e",
        {"dim": 320, "n_heads": 10, "n_kv_heads": 2, "head_dim": 32, "moe_ffn_dim": 512},
        {"multiple_of": 64},
    ),
    "qwen3/30B-A3B": (
        "qwen3_moe/30B-A3B",
        {"dim": 256, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "moe_ffn_dim": 64},
        {"head_dim": 64, "moe_inter_dim": 64},
    ),
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO / "scripts")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # torchtitan.config reads them when it is imported
    monkeypatch.setattr(torch, "histc", torch.histc)
    count_integers()


def models(name: str) -> tuple[Decoder, Any]:
    """Ours and the peer's, on the meta device; ours as `--same-start` has it."""
    ours, dimensions, other_names = MODELS[name]
    as_theirs = importlib.import_module("peer.jobs")._AS_THEIRS.get(ours.partition("/")[0], {})
    as_theirs = {key.removeprefix("model.overrides."): value for key, value in as_theirs.items()}
    dims = resolve_dims(*ours.split("/"), SIZES | dimensions | as_theirs)
    family, flavor = name.split("/")
    spec = importlib.import_module(f"torchtitan.models.{family}").get_train_spec()
    theirs = {key: dimensions[key] for key in ("dim", "n_heads", "n_kv_heads")} | other_names
    args = dataclasses.replace(spec.model_args[flavor], **SIZES, **theirs)
    if hasattr(args, "moe_args"):
        args = dataclasses.replace(args, moe_args=dataclasses.replace(args.moe_args, use_grouped_mm=False))
    start = importlib.import_module("peer.same_start")
    model_cls = start.with_our_weights(spec.model_cls, dims, 0, halves=ours.partition("/")[0] in start.HALVES)
    with torch.device("meta"):
        return Decoder(dims, attention_backend="math"), model_cls(args)


def start(ours: Decoder, theirs: Any) -> None:
    for model in (ours, theirs):
        model.to_empty(device="cpu")
    initialize(ours, seed=0)
    with torch.no_grad():
        theirs.init_weights(buffer_device=None)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_same_to_fp32s_rounding(scripts, name):
    ours, theirs = models(name)
    start(ours, theirs)
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    mine, peers = (model(tokens) for model in (ours, theirs))
    torch.testing.assert_close(mine, peers, rtol=0, atol=2e-5)
    for logits in (mine, peers):
        logits.logsumexp(-1).square().mean().backward()
    expected = dict(theirs.named_parameters())
    module = importlib.import_module("peer.same_start")
    for key, parameter in ours.named_parameters():
        grad, wanted = parameter.grad, expected[key].grad
        assert grad is not None
        assert wanted is not None
        if name.startswith("qwen3") and key.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm"):
            grad = module.halves_first(grad, ours.dims.head_width)
        assert relative_error(grad, wanted) < TRANSFORMERS_RELATIVE_ERROR, key


def test_weights_that_torchao_has_wrapped_are_filled_too(scripts):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig
    from torchao.quantization.quant_api import quantize_

    ours, theirs = models("llama4/17bx16e")
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    convert_to_float8_training(theirs, config=config, module_filter_fn=lambda _, name: ".w" in name)
    quantize_(theirs, Float8TrainingOpConfig(), filter_fn=lambda _, name: name.endswith(".experts"))
    assert type(theirs.layers["0"].attention.wq.weight.data).__name__ == "WeightWithDynamicFloat8CastTensor"
    assert type(theirs.layers["0"].moe.experts.w1.data).__name__ == "Float8TrainingWeightWrapperTensor"
    start(ours, theirs)
    expected = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        inside = [getattr(parameter.data, key, None) for key in ("_tensor", "_data")]
        values = next((tensor for tensor in inside if tensor is not None), parameter)
        assert torch.equal(values, expected[name]), name


TRAINING = {
    "model.name": "llama3",
    "optimizer.implementation": "foreach",
    "optimizer.lr": 1e-3,
    "lr_scheduler.warmup_steps": 5,
    "training.steps": 5,
    "training.seq_len": 64,
    "training.local_batch_size": 2,
    "training.global_batch_size": 8,
    "training.mixed_precision_param": "float32",
    "parallelism.data_parallel_shard_degree": -1,
    "activation_checkpoint.mode": "none",
    "metrics.log_freq": 1,
    "debug.seed": 0,
}


def test_the_peers_trainer_reports_the_losses_of_ours_on_two_ranks(tmp_path):
    tokenizer, data = tmp_path / "tokenizer", tmp_path / "data"
    write_tokens(tokenizer, data)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path[1:]])}
    ours = {
        "job.dump_folder": tmp_path / "ours",
        "model.flavor": "debugmodel",
        "model.hf_assets_path": tokenizer,
        "model.overrides.n_layers": 2,
        "model.overrides.vocab_size": 320,
        "model.converters": "",
        "training.dataset": "tokens",
        "training.dataset_path": data,
        "training.shuffle": "false",
    }
    config = {"CONFIG_FILE": str(REPO / "train_configs" / "llama3_8b.toml"), "NGPU": "2"}
    run(["./run_train.sh", *options(TRAINING | ours)], environment | config)
    lines = (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()
    expected = [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    torchrun += ["--rdzv_endpoint=localhost:0", "--local-ranks-filter=0"]
    launcher = [str(Path(__file__).with_name("titan_on_cpu.py")), str(REPO / "scripts" / "peer" / "launch.py")]
    launcher += ["--model=llama3/debugmodel", "--same-start=llama3/debugmodel", "--layers=2", "--vocab-size=320"]
    launcher += [f"--data={data}", f"--tokenizer={tokenizer}", "--"]
    theirs = {"job.dump_folder": tmp_path / "peer", "model.flavor": "cut"}
    flags = ["--metrics.disable_color_printing"]
    log = run([*torchrun, *launcher, *options(TRAINING | theirs), *flags], environment | {"PYTHONSAFEPATH": "1"})
    found = [(float(a), float(b)) for a, b in re.findall(r"step: +\d+ +loss: +(\S+) +grad_norm: +(\S+)", log)]
    assert len(found) == len(expected) == 5
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-4, atol=0)


def options(values: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


def write_tokens(tokenizer: Path, data: Path) -> None:
    """Shards of a few documents and a tokenizer with a code a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: code for code, letter in enumerate(["<e>", *letters])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<e>"])
    tokenizer.mkdir()
    model.save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    text = data.with_suffix(".jsonl")
    documents = (f"Document {n} says {n**7} and {'x' * (n % 90)}." for n in range(200))
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    options = {"--input": text, "--output": data, "--tokenizer": tokenizer, "--num-workers": 0, "--hold-out-every": 0}
    prepare.main([str(part) for pair in options.items() for part in pair])


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
