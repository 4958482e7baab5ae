"""The rule `auto_filter_small_kn`: linears that are faster left in bf16, by their dimensions.

Casting costs bytes and a product saves time, so what decides is K in features, N out features and the recipe; the
number of tokens matters little once it is large. The thresholds are data, measured with the microbenchmark
layer norm -> linear -> sigmoid, forward and backward (`scripts/bench_filter.py`; its figures stand in
`docs/benchmarks.md`), and each row says where.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeRule:
    """Which linears of one recipe gain nothing.

    Attributes:
        corners: (largest K, largest N) pairs; None means any. A linear that lies within one of them is too small.
        measured_on: the device, and the mode of both sides.
    """

    corners: tuple[tuple[int | None, int | None], ...]
    measured_on: str

    def in_words(self) -> str:
        """Like `K <= 512, or (K <= 1024 and N <= 4096)`."""
        bounds = [
            " and ".join(f"{name} <= {size}" for name, size in (("K", k), ("N", n)) if size is not None)
            for k, n in self.corners
        ]
        return ", or ".join(f"({b})" if " and " in b and len(bounds) > 1 else b for b in bounds)


_MEASURED = SizeRule(((512, None), (1024, 4096), (2048, 2048), (4096, 1024), (None, 512)), "H100, eager")

SIZE_RULES: dict[str, SizeRule] = dict.fromkeys(("tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"), _MEASURED)
"""Recipe -> what is too small for it."""


def is_too_small(recipe_name: str, in_features: int, out_features: int, dim_multiple: int = 16) -> bool:
    """Whether a linear of these dimensions is faster left in bf16, or cannot be converted at all.

    Args:
        recipe_name: one of `SIZE_RULES`.
        in_features, out_features: K and N of the product that runs, which after tensor parallelism is a part.
        dim_multiple: what the recipe needs K and N to be multiples of.
    """
    if in_features % dim_multiple or out_features % dim_multiple:
        return True
    corners = SIZE_RULES[recipe_name].corners
    return any((k is None or in_features <= k) and (n is None or out_features <= n) for k, n in corners)
