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
    """Query heads of the attention; `dim` is split evenly over them."""

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

    def given(self) -> dict[str, int | float | bool]:
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
