"""Quantized training: recipes, the custom ops, the three matrix products of a linear layer and the module around them.

Read in this order: `recipes.py` (what is computed in which format), `ops.py` (the operators that eager and compiled
code share), `gemm.py` (the scaled product, native and emulated), `casts.py` (a recipe's operands), `function.py`
(forward and backward of a linear), `linear.py`. Then what spares casts and bytes: `activation.py` (one cast for all
readers), `weights.py` (one cast a step), `norm.py` and `gated.py` (producers that write float8), `shared_input.py` (one
function for the readers of an input), `later_columns.py` (layouts made in backward), `graph_pass.py` (none that nobody
reads); and for FSDP `shard_cast.py`, `shardable.py`, `sharded_weight.py`, `gathered_weight.py`, `fsdp_weight.py`.
MXFP8 has `mx_ops.py`, `mx_linear.py` and `mx_grouped.py`; `mx_weight.py` says where weights come from, `mx_sharded.py`
what FSDP gathers of them, and `mx_chunked_head.py` is an output layer with its loss.
"""
