import errno
import json
import pickle

import numpy as np
import pytest

from tests.unit.data.conftest import Documents, make_documents
from titan_fp8.data import token_writer
from titan_fp8.data.config import TrainingSection
from titan_fp8.data.loader import build_train_loader
from titan_fp8.data.sources import BlockSource, collect_tokens
from titan_fp8.data.token_store import ArrayStore, Manifest, open_shards
from titan_fp8.data.token_writer import write_token_folder
from titan_fp8.data.tokenizer import ByteTokenizer
from titan_fp8.runtime.errors import UserError

TOKENIZER = ByteTokenizer()


def write(folder, documents=None, shard_tokens=500, workers=0, validation=None):
    splits = {"train": documents or make_documents(60)}
    if validation:
        splits["validation"] = validation
    return write_token_folder(folder, splits, TOKENIZER, shard_tokens=shard_tokens, num_workers=workers)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "tokens", validation=make_documents(7))
    return tmp_path / "tokens"


@pytest.mark.parametrize("shard_tokens", [1, 50, 500, 10**9])
def test_shards_hold_the_packed_documents_however_they_are_cut(tmp_path, shard_tokens):
    documents = make_documents(60)
    manifest = write(tmp_path / "tokens", documents, shard_tokens)
    tokens, starts = collect_tokens(documents, TOKENIZER, None)
    store = open_shards(tmp_path / "tokens", "train", TOKENIZER)
    reference = ArrayStore(tokens, starts)
    assert store.total_tokens == len(tokens)
    np.testing.assert_array_equal(store.read(0, len(tokens)), tokens)
    for start, stop in [(0, len(tokens)), (17, 700), (len(tokens) - 1, len(tokens)), (400, 600)]:
        np.testing.assert_array_equal(store.read(start, stop), tokens[start:stop])
        np.testing.assert_array_equal(store.document_ids(start, stop), reference.document_ids(start, stop))
    shards = manifest.splits["train"]
    assert sum(shard.documents for shard in shards) == 60
    assert len(shards) == {1: 60, 10**9: 1}.get(shard_tokens, len(shards))
    assert all(shard.tokens >= min(shard_tokens, len(tokens)) for shard in shards[:-1])


def test_document_ids_change_at_each_beginning_of_a_document(folder):
    store = open_shards(folder, "train", TOKENIZER)
    tokens = store.read(100, 1500)
    begins = tokens == TOKENIZER.bos_id
    begins[0] = False
    np.testing.assert_array_equal(store.document_ids(100, 1500), np.cumsum(begins))


def test_the_number_of_workers_does_not_change_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "_CHUNK_BYTES", 300)
    one = write(tmp_path / "one")
    two = write(tmp_path / "two", workers=2)
    assert one == two
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_store_survives_pickling_without_copying_the_shards(folder):
    store = open_shards(folder, "train", TOKENIZER)
    store.read(0, 100)
    text = pickle.dumps(store)
    assert len(text) < 3000
    np.testing.assert_array_equal(pickle.loads(text).read(0, 100), store.read(0, 100))


def test_training_reads_the_train_split(folder):
    training = TrainingSection(dataset="tokens", dataset_path=str(folder), seq_len=32, document_masking=True)
    sizes = {"global_batch_sequences": 4, "local_batch_sequences": 2, "dp_rank": 0, "dp_world_size": 1}
    with build_train_loader(training, TOKENIZER, seed=0, **sizes) as loader:
        batches = loader.next_step()
    assert [batch.tokens.shape for batch in batches] == [(2, 32), (2, 32)]
    assert batches[0].document_ids is not None


def test_blocks_cover_every_token_but_an_incomplete_end():
    store = ArrayStore(np.arange(100, dtype=np.int32), np.zeros(1, dtype=np.int64))
    source = BlockSource(store, 9, 0, "", shuffle=False)
    assert source.blocks == 11
    assert [source.window(block).tokens.tolist() for block in (0, 10)] == [list(range(10)), list(range(90, 100))]
    padded = BlockSource(store, 10, 0, "", shuffle=False, padding=7)
    assert (BlockSource(store, 10, 0, "").blocks, padded.blocks) == (9, 10)
    assert padded.window(9).length == 10
    assert padded.window(9).tokens.tolist() == [*range(90, 100), 7]
    assert padded.window(10).length == 0


def damage_manifest(folder, change):
    body = json.loads((folder / "manifest.json").read_text())
    change(body)
    (folder / "manifest.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no finished folder"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "damaged"),
        (lambda folder: damage_manifest(folder, lambda body: body.pop("splits")), "checksum"),
        (lambda folder: damage_manifest(folder, lambda body: body.update(dtype="uint32")), "checksum"),
        (lambda folder: damage_manifest(folder, lambda body: body.update(version=2)), "version 1"),
        (lambda folder: (folder / "train-00001.bin").unlink(), r"train-00001\.bin is missing"),
        (lambda folder: (folder / "train-00000.bin").write_bytes(b"12"), r"train-00000\.bin has 2 bytes"),
        (lambda folder: (folder / "train-00000.starts").write_bytes(b""), r"starts has 0 bytes"),
    ],
)
def test_a_damaged_folder_is_refused_before_training(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_shards(folder, "train", TOKENIZER)


def test_tokens_of_another_tokenizer_are_refused(folder, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "fingerprint", "other")
    with pytest.raises(UserError, match="another tokenizer"):
        open_shards(folder, "train", ByteTokenizer())


def test_a_split_that_was_not_written_is_refused(tmp_path):
    write(tmp_path / "tokens")
    with pytest.raises(UserError, match="no validation split"):
        open_shards(tmp_path / "tokens", "validation", TOKENIZER)


def test_data_smaller_than_one_sample_is_refused(tmp_path):
    write(tmp_path / "tokens", Documents(["abc"]))
    training = TrainingSection(dataset="tokens", dataset_path=str(tmp_path / "tokens"), seq_len=5)
    sizes = {"global_batch_sequences": 1, "local_batch_sequences": 1, "dp_rank": 0, "dp_world_size": 1}
    with pytest.raises(UserError, match="5 tokens, less than one sample"):
        build_train_loader(training, TOKENIZER, seed=0, **sizes)


def test_an_existing_folder_is_not_touched(folder):
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(UserError, match="not an empty folder"):
        write(folder)
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize("place", ["train-00001.bin", "train-00000.starts", "manifest.json"])
def test_a_full_disk_ends_in_one_error_and_leaves_nothing(tmp_path, monkeypatch, place):
    close = token_writer._close_on_disk

    def full(file):
        if str(file.name).endswith(place):
            raise OSError(errno.ENOSPC, "No space left on device")
        close(file)

    monkeypatch.setattr(token_writer, "_close_on_disk", full)
    with pytest.raises(UserError, match=r"No space left on device; free some space\. Nothing was kept"):
        write(tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("bad document")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(token_writer._SplitWriter, "finish_shard", fail)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        write(tmp_path / "tokens")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_does_not_count_and_is_replaced(tmp_path):
    left = tmp_path / ".tokens.partial"
    left.mkdir()
    (left / "train-00009.bin").write_bytes(b"x" * 100)
    write(tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    assert Manifest.read(tmp_path / "tokens").splits["train"]
