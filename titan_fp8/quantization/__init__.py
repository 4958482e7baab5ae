"""Quantized training: recipes, the custom ops, the three matrix products of a linear layer and the module around them.

Read in this order: `recipes.py` (what is computed in which format), `ops.py` (the operators that eager and compiled
code share), `gemm.py` (the scaled product, native and emulated), `function.py` (forward and backward of a linear),
`linear.py`.
"""
