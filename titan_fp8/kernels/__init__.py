"""Kernels: one folder a family, each with `reference.py` (plain PyTorch, the specification), `kernel.py` (Triton) and
an `__init__.py` that chooses between them by device. Nothing here knows about modules, autograd or configuration.
"""
