"""Speed of the attention backends at Llama 8B's heads: causal, bf16, 32 query and 8 key heads of 128 features.

    python scripts/bench_attention.py                               # 2 and 1 sequences of 8192, every backend that runs
    python scripts/bench_attention.py --backends cudnn,flash4

TFLOP/s counts the half of the products that causality leaves: 2 B H S^2 D forward, 2.5 times that backward. Each figure
is the median of `--repeats` timings with device events; two rounds show how far a device that gets warm slows down.
"""

import argparse

import torch
from bench_casts import Timer
from torch import Tensor

from titan_fp8.models.attention_backends import (
    BACKENDS,
    AttentionTask,
    attention_mask,
    causal_attention,
    resolve_backend,
)
from titan_fp8.runtime.device import detect_device
from titan_fp8.runtime.errors import UserError

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def main() -> None:
    """Print a line for each batch, backend and round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(name for name in BACKENDS if name != "math"))
    parser.add_argument("--batches", default="2,1", help="sequences")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    device = detect_device()
    print(f"{device.name}, torch {torch.__version__}")
    for batch in map(int, args.batches.split(",")):
        for backend in args.backends.split(","):
            try:
                resolve_backend(backend, AttentionTask(device, torch.bfloat16, HEAD_DIM))
            except UserError as error:
                print(f"{backend}: {error}")
                continue
            for _ in range(2):
                print(f"batch {batch}, {backend}: {measured(backend, batch, args.seq_len, Timer(args.repeats))}")


def measured(backend: str, batch: int, seq_len: int, timer: Timer) -> str:
    """Milliseconds and TFLOP/s of both passes."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (batch, seq_len, heads, HEAD_DIM)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)

    q, k, v = (random(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS))
    mask = attention_mask(backend, seq_len, q.device, None)
    output, grad = causal_attention(q, k, v, backend=backend, mask=mask), random(HEADS)
    forward = timer(lambda: causal_attention(q, k, v, backend=backend, mask=mask))
    backward = timer(lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True))
    flops = 2 * batch * HEADS * seq_len**2 * HEAD_DIM
    passes = (("forward", forward, flops), ("backward", backward, 2.5 * flops))
    return ", ".join(f"{name} {1e3 * seconds:.3f} ms ({work / seconds / 1e12:.0f})" for name, seconds, work in passes)


if __name__ == "__main__":
    main()
