"""Which dimension of each weight can be divided over ranks, so that a block needs two exchanges a pass.

Column: by output features; each rank then has some of the heads, or of the hidden features. Row: by input features, of
which the column-parallel linears before it have left each rank those it needs. Source: arXiv 1909.08053.
"""

COLUMN = ("wq", "wk", "wv", "w1", "w3", "output")
ROW = ("wo", "w2")
READERS = {"attention": ("wq", "wk", "wv"), "feed_forward": ("w1", "w3")}
"""Module of a block -> those of its linears that read its input."""


def local_dims(name: str, out_features: int, in_features: int, ranks: int) -> tuple[int, int]:
    """(N, K) of the part of a linear that one of `ranks` ranks multiplies; `name` may be dotted.

    Raises:
        ValueError: the ranks do not divide the dimension, or the name is none of the above.
    """
    last = name.rpartition(".")[2]
    if last not in COLUMN + ROW:
        raise ValueError(f"{name} cannot be divided over ranks: it is none of {', '.join(COLUMN + ROW)}")
    divided = out_features if last in COLUMN else in_features
    if divided % ranks:
        raise ValueError(f"{name} has {divided} features to divide over {ranks} ranks, which do not divide them")
    return (out_features // ranks, in_features) if last in COLUMN else (out_features, in_features // ranks)
