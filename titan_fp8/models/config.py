"""`[model]`: which model, with which dimensions, and which converters rewrite it."""

from collections.abc import Iterator
from typing import Literal

from titan_fp8.config.section import Problem, Section, key


class ModelOverrides(Section):
    """Single dimensions of the flavor, replaced. An unset key keeps the flavor's value."""

    dim: int | None = key(None, ge=1, unit="features")
    """Width of the residual stream."""

    n_layers: int | None = key(None, ge=1, unit="blocks")
    """Number of transformer blocks."""

    n_heads: int | None = key(None, ge=1, unit="heads")
    """Query heads of the attention; `dim` is split evenly over them, unless `head_dim` is set."""

    n_kv_heads: int | None = key(None, ge=1, unit="heads")
    """Key and value heads; each serves `n_heads / n_kv_heads` query heads."""

    vocab_size: int | None = key(None, ge=1, unit="tokens")
    """Rows of the embedding and of the output projection. The tokenizer may have fewer codes, not more."""

    ffn_dim: int | None = key(None, ge=1, unit="features")
    """Hidden width of the feed-forward network, used as it is: `multiple_of` and `ffn_dim_multiplier` do not apply."""

    multiple_of: int | None = key(None, ge=1, unit="features")
    """The feed-forward's hidden width is rounded up to a multiple of this."""

    ffn_dim_multiplier: float | None = key(None, gt=0)
    """Factor on the feed-forward's hidden width of 8/3 `dim`, before rounding."""

    norm_eps: float | None = key(None, gt=0)
    """Added to the mean square in RMSNorm."""

    rope_theta: float | None = key(None, gt=0)
    """Base of the rotary embedding's wavelengths."""

    rope_scaling_factor: float | None = key(None, gt=0)
    """Llama 3.1's stretch of the slow rotary frequencies; 1 leaves them unscaled."""

    rope_low_freq_factor: float | None = key(None, gt=0)
    """Wavelengths above `rope_original_max_position / rope_low_freq_factor` are stretched in full."""

    rope_high_freq_factor: float | None = key(None, gt=0)
    """Wavelengths below `rope_original_max_position / rope_high_freq_factor` are left alone."""

    rope_original_max_position: int | None = key(None, ge=1, unit="tokens")
    """Context length before the frequency scaling."""

    max_seq_len: int | None = key(None, ge=1, unit="tokens")
    """Longest sequence that the model's position table holds."""

    tied_embeddings: bool | None = None
    """Use the embedding's weight as the output projection's."""

    head_dim: int | None = key(None, ge=1, unit="features")
    """Width of a head; unset: `dim / n_heads`."""

    yarn_factor: float | None = key(None, gt=0)
    """YaRN's frequency scaling; 1: unscaled."""

    yarn_beta_fast: float | None = key(None, gt=0)
    """Upper bound of YaRN's scaling, see `YarnScaling`."""

    yarn_beta_slow: float | None = key(None, gt=0)
    """Lower bound of YaRN's scaling, see `YarnScaling`."""

    yarn_mscale: float | None = key(None, gt=0)
    """YaRN sharpens attention: products of rotated queries and keys are multiplied by `(1 + 0.1 yarn_mscale
    ln(yarn_factor))^2`, in latent attention those of features without positions too."""

    yarn_mscale_all_dim: float | None = key(None, gt=0)
    """In latent attention it takes the place of `yarn_mscale` for features without positions; elsewhere its factor, of
    the same formula, divides that of `yarn_mscale`; unset: neither."""

    qk_norm: Literal["none", "head", "l2"] | None = None
    """RMSNorm of each head of queries and keys: `head` with a learned scale before they are rotated (Qwen3),
    `l2` without one after it (Llama 4, in layers with rotary positions)."""

    nope_interval: int | None = key(None, ge=1, unit="layers")
    """Every so many layers one has no rotary positions; unset: all have them."""

    attention_chunk: int | None = key(None, ge=1, unit="tokens")
    """In layers with rotary positions a token sees its own chunk of so many tokens alone; unset: the whole
    sequence."""

    temperature_floor: int | None = key(None, ge=1, unit="tokens")
    """In layers without rotary positions the query at position p is multiplied by `1 + temperature_scale ln(1 +
    floor((p + 1) / temperature_floor))`; unset: not."""

    temperature_scale: float | None = key(None, gt=0)
    """See `temperature_floor`."""

    kv_lora_rank: int | None = key(None, ge=1, unit="features")
    """Width of the latent vector of keys and values; unset: no latent attention."""

    q_lora_rank: int | None = key(None, ge=1, unit="features")
    """Width of the latent vector of queries; unset: they come from the stream itself."""

    qk_nope_head_dim: int | None = key(None, ge=1, unit="features")
    """Features of a query's and key's head without positions."""

    qk_rope_head_dim: int | None = key(None, ge=1, unit="features")
    """Rotated features of a query's and key's head; of keys, all heads have the same."""

    v_head_dim: int | None = key(None, ge=1, unit="features")
    """Width of a value's head."""

    n_experts: int | None = key(None, ge=1, unit="experts")
    """Number of experts of a layer; unset: every feed-forward is dense."""

    top_k: int | None = key(None, ge=1, unit="experts")
    """Experts that a token goes to."""

    moe_ffn_dim: int | None = key(None, ge=1, unit="features")
    """Hidden width of an expert; unset: that of the dense feed-forward."""

    n_shared_experts: int | None = key(None, ge=0, unit="experts")
    """Experts that every token goes to, as one feed-forward of so many times `moe_ffn_dim`."""

    first_dense_layers: int | None = key(None, ge=0, unit="layers")
    """So many first layers have a dense feed-forward."""

    moe_interval: int | None = key(None, ge=1, unit="layers")
    """After those, every so many layers the last one has experts."""

    router_score: Literal["softmax", "sigmoid"] | None = None
    """What makes scores of a router's logits: `softmax` over the experts, or the `sigmoid` of each."""

    router_norm: bool | None = None
    """A token's scores are divided by their sum."""

    router_scale: float | None = key(None, gt=0)
    """Factor on a token's scores."""

    score_before_experts: bool | None = None
    """Scores multiply what goes into the experts instead of what comes out."""

    expert_groups: int | None = key(None, ge=1, unit="groups")
    """Experts are in so many groups, of which a token may use some (node-limited routing)."""

    expert_groups_per_token: int | None = key(None, ge=1, unit="groups")
    """Groups that a token's experts are in."""

    expert_group_score: Literal["max", "top2"] | None = None
    """A group's score: that of its best expert (`max`), or of its two best together (`top2`)."""

    router_bias: bool | None = None
    """Each expert has a bias in the choice, which is trained by `balance_rate` and kept where that is 0."""

    balance_rate: float | None = key(None, ge=0)
    """After each step the bias of an expert that got too few tokens gains so much, and that of one that got too many
    loses it (arXiv 2408.15664); above 0 there are biases in any case."""

    aux_loss_weight: float | None = key(None, ge=0)
    """Weight of the auxiliary loss that draws the routers to balanced loads; 0: off."""

    def given(self) -> dict[str, int | float | bool | str]:
        """The dimensions that are overridden."""
        return self.model_dump(exclude_none=True)

    def problems(self) -> Iterator[Problem]:
        """`ffn_dim` says the width itself, so what goes into its formula has no effect."""
        if self.ffn_dim is not None:
            for name in ("multiple_of", "ffn_dim_multiplier"):
                if getattr(self, name) is not None:
                    yield Problem(name, f"has no effect beside ffn_dim = {self.ffn_dim}; keep one of them")


class ModelSection(Section):
    """The model, its tokenizer and its converters."""

    name: str = "llama3"
    """Model family, such as `llama3`."""

    flavor: str = "debugmodel"
    """Size within the family, for example `8B`."""

    hf_assets_path: str | None = None
    """Folder with a `tokenizer.json` (a downloaded Hugging Face model folder). Unset means the built-in byte-level
    tokenizer, which needs no files."""

    tokenizer_path: str | None = None
    """Older name of `hf_assets_path`, with the same meaning. Set one of them."""

    converters: list[str] = key([])
    """Converters that rewrite the model, in this order, for example `["quantize.linear.float8"]`. The settings of each
    stand in the section of its name."""

    print_after_conversion: bool = False
    """Print the model after the converters have rewritten it."""

    attention_backend: Literal["auto", "math", "flash", "efficient", "cudnn", "flash4", "flex"] = "auto"
    """Implementation of the attention. `auto` chooses by device and by whether documents are masked; the others are
    used as named, or refused where they cannot run."""

    overrides: ModelOverrides = ModelOverrides()
    """Single dimensions of the flavor, replaced."""
