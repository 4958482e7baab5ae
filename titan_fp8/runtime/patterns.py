"""Patterns of dotted names, which say which modules or tensors are meant."""

import re


def matches(pattern: str, name: str) -> bool:
    """Whether the components of `pattern` stand as one contiguous run in those of `name`.

    `*` stands for any characters within one component; no other character is special. `layers.1` matches
    `model.layers.1.attention` and never `layers.10`.
    """
    wanted = [re.compile(re.escape(part).replace(r"\*", ".*")) for part in pattern.split(".")]
    parts = name.split(".")
    return any(
        all(expression.fullmatch(part) for expression, part in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )
