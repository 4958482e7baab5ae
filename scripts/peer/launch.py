"""torchtitan's trainer on a flavor with another number of layers and codes; `bench_peers.py` starts it.

    torchrun ... launch.py --layers 8 --vocab-size 128256 -- OPTIONS     options are torchtitan's own
    python launch.py --check                                             versions and GPUs as JSON, in the last line

With `--model llama4/17bx16e` another one than Llama 3 8B. torchao 0.17 has given the configuration of its float8
experts another name than the one by which torchtitan 0.2.2 asks for it: it gets that one too. With `--same-start
llama3/8B --data TOKENS --tokenizer DIR` it begins with the weights that this model of ours gets from `--seed`, and
reads our token shards (`same_start.py`).

Needs torchtitan 0.2.2 and torchao 0.17.0 on the path, and of titan_fp8 something with `--same-start` alone.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import runpy
import sys
from pathlib import Path

FLAVOR = "cut"
MODULES = ("torchtitan.train", "torchao.float8")
"""What a float8 run imports sooner or later."""
PACKAGES = ("torch", "triton", "torchtitan", "torchao")


def check() -> None:
    """Import the trainer, and print what a figure must be quoted with."""
    import torch

    for module in MODULES:
        importlib.import_module(module)
    found = {name: version for name in PACKAGES if (version := _version(name))}
    found |= {"python": platform.python_version()}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(json.dumps({"versions": found, "devices": devices}))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hide_other_cutlass() -> None:
    """torchao takes every CUTLASS that is installed for the one that it was written with, and ends where one of another
    version, which flash-attn-4 brings, lacks a module. It needs none on this GPU, and looks whether there is one."""
    spec = importlib.util.find_spec("cutlass")
    folders = [] if spec is None else spec.submodule_search_locations or []
    if not any(list(Path(folder).glob("base_dsl/_mlir_helpers*")) for folder in folders):
        sys.modules["cutlass"] = None  # what says that it cannot be imported


def _trace_device_alone() -> None:
    """Have torchtitan's profiler record kernels and their launches alone, as ours does then."""
    profiler = importlib.import_module("torch.profiler")
    whole = profiler.profile

    def profile(**options: object) -> object:
        device = {"activities": [profiler.ProfilerActivity.CUDA], "record_shapes": False}
        return whole(**{**options, **device})

    profiler.profile = profile


def train(args: argparse.Namespace) -> None:
    """Run the trainer as `torchrun -m torchtitan.train` would, with the flavor `FLAVOR` beside its own."""
    # torchtitan.config reads the command line when it is imported.
    sys.argv[1:] = args.options
    if args.device_trace:
        _trace_device_alone()
    family, _, flavor = args.model.partition("/")
    module = importlib.import_module(f"torchtitan.models.{family}")
    flavors = getattr(module, f"{family}_args")
    flavors[FLAVOR] = dataclasses.replace(flavors[flavor], n_layers=args.layers, vocab_size=args.vocab_size)
    if args.same_start:
        scripts = Path(__file__).resolve().parents[1]
        sys.path += [str(scripts), str(scripts.parent)]  # last, so that nothing of the peer's is hidden
        spec = importlib.import_module("peer.same_start").same_start(module.get_train_spec(), args)
        importlib.import_module("torchtitan.protocols.train_spec").register_train_spec(family, spec)
    if family != "llama3":
        _hide_other_cutlass()
        conversion = importlib.import_module("torchao.prototype.moe_training.conversion_utils")
        config = importlib.import_module("torchao.prototype.moe_training.config")
        conversion.MoETrainingConfig = config.Float8TrainingOpConfig
    runpy.run_module("torchtitan.train", run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="import the trainer and print versions and GPUs")
    parser.add_argument("--model", default="llama3/8B", help="FAMILY/FLAVOR (default: llama3/8B)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--same-start", help="FAMILY/FLAVOR of our model that it starts like")
    parser.add_argument("--seed", type=int, default=0, help="of our weights (default: 0)")
    parser.add_argument("--data", help="token shards that it reads then")
    parser.add_argument("--tokenizer", help="folder of the tokenizer that they were written with")
    parser.add_argument("--device-trace", action="store_true", help="its profiler traces the device alone")
    parser.add_argument("options", nargs="*", help="torchtitan's options, after `--`")
    args = parser.parse_args()
    if args.check:
        check()
    else:
        train(args)


if __name__ == "__main__":
    main()
