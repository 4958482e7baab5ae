"""torchtitan's trainer on a flavor with another number of layers and codes; `bench_peers.py` starts it.

    torchrun ... launch.py --layers 8 --vocab-size 128256 -- OPTIONS     options are torchtitan's own
    python launch.py --check                                             versions and GPUs as JSON, in the last line

With `--model llama4/17bx16e` another one than Llama 3 8B. torchao 0.17 has given the configuration of its float8
experts another name than the one by which torchtitan 0.2.2 asks for it: it gets that one too.

Needs torchtitan 0.2.2 and torchao 0.17.0 on the path, and nothing of titan_fp8.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import platform
import runpy
import sys

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


def train(model: str, layers: int, vocab_size: int, options: list[str]) -> None:
    """Run the trainer as `torchrun -m torchtitan.train` would, with the flavor `FLAVOR` beside its own."""
    # torchtitan.config reads the command line when it is imported.
    sys.argv[1:] = options
    family, _, flavor = model.partition("/")
    flavors = getattr(importlib.import_module(f"torchtitan.models.{family}"), f"{family}_args")
    flavors[FLAVOR] = dataclasses.replace(flavors[flavor], n_layers=layers, vocab_size=vocab_size)
    if family != "llama3":
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
    parser.add_argument("options", nargs="*", help="torchtitan's options, after `--`")
    args = parser.parse_args()
    if args.check:
        check()
    else:
        train(args.model, args.layers, args.vocab_size, args.options)


if __name__ == "__main__":
    main()
