"""The rule `auto_filter_small_kn`: linears and experts that are faster left in bf16, by their dimensions.

Casting costs bytes and a product saves time, so what decides is K in features, N out features and the recipe; the
number of tokens matters little once it is large. The thresholds are data, measured with the microbenchmark
layer norm -> linear -> sigmoid, forward and backward (`scripts/bench_filter.py`; its figures stand in
`docs/benchmarks.md`), and each row says where. Experts have a rule of their own, by their features and hidden features:
what is timed is the feed-forward of all of a layer's experts (`scripts/bench_grouped.py --grid`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeRule:
    """Which linears of one recipe, or which experts, gain nothing.

    Attributes:
        corners: (largest K, largest N) pairs; None means any. What lies within one of them is too small.
        measured_on: the device, and the mode of both sides.
        names: of the two dimensions.
    """

    corners: tuple[tuple[int | None, int | None], ...]
    measured_on: str
    names: tuple[str, str] = ("K", "N")

    def covers(self, k: int, n: int) -> bool:
        """Whether these dimensions are too small."""
        return any(
            (largest_k is None or k <= largest_k) and (largest_n is None or n <= largest_n)
            for largest_k, largest_n in self.corners
        )

    def in_words(self) -> str:
        """Like `K <= 512, or (K <= 1024 and N <= 4096)`."""
        bounds = [
            " and ".join(f"{name} <= {size}" for name, size in zip(self.names, corner, strict=True) if size is not None)
            for corner in self.corners
        ]
        return ", or ".join(f"({b})" if " and " in b and len(bounds) > 1 else b for b in bounds)


_MEASURED = SizeRule(((512, None), (1024, 4096), (2048, 2048), (4096, 1024), (None, 512)), "H100, eager")

SIZE_RULES: dict[str, SizeRule] = dict.fromkeys(("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"), _MEASURED)
"""Recipe -> what is too small for it."""

EXPERTS_RULE = SizeRule(((768, None), (None, 768)), "H200, eager", names=("K", "H"))
"""The table of experts: which are too small for float8, by features K and hidden features H."""


def is_too_small(recipe_name: str, in_features: int, out_features: int, dim_multiple: int = 16) -> bool:
    """Whether a linear of these dimensions is faster left in bf16, or cannot be converted at all.

    Args:
        recipe_name: one of `SIZE_RULES`.
        in_features, out_features: K and N of the product that runs, which after tensor parallelism is a part.
        dim_multiple: what the recipe needs K and N to be multiples of.
    """
    if in_features % dim_multiple or out_features % dim_multiple:
        return True
    return SIZE_RULES[recipe_name].covers(in_features, out_features)


def experts_are_too_small(features: int, hidden: int, dim_multiple: int = 16) -> bool:
    """Whether experts of these dimensions are faster left in bf16, or cannot be converted at all.

    Args:
        features, hidden: K and H of an expert, of which tensor parallelism may leave a rank a part of H.
        dim_multiple: what float8 needs them to be multiples of.
    """
    return bool(features % dim_multiple or hidden % dim_multiple) or EXPERTS_RULE.covers(features, hidden)
