"""The dimensions of every model, as a table without torch: the configuration reads it before anything heavy starts.

A *family* (`llama3`) is an architecture; a *flavor* (`8B`) is one set of dimensions for it. Both are data here: there
is one decoder (`titan_fp8.models.decoder`), and `ModelDims` is all it needs to know. From the dimensions alone follow
the number of parameters (`count_parameters`) and the arithmetic of a training step (`flops_per_token`), which is what
MFU is measured against.

    resolve_dims("llama3", "8B", {"n_layers": 8})      # the 8B model, cut to 8 of its 32 layers

Sources of the figures: the Llama 3 paper (arXiv 2407.21783, table 3) and the published configurations of Llama 3.1
(8B, 70B, 405B) and Llama 3.2 (1B, 3B); `debugmodel` has the dimensions of torchtitan's flavor of that name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies to a longer context (see `titan_fp8.models.rope`)."""

    factor: float
    """Rotations slower than the low-frequency bound are slowed down by this factor."""
    low_freq_factor: float
    """Wavelengths above `original_max_position / low_freq_factor` are stretched in full."""
    high_freq_factor: float
    """Wavelengths below `original_max_position / high_freq_factor` are left alone; between the bounds it is blended."""
    original_max_position: int
    """Context length, in tokens, that the model was first trained for."""


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a decoder; each can be set as `model.overrides.FIELD`. An inconsistent set is a `UserError`."""

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Number of transformer blocks."""
    n_heads: int
    """Number of query heads; `dim` is a multiple of it."""
    n_kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention); unset: as many as query heads."""
    vocab_size: int = 128256
    """Rows of the embedding table and of the output head."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward; unset: 8/3 `dim` times `ffn_dim_multiplier`, rounded up to `multiple_of`."""
    multiple_of: int = 256
    """The derived feed-forward width is a multiple of this."""
    ffn_dim_multiplier: float | None = None
    """Factor on the derived feed-forward width; unset: 1."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 500000.0
    """Base of the rotary wavelengths."""
    rope_scaling_factor: float = 1.0
    """Llama 3.1's frequency scaling; 1: unscaled."""
    rope_low_freq_factor: float = 1.0
    """Lower bound of the frequency scaling, see `RopeScaling`."""
    rope_high_freq_factor: float = 4.0
    """Upper bound of the frequency scaling, see `RopeScaling`."""
    rope_original_max_position: int = 8192
    """Context length in tokens before frequency scaling."""
    max_seq_len: int = 131072
    """Longest sequence, in tokens, that the model accepts."""
    tied_embeddings: bool = False
    """The output head uses the embedding table as its weight."""

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise UserError("\n".join(problems))

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, `n_heads` where `n_kv_heads` is unset."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_hidden_dim(self) -> int:
        """Width between `w1`/`w3` and `w2`. The derived width follows the original Llama code, truncations included."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """The frequency scaling, or None where its factor is 1."""
        if self.rope_scaling_factor == 1.0:
            return None
        return RopeScaling(
            self.rope_scaling_factor,
            self.rope_low_freq_factor,
            self.rope_high_freq_factor,
            self.rope_original_max_position,
        )


def _problems(dims: ModelDims) -> list[str]:
    """Every rule that the dimensions break, one message each."""
    found = []
    for field in fields(dims):
        value = getattr(dims, field.name)
        if value is not None and not isinstance(value, bool) and not value > 0:
            found.append(f"model.overrides.{field.name} = {value}: must be greater than 0")
    if found:  # the rules below divide by these numbers
        return found
    if dims.dim % dims.n_heads:
        found.append(
            f"model.overrides: dim {dims.dim} is not a multiple of n_heads {dims.n_heads}; "
            "every head has dim / n_heads features"
        )
    elif dims.head_dim % 2:
        found.append(
            f"model.overrides: head width dim / n_heads = {dims.head_dim} is odd; "
            "rotary embeddings turn pairs of features, so change dim or n_heads"
        )
    if dims.n_heads % dims.kv_heads:
        found.append(
            f"model.overrides: n_heads {dims.n_heads} is not a multiple of n_kv_heads {dims.kv_heads}; "
            "every key/value head serves the same number of query heads"
        )
    if dims.rope_high_freq_factor <= dims.rope_low_freq_factor:
        found.append(
            f"model.overrides: rope_high_freq_factor {dims.rope_high_freq_factor} must be greater than "
            f"rope_low_freq_factor {dims.rope_low_freq_factor}"
        )
    return found


FLAVORS: dict[str, dict[str, ModelDims]] = {
    "llama3": {
        "debugmodel": ModelDims(dim=256, n_layers=6, n_heads=16, vocab_size=2048, rope_scaling_factor=8.0),
        "1B": ModelDims(
            dim=2048,
            n_layers=16,
            n_heads=32,
            n_kv_heads=8,
            ffn_dim_multiplier=1.5,
            rope_scaling_factor=32.0,
            tied_embeddings=True,
        ),
        "3B": ModelDims(
            dim=3072,
            n_layers=28,
            n_heads=24,
            n_kv_heads=8,
            ffn_dim_multiplier=1.0,
            rope_scaling_factor=32.0,
            tied_embeddings=True,
        ),
        "8B": ModelDims(
            dim=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            ffn_dim_multiplier=1.3,
            multiple_of=1024,
            rope_scaling_factor=8.0,
        ),
        "70B": ModelDims(
            dim=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            ffn_dim_multiplier=1.3,
            multiple_of=4096,
            rope_scaling_factor=8.0,
        ),
        "405B": ModelDims(
            dim=16384,
            n_layers=126,
            n_heads=128,
            n_kv_heads=8,
            ffn_dim_multiplier=1.2,
            multiple_of=4096,
            rope_scaling_factor=8.0,
        ),
    },
}
"""Family -> flavor -> dimensions."""


def resolve_dims(name: str, flavor: str, overrides: Mapping[str, Any] | None = None) -> ModelDims:
    """The dimensions of `name`/`flavor` with `overrides` applied.

    Args:
        name: a family, e.g. `"llama3"` (`model.name`).
        flavor: a flavor of that family, e.g. `"8B"` (`model.flavor`).
        overrides: fields of `ModelDims` to replace; a value of None leaves the flavor's.

    Raises:
        UserError: an unknown family, flavor or field (with the nearest name), or dimensions that do not fit together;
            in the latter case every broken rule is named.
    """
    if name not in FLAVORS:
        raise UserError(f'model.name = "{name}": not one of {", ".join(FLAVORS)}{did_you_mean(name, FLAVORS)}')
    flavors = FLAVORS[name]
    if flavor not in flavors:
        raise UserError(
            f'model.flavor = "{flavor}": not a flavor of {name}, which has {", ".join(flavors)}'
            f"{did_you_mean(flavor, flavors)}"
        )
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    known = [field.name for field in fields(ModelDims)]
    unknown = [f"model.overrides.{key}: no such key{did_you_mean(key, known)}" for key in given if key not in known]
    if unknown:
        raise UserError("\n".join(unknown))
    return replace(flavors[flavor], **given)


def _block_parameters(dims: ModelDims) -> int:
    """Parameters of one transformer block: attention, feed-forward, two norms."""
    attention = 2 * dims.dim * dims.dim + 2 * dims.dim * dims.kv_heads * dims.head_dim
    return attention + 3 * dims.dim * dims.ffn_hidden_dim + 2 * dims.dim


def count_parameters(dims: ModelDims) -> int:
    """Number of parameters of the model; a tied output head is counted once."""
    tables = 1 if dims.tied_embeddings else 2
    return dims.n_layers * _block_parameters(dims) + dims.dim + tables * dims.vocab_size * dims.dim


def flops_per_token(dims: ModelDims, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token of a sequence of `seq_len` tokens.

    `6 * P + 12 * n_layers * dim * seq_len`, where P counts the parameters apart from the embedding table (a look-up)
    but with the output head, tied or not. 6: each weight takes part in one multiply and one add in the forward and in
    each of the two gradient products. 12: attention has two products of `dim * seq_len` multiply-adds a token and
    layer, three times. As in the PaLM paper (arXiv 2204.02311, appendix B) and torchtitan, a causal mask counts as if
    it were full and recomputation is not counted, so that figures compare across projects.
    """
    weights = dims.n_layers * _block_parameters(dims) + dims.dim + dims.vocab_size * dims.dim
    return 6.0 * weights + 12.0 * dims.n_layers * dims.dim * seq_len
