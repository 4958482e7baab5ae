"""Which dimension of each weight can be divided over ranks, so that a block needs few exchanges a pass.

Column: by output features; each rank then has some of the heads, or of the hidden features. Row: by input features, of
which the column-parallel linears before it have left each rank those it needs. Source: arXiv 1909.08053.

Whole: each rank has all of the weight and multiplies its own tokens. These are linears from the stream to something
narrow, an expert's score or a latent vector. Dividing their few output features would gather the stream to save
little: their outputs are gathered instead, if at all.
"""

from typing import Any

COLUMN = ("wq", "wk", "wv", "wq_b", "wkv_b", "w1", "w3", "output")
ROW = ("wo", "w2")
WHOLE = ("wq_a", "wkv_a", "router.gate")
LATENT_READERS = ("wq", "wq_b", "wkv_b")
"""Linears of latent attention that need all tokens. Each reads something else, and is given it by itself."""


def way_of(name: str) -> str | None:
    """`column`, `row` or `whole`, by the last components of a linear's dotted name; None: there is no rule for it."""
    for way, names in (("column", COLUMN), ("row", ROW), ("whole", WHOLE)):
        if any(f".{name}".endswith(f".{known}") for known in names):
            return way
    return None


def readers_of(block: Any) -> dict[str, tuple[str, ...]]:
    """The modules of a block whose input is gathered over ranks, by dotted name -> those of its linears that read it;
    none where it is that linear itself."""
    gathered: dict[str, tuple[str, ...]] = {}
    if hasattr(block.attention, "wkv_b"):
        present = [name for name in LATENT_READERS if getattr(block.attention, name, None) is not None]
        gathered |= {f"attention.{name}": () for name in present}
    else:
        gathered["attention"] = ("wq", "wk", "wv")
    if block.feed_forward is not None:
        gathered["feed_forward"] = ("w1", "w3")
    elif block.moe.shared_experts is not None:
        gathered["moe.shared_experts"] = ("w1", "w3")
    return gathered


def division_problem(name: str, out_features: int, in_features: int, ranks: int) -> str | None:
    """Why a linear cannot be divided over `ranks` ranks, with the remedy, or None if it can; `name` may be dotted."""
    if ranks == 1:
        return None
    degree, way = f"parallelism.tensor_parallel_degree = {ranks}", way_of(name)
    if way is None:
        return (
            f"{name}: {degree} divides linears by their names, {', '.join(COLUMN)} by output features and "
            f"{', '.join(ROW)} by input features, and {name.rpartition('.')[2]} is none of them; rename it, or set the "
            "degree to 1"
        )
    if way == "whole":
        return None
    dim, size = ("out_features", out_features) if way == "column" else ("in_features", in_features)
    if size % ranks:
        return f"{name}: {dim}={size} is not a multiple of {degree}; change one of them"
    return None


def local_dims(name: str, out_features: int, in_features: int, ranks: int) -> tuple[int, int]:
    """(N, K) of the part of a linear that one of `ranks` ranks multiplies: a linear without a `division_problem`."""
    assert division_problem(name, out_features, in_features, ranks) is None
    way = None if ranks == 1 else way_of(name)
    if way == "column":
        return out_features // ranks, in_features
    return (out_features, in_features // ranks) if way == "row" else (out_features, in_features)
