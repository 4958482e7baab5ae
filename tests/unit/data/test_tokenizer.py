import json
import pickle

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from titan_fp8.data.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer, check_vocab
from titan_fp8.runtime.errors import UserError

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}


@pytest.fixture
def assets(tmp_path):
    tokenizer = tokenizers.Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 世界 🙂", "\x00\n\t"])
def test_byte_tokens_decode_to_the_same_text(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert ids[1:-1] == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_lone_surrogate_does_not_stop_the_byte_tokenizer(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b", bos=False, eos=False)) == "a?b"


def test_without_a_path_the_built_in_tokenizer_is_used():
    assert isinstance(build_tokenizer(None), ByteTokenizer)
    assert isinstance(build_tokenizer(None), Tokenizer)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_tokenizer_json_is_read_with_its_marks(assets, as_file):
    tokenizer = build_tokenizer(None, str(assets / "tokenizer.json")) if as_file else build_tokenizer(str(assets))
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 5)
    assert tokenizer.encode("hello world", bos=True, eos=True) == [1, 3, 4, 2]
    assert tokenizer.decode([1, 3, 4, 2]) == "hello world"


def test_the_template_of_the_file_adds_no_second_bos(assets):
    tokenizer = build_tokenizer(str(assets))
    assert tokenizer.encode("hello", bos=False, eos=False) == [3]
    assert tokenizer.encode_batch(["hello", "world"], bos=True, eos=False) == [[1, 3], [1, 4]]


def test_a_tokenizer_survives_pickling(assets):
    tokenizer = build_tokenizer(str(assets))
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("hello world", bos=True, eos=True) == [1, 3, 4, 2]
    assert copy.fingerprint == tokenizer.fingerprint


def test_marks_may_stand_in_config_json_as_codes(assets):
    (assets / "tokenizer_config.json").unlink()
    write(assets / "config.json", {"eos_token_id": [2, 1]})
    tokenizer = build_tokenizer(str(assets))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    assert tokenizer.encode("hello", bos=True, eos=True) == [3, 2]


def test_the_fingerprint_follows_vocabulary_and_marks(assets):
    before = build_tokenizer(str(assets)).fingerprint
    write(assets / "tokenizer_config.json", {"bos_token": None, "eos_token": "</s>"})
    assert build_tokenizer(str(assets)).fingerprint != before


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no readable tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), "no readable tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "without tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "which token ends a document"),
        (lambda folder: write(folder / "tokenizer_config.json", {"eos_token": "<end>"}), "'<end>' is not a token"),
        (lambda folder: write(folder / "tokenizer_config.json", {"eos_token_id": 77}), "77 is not a code"),
    ],
)
def test_broken_files_give_one_clear_error(assets, break_it, message):
    break_it(assets)
    with pytest.raises(UserError, match=message):
        build_tokenizer(str(assets))


def test_wrong_paths_give_one_clear_error(assets, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        build_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="differ"):
        build_tokenizer(str(assets), str(tmp_path / "other"))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match="not read"):
        build_tokenizer(None, str(tmp_path / "tokenizer.model"))


def test_a_tokenizer_with_more_codes_than_the_model_is_refused(tokenizer):
    check_vocab(tokenizer, 259)
    with pytest.raises(UserError, match=r"259 codes.*vocab_size is 258"):
        check_vocab(tokenizer, 258)
