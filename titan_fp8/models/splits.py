"""Which dimension of each weight can be divided over ranks, so that a block needs two exchanges a pass.

Column: by output features; each rank then has some of the heads, or of the hidden features. Row: by input features, of
which the column-parallel linears before it have left each rank those it needs. Source: arXiv 1909.08053.
"""

COLUMN = ("wq", "wk", "wv", "w1", "w3", "output")
ROW = ("wo", "w2")
READERS = {"attention": ("wq", "wk", "wv"), "feed_forward": ("w1", "w3")}
"""Module of a block -> those of its linears that read its input."""


def division_problem(name: str, out_features: int, in_features: int, ranks: int) -> str | None:
    """Why a linear cannot be divided over `ranks` ranks, with the remedy, or None if it can; `name` may be dotted."""
    if ranks == 1:
        return None
    degree, last = f"parallelism.tensor_parallel_degree = {ranks}", name.rpartition(".")[2]
    if last not in COLUMN + ROW:
        return (
            f"{name}: {degree} divides linears by their names, {', '.join(COLUMN)} by output features and "
            f"{', '.join(ROW)} by input features, and {last} is none of them; rename it, or set the degree to 1"
        )
    dim, size = ("out_features", out_features) if last in COLUMN else ("in_features", in_features)
    if size % ranks:
        return f"{name}: {dim}={size} is not a multiple of {degree}; change one of them"
    return None


def local_dims(name: str, out_features: int, in_features: int, ranks: int) -> tuple[int, int]:
    """(N, K) of the part of a linear that one of `ranks` ranks multiplies: a linear without a `division_problem`."""
    assert division_problem(name, out_features, in_features, ranks) is None
    if ranks == 1:
        return out_features, in_features
    by_output = name.rpartition(".")[2] in COLUMN
    return (out_features // ranks, in_features) if by_output else (out_features, in_features // ranks)
