"""Tensor parallelism of the families with experts and with latent attention: losses and gradients of one process.

The models have what their families have, at the size of a test. A step has four sequences, each a microbatch of its
own, in one process and on every mesh; ranks of `tp` have the same sequences and other tokens of them, so that even the
auxiliary loss and the scales of float8 experts are those of the same tokens.
"""

from pathlib import Path

import pytest

from tests.distributed.test_expert_parallel import ALL_IN_FLOAT8, BATCH, Options, _train, alone_with, on_with
from tests.distributed.test_mesh_matrix import FLOAT8_CODES, HIGH_PRECISION, assert_same

STEPS = 3
COMMON = "dim=64 n_layers=2 n_heads=4 vocab_size=320 ffn_dim=64 moe_ffn_dim=32 n_experts=4"
FAMILIES = {
    "llama4": "n_kv_heads=2 head_dim=16 top_k=1 nope_interval=2",
}
