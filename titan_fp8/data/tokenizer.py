"""Text to integers and back.

A model sees text as codes below its vocabulary size. Two tokenizers are offered:

- the built-in one has a code for each of the 256 bytes of UTF-8, so it needs no files, covers every language and never
  meets an unknown character; its sequences are about four times longer than those of a trained tokenizer;
- `tokenizer.json`, the format of the Hugging Face `tokenizers` library, in a folder `model.hf_assets_path`. Which codes
  begin and end a document is not part of that file; `tokenizer_config.json` or `config.json` beside it says so.

Documents are packed one after the other into training sequences, so each is wrapped as `bos text eos`. Some families
(GPT-2, Qwen) have no beginning mark; then only `eos` separates documents.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers

from titan_fp8.runtime.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer. Implementations can be pickled.

    Attributes:
        name: for messages.
        vocab_size: largest code plus one.
        bos_id: code that begins a document, or None if the family has none.
        eos_id: code that ends a document.
        fingerprint: equal for two tokenizers only if they give the same codes; token shards record it.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    fingerprint: str

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Codes of `text`, with the marks that are asked for and exist."""
        ...

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the codes; marks are left out."""
        ...


class ByteTokenizer:
    """One code for each byte of UTF-8, then bos (256), eos (257) and pad (258)."""

    name = "built-in byte tokenizer"
    vocab_size = 259
    bos_id: int | None = 256
    eos_id = 257
    pad_id = 258
    fingerprint = "bytes-256-257-258"

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Bytes of `text`. A lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
        codes = list(text.encode("utf-8", errors="replace"))
        return [256] * bos + codes + [257] * eos

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, bos=bos, eos=eos) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; bytes that are not UTF-8 show as U+FFFD."""
        return bytes(code for code in ids if 0 <= code < 256).decode("utf-8", errors="replace")


class HFTokenizer:
    """A `tokenizer.json` with the marks that the files beside it name.

    Template marks of the file itself (Llama's adds bos to every text) are not used, so that a mark stands exactly where
    it is asked for.
    """

    def __init__(self, file: Path) -> None:
        self.name = str(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(
                f"{file} is no readable tokenizer.json: {error}; download it again with scripts/download_tokenizer.py"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        codes = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(codes.values(), default=-1) + 1
        configs = [_read_config(file.parent / name) for name in _CONFIG_FILES]
        self.bos_id = _mark("bos", configs, codes, file)
        eos_id = _mark("eos", configs, codes, file)
        if eos_id is None:
            raise UserError(
                f"{file.parent}: nothing says which token ends a document; "
                'add "eos_token" to tokenizer_config.json or "eos_token_id" to config.json beside tokenizer.json'
            )
        self.eos_id = eos_id
        content = f"{self._tokenizer.to_str()} {self.bos_id} {self.eos_id}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:32]

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Codes of `text`; names of special tokens inside the text become those tokens."""
        return self._with_marks(self._tokenizer.encode(text, add_special_tokens=False).ids, bos, eos)

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._with_marks(encoding.ids, bos, eos) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the codes, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _with_marks(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        head = [self.bos_id] if bos and self.bos_id is not None else []
        return head + ids + [self.eos_id] * eos


_CONFIG_FILES = ("tokenizer_config.json", "config.json", "generation_config.json")


def build_tokenizer(hf_assets_path: str | None, tokenizer_path: str | None = None) -> Tokenizer:
    """The tokenizer of a job.

    Args:
        hf_assets_path: folder with `tokenizer.json`; None for the built-in byte tokenizer.
        tokenizer_path: older name of the same thing; a folder, or the file itself.

    Raises:
        UserError: a missing or broken file, two different paths, or no token that ends a document.
    """
    if hf_assets_path is not None and tokenizer_path is not None and Path(hf_assets_path) != Path(tokenizer_path):
        raise UserError(
            f"model.hf_assets_path = {hf_assets_path!r} and model.tokenizer_path = {tokenizer_path!r} differ; "
            "keep hf_assets_path"
        )
    key, value = ("hf_assets_path", hf_assets_path) if tokenizer_path is None else ("tokenizer_path", tokenizer_path)
    if value is None:
        return ByteTokenizer()
    path = Path(value).expanduser()
    remedy = "download one with scripts/download_tokenizer.py, or leave the key out for the built-in byte tokenizer"
    if not path.exists():
        raise UserError(f"model.{key} = {value!r} does not exist; {remedy}")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"model.{key} = {value!r} is a folder without tokenizer.json; {remedy}")
    if file.suffix == ".model":
        raise UserError(
            f"model.{key} = {value!r}: tokenizer.model files are not read; "
            "give the folder of the same model's tokenizer.json"
        )
    return HFTokenizer(file)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer with more codes than the model has rows in its embedding.

    Raises:
        UserError: `tokenizer.vocab_size > vocab_size`.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer ({tokenizer.name}) has {tokenizer.vocab_size} codes, but the model's vocab_size is "
            f"{vocab_size}; set model.overrides.vocab_size to at least {tokenizer.vocab_size} or take another tokenizer"
        )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON: {error}; repair or download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object but a {type(config).__name__}; download it again")
    return config


def _mark(which: str, configs: list[dict[str, Any]], codes: dict[str, int], file: Path) -> int | None:
    """Code of the bos or eos token: the first config that names one decides."""
    for name, config in zip(_CONFIG_FILES, configs, strict=True):
        token = config.get(f"{which}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            if token not in codes:
                raise UserError(
                    f"{file.parent / name}: {which}_token = {token!r} is not a token of {file.name}; "
                    "the two files belong to different tokenizers"
                )
            return codes[token]
        code = config.get(f"{which}_token_id")
        if isinstance(code, list):  # several tokens may end a chat turn; the first is the document's
            code = code[0] if code else None
        if code is not None:
            if code not in codes.values():
                raise UserError(
                    f"{file.parent / name}: {which}_token_id = {code!r} is not a code of {file.name}; "
                    "the two files belong to different tokenizers"
                )
            return code
    return None
