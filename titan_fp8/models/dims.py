"""The dimensions of a model, without torch: the configuration reads them before anything heavy starts.

`ModelDims` is all that the one decoder (`titan_fp8.models.decoder`) needs to know of a model. What a family does not
have is off by default: grouped-query attention with rotary positions in every layer, and a dense feed-forward.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from titan_fp8.runtime.errors import UserError

QKNorm = Literal["none", "head", "l2"]
RouterScore = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


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
class YarnScaling:
    """YaRN's stretch (arXiv 2309.00071) of the rotary frequencies (see `titan_fp8.models.rope`)."""

    factor: float
    """Frequencies below those of `beta_slow` turns are divided by this factor."""
    beta_fast: float
    """Pairs that turn more often than this within the original context are left alone."""
    beta_slow: float
    """Pairs that turn less often than this are stretched in full; between the bounds it is blended."""
    original_max_position: int
    """Context length, in tokens, that the model was first trained for."""
    sharpening: float = 1.0
    """Factor on cosines and sines, and so on each rotated query and key."""


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a decoder; each can be set as `model.overrides.FIELD`. An inconsistent set is a `UserError`."""

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Number of transformer blocks."""
    n_heads: int
    """Number of query heads; where `head_dim` is unset, `dim` is a multiple of it."""
    n_kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention); unset: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; unset: `dim / n_heads`."""
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
    max_seq_len: int = 131072
    """Longest sequence, in tokens, that the model accepts."""
    tied_embeddings: bool = False
    """The output head uses the embedding table as its weight."""

    # Positions
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
    yarn_factor: float = 1.0
    """YaRN's frequency scaling; 1: unscaled."""
    yarn_beta_fast: float = 32.0
    """Upper bound of YaRN's scaling, see `YarnScaling`."""
    yarn_beta_slow: float = 1.0
    """Lower bound of YaRN's scaling, see `YarnScaling`."""
    yarn_mscale: float = 1.0
    """YaRN sharpens attention: products of rotated queries and keys are multiplied by `(1 + 0.1 yarn_mscale
    ln(yarn_factor))^2`, in latent attention those of features without positions too."""
    yarn_mscale_all_dim: float | None = None
    """In latent attention it takes the place of `yarn_mscale` for features without positions; elsewhere its factor, of
    the same formula, divides that of `yarn_mscale`; unset: neither."""

    # Attention
    qk_norm: QKNorm = "none"
    """RMSNorm of each head of queries and keys: `head` with a learned scale before they are rotated (Qwen3), `l2`
    without one after it (Llama 4, in layers with rotary positions)."""
    nope_interval: int | None = None
    """Every so many layers one has no rotary positions; unset: all have them."""
    attention_chunk: int | None = None
    """In layers with rotary positions a token sees its own chunk of so many tokens alone; unset: the whole sequence."""
    temperature_floor: int | None = None
    """In layers without rotary positions the query at position p is multiplied by
    `1 + temperature_scale ln(1 + floor((p + 1) / temperature_floor))`; unset: not."""
    temperature_scale: float = 0.1
    """See `temperature_floor`."""

    # Latent attention (arXiv 2405.04434): heads of keys and values come from a narrow latent vector
    kv_lora_rank: int | None = None
    """Width of the latent vector of keys and values; unset: no latent attention."""
    q_lora_rank: int | None = None
    """Width of the latent vector of queries; unset: they come from the stream itself."""
    qk_nope_head_dim: int = 128
    """Features of a query's and key's head without positions."""
    qk_rope_head_dim: int = 64
    """Rotated features of a query's and key's head; of keys, all heads have the same."""
    v_head_dim: int = 128
    """Width of a value's head."""

    # Mixture of experts
    n_experts: int | None = None
    """Number of experts of a layer; unset: every feed-forward is dense."""
    top_k: int = 1
    """Experts that a token goes to."""
    moe_ffn_dim: int | None = None
    """Hidden width of an expert; unset: that of the dense feed-forward."""
    n_shared_experts: int = 0
    """Experts that every token goes to, as one feed-forward of so many times `moe_ffn_dim`."""
    first_dense_layers: int = 0
    """So many first layers have a dense feed-forward."""
    moe_interval: int = 1
    """After those, every so many layers the last one has experts."""
    router_score: RouterScore = "softmax"
    """What makes scores of a router's logits: `softmax` over the experts, or the `sigmoid` of each."""
    router_norm: bool = False
    """A token's scores are divided by their sum."""
    router_scale: float = 1.0
    """Factor on a token's scores."""
    score_before_experts: bool = False
    """Scores multiply what goes into the experts instead of what comes out."""
    expert_groups: int = 1
    """Experts are in so many groups, of which a token may use some (node-limited routing)."""
    expert_groups_per_token: int = 1
    """Groups that a token's experts are in."""
    expert_group_score: GroupScore = "top2"
    """A group's score: that of its best expert (`max`), or of its two best together (`top2`)."""
    router_bias: bool = False
    """Each expert has a bias in the choice, which is trained by `balance_rate` and kept where that is 0."""
    balance_rate: float = 0.0
    """After each step the bias of an expert that got too few tokens gains so much, and that of one that got too many
    loses it (arXiv 2408.15664); above 0 there are biases in any case."""
    aux_loss_weight: float = 0.0
    """Weight of the auxiliary loss that draws the routers to balanced loads; 0: off."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise UserError("\n".join(problems))

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, `n_heads` where `n_kv_heads` is unset."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head of queries and keys."""
        if self.is_latent:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of a head of values."""
        return self.v_head_dim if self.is_latent else self.head_width

    @property
    def rope_width(self) -> int:
        """Features of a head that are rotated."""
        return self.qk_rope_head_dim if self.is_latent else self.head_width

    @property
    def is_latent(self) -> bool:
        """Whether keys and values come from a latent vector."""
        return self.kv_lora_rank is not None

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
    def has_router_bias(self) -> bool:
        """Whether experts have biases in the choice."""
        return self.router_bias or self.balance_rate > 0

    @property
    def expert_hidden_dim(self) -> int:
        """Hidden width of an expert."""
        return self.ffn_hidden_dim if self.moe_ffn_dim is None else self.moe_ffn_dim

    @property
    def rope_scaling(self) -> RopeScaling | YarnScaling | None:
        """The frequency scaling, or None where its factor is 1."""
        if self.yarn_factor != 1.0:
            return YarnScaling(
                self.yarn_factor,
                self.yarn_beta_fast,
                self.yarn_beta_slow,
                self.rope_original_max_position,
                self._yarn_sharpening(self.yarn_mscale) / self._yarn_sharpening(self._mscale_all_dim),
            )
        if self.rope_scaling_factor == 1.0:
            return None
        return RopeScaling(
            self.rope_scaling_factor,
            self.rope_low_freq_factor,
            self.rope_high_freq_factor,
            self.rope_original_max_position,
        )

    @property
    def latent_sharpening(self) -> float:
        """Factor on the products of whole queries and keys in latent attention; YaRN's, as in DeepSeek's code."""
        return self._yarn_sharpening(self._mscale_all_dim) ** 2 if self.is_latent else 1.0

    @property
    def _mscale_all_dim(self) -> float:
        if self.yarn_mscale_all_dim is None:
            return self.yarn_mscale if self.is_latent else 0.0
        return self.yarn_mscale_all_dim

    def _yarn_sharpening(self, mscale: float) -> float:
        """Section 3.4 of arXiv 2309.00071, in which mscale is 1."""
        return 1.0 + 0.1 * mscale * math.log(max(self.yarn_factor, 1.0))

    def recorded(self) -> dict[str, Any]:
        """The dimensions by name, for a checkpoint to be compared by; of what a model may lack, only what this one
        has, and nothing that only training knows."""
        model = replace(self, router_bias=self.has_router_bias, balance_rate=0.0, aux_loss_weight=0.0)
        return {
            field.name: getattr(model, field.name)
            for field in fields(model)
            if field.name in _OF_EVERY_MODEL or getattr(model, field.name) != field.default
        }

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of that number, from 0, has experts in place of the dense feed-forward."""
        if self.n_experts is None or layer < self.first_dense_layers:
            return False
        return (layer - self.first_dense_layers + 1) % self.moe_interval == 0

    def has_rope(self, layer: int) -> bool:
        """Whether the layer of that number, from 0, has rotary positions."""
        return self.nope_interval is None or (layer + 1) % self.nope_interval != 0


_OF_EVERY_MODEL = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim", "multiple_of", "ffn_dim_multiplier"),
    *("norm_eps", "rope_theta", "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("rope_original_max_position", "max_seq_len", "tied_embeddings"),
)
_MAY_BE_ZERO = ("n_shared_experts", "first_dense_layers", "balance_rate", "aux_loss_weight")


def _problems(dims: ModelDims) -> Iterator[str]:
    """Every rule that the dimensions break, one message each."""
    found = []
    for field in fields(dims):
        value = getattr(dims, field.name)
        if value is None or isinstance(value, bool | str):
            continue
        if not (value >= 0 if field.name in _MAY_BE_ZERO else value > 0):
            least = "at least" if field.name in _MAY_BE_ZERO else "greater than"
            found.append(f"model.overrides.{field.name} = {value}: must be {least} 0")
    if found:  # the rules below divide by these numbers
        yield from found
        return
    yield from _attention_problems(dims)
    if dims.n_experts is not None:
        yield from _expert_problems(dims, dims.n_experts)


def _attention_problems(dims: ModelDims) -> Iterator[str]:
    if dims.head_dim is None and not dims.is_latent and dims.dim % dims.n_heads:
        yield (
            f"model.overrides: dim {dims.dim} is not a multiple of n_heads {dims.n_heads}; "
            "every head has dim / n_heads features, unless head_dim says how many"
        )
    elif dims.rope_width % 2:
        name = "qk_rope_head_dim" if dims.is_latent else "head width dim / n_heads"
        name = name if dims.head_dim is None or dims.is_latent else "head_dim"
        remedy = "change dim or n_heads" if name.startswith("head width") else "change it"
        yield (
            f"model.overrides: {name} = {dims.rope_width} is odd; rotary embeddings turn pairs of features, so {remedy}"
        )
    if dims.n_heads % dims.kv_heads:
        yield (
            f"model.overrides: n_heads {dims.n_heads} is not a multiple of n_kv_heads {dims.kv_heads}; "
            "every key/value head serves the same number of query heads"
        )
    if dims.rope_high_freq_factor < dims.rope_low_freq_factor:
        yield (
            f"model.overrides: rope_high_freq_factor {dims.rope_high_freq_factor} must not be less than "
            f"rope_low_freq_factor {dims.rope_low_freq_factor}"
        )
    if dims.yarn_factor != 1.0 and dims.rope_scaling_factor != 1.0:
        yield (
            f"model.overrides: rope_scaling_factor {dims.rope_scaling_factor} and yarn_factor {dims.yarn_factor} both "
            "stretch the rotary frequencies; set one of them to 1"
        )
    if dims.is_latent:
        for name, other in (("head_dim", None), ("n_kv_heads", None), ("nope_interval", None), ("qk_norm", "none")):
            if getattr(dims, name) != other:
                yield f"model.overrides.{name} = {getattr(dims, name)}: latent attention has no such thing; unset it"
    if dims.attention_chunk is not None and dims.is_latent:
        yield f"model.overrides.attention_chunk = {dims.attention_chunk}: latent attention sees the whole sequence"


def _expert_problems(dims: ModelDims, n_experts: int) -> Iterator[str]:
    if dims.top_k > n_experts:
        yield (
            f"model.overrides.top_k = {dims.top_k}: a token goes to different experts, of which n_experts has only "
            f"{n_experts}; lower top_k or raise n_experts"
        )
        return
    if n_experts % dims.expert_groups:
        yield (
            f"model.overrides: n_experts {n_experts} is not a multiple of expert_groups {dims.expert_groups}; "
            "every group has as many; change one of them"
        )
        return
    in_group = n_experts // dims.expert_groups
    if dims.expert_groups_per_token > dims.expert_groups:
        yield (
            f"model.overrides.expert_groups_per_token = {dims.expert_groups_per_token}: a token's groups are different "
            f"ones, of which expert_groups has only {dims.expert_groups}; lower it, {dims.expert_groups} allows all"
        )
    elif dims.top_k > dims.expert_groups_per_token * in_group:
        yield (
            f"model.overrides: top_k {dims.top_k} is more than the {dims.expert_groups_per_token * in_group} experts "
            f"of {dims.expert_groups_per_token} groups; raise expert_groups_per_token"
        )
    if dims.expert_groups > 1 and dims.expert_group_score == "top2" and in_group < 2:
        yield 'model.overrides.expert_group_score = "top2": groups have one expert each; set it to "max"'
    if not any(dims.has_experts(layer) for layer in range(dims.n_layers)):
        yield (
            f"model.overrides: none of the {dims.n_layers} layers has experts, with first_dense_layers "
            f"{dims.first_dense_layers} and moe_interval {dims.moe_interval}; raise n_layers or lower these"
        )
