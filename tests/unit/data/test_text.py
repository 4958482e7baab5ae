"""Local files and streams through `datasets`. One module, since importing that library takes seconds."""

import errno
import gzip
import json
import pickle
import socket

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.unit.data.conftest import make_documents, rows
from titan_fp8.cli import prepare
from titan_fp8.data.config import TrainingSection, ValidationSection
from titan_fp8.data.documents import load_text
from titan_fp8.data.feeds import StreamFeed, stream_texts
from titan_fp8.data.loader import build_train_loader, build_validation_loader
from titan_fp8.data.sources import collect_tokens
from titan_fp8.data.token_store import open_shards
from titan_fp8.data.tokenizer import ByteTokenizer
from titan_fp8.runtime.errors import UserError

TOKENIZER = ByteTokenizer()
TEXTS = ["first text", "second\ntext", "dritter Text: äöü", "fourth"]
TABLE = pyarrow.table({"id": [1, 2, 3, 4], "text": TEXTS})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def local_only(self, address):
        assert self.family == socket.AF_UNIX, f"a test reached for the network: {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)))
    return path


def write_arrow(path, new):
    with new(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE)


WRITERS = {
    "a.jsonl": lambda path: write_jsonl(path, TEXTS),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS])),
    "a.json.gz": lambda path: path.write_bytes(
        gzip.compress(b"".join(b'{"text": %s}\n' % json.dumps(t).encode() for t in TEXTS))
    ),
    "a.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path),
    "stream.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
    "file.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_its_texts_in_order(tmp_path, name):
    WRITERS[name](tmp_path / name)
    documents = load_text(tmp_path / name, "train")
    assert list(documents) == TEXTS
    assert list(pickle.loads(pickle.dumps(documents))) == TEXTS


def test_a_full_disk_under_the_cache_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("while preparing") from error

    (tmp_path / "a.txt").write_text("some text\n")
    monkeypatch.setattr(datasets.Dataset, "from_text", full)
    with pytest.raises(UserError, match=r"^the disk of the cache .* is full; free some space or set HF_DATASETS_CACHE"):
        load_text(tmp_path / "a.txt", "train", hold_out_every=0)


def test_a_txt_file_is_cut_as_asked(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    read = {
        how: list(load_text(tmp_path / "a.txt", "train", txt_documents=how)) for how in ("line", "paragraph", "file")
    }
    assert read["line"] == ["one", "two", "three"]
    assert [text.strip() for text in read["paragraph"]] == ["one\ntwo", "three"]
    assert read["file"] == ["one\ntwo\n\n\nthree\n"]


def test_a_folder_is_read_with_its_subfolders_and_without_what_is_no_data(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write_jsonl(tmp_path / "sub" / "b.jsonl", ["b1", "", "b2"])
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "validation-0.jsonl", ["held out"])
    write_jsonl(tmp_path / ".hidden" / "c.jsonl", ["hidden"])
    (tmp_path / "d.txt").write_text("d")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "README.md").write_text("readme")
    assert list(load_text(tmp_path, "train")) == ["d", "a", "b1", "b2"]
    assert list(load_text(tmp_path, "validation")) == ["held out"]


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    assert list(load_text(tmp_path / "saved", "train")) == TEXTS


def test_a_changed_file_is_read_anew(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["old"])
    assert list(load_text(path, "train")) == ["old"]
    write_jsonl(path, ["new", "text"])
    assert list(load_text(path, "train")) == ["new", "text"]


@pytest.mark.parametrize(("every", "documents"), [(2, 7), (3, 9), (10, 35), (100, 350)])
def test_training_and_validation_share_no_document_and_lose_none(tmp_path, every, documents):
    texts = [f"text {number}" for number in range(documents)]
    path = write_jsonl(tmp_path / "a.jsonl", ["", *texts])
    train = list(load_text(path, "train", hold_out_every=every))
    validation = list(load_text(path, "validation", hold_out_every=every))
    assert validation == texts[every - 1 :: every]
    assert train == [text for text in texts if text not in validation]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\n\n\n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": ""}\n', "is empty"),
        ("a.jsonl", b'{"text": null}\n', "only empty values"),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', r'no column "text" \(columns: content, id\)'),
        ("a.jsonl", b'{"text": 5}\n', "of type int64"),
        ("a.jsonl", b'{"text": "x"', r"cannot read .*a\.jsonl"),
        ("a.parquet", b"PAR1 nonsense", r"cannot read .*a\.parquet"),
        ("a.arrow", b"nonsense", r"cannot read .*a\.arrow"),
        ("a.txt", b"\xff\xfe", r"cannot read .*a\.txt.*utf-8"),
        ("a.csv", b"text\nx\n", "of no kind"),
    ],
)
def test_files_that_cannot_be_trained_on_give_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(tmp_path / name, "train")


def test_the_broken_one_of_several_files_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "b.jsonl").write_text('{"text": ')
    write_jsonl(tmp_path / "c.jsonl", ["c"])
    with pytest.raises(UserError, match=r"cannot read .*b\.jsonl"):
        load_text(tmp_path, "train")


def test_paths_without_anything_to_read_give_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_text(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="holds no data files"):
        load_text(tmp_path, "train")
    write_jsonl(tmp_path / "validation.jsonl", ["a"])
    with pytest.raises(UserError, match="only validation files"):
        load_text(tmp_path, "train")
    with pytest.raises(UserError, match="in files"):
        load_text(tmp_path, "train", hold_out_every=7)


def test_impossible_divisions_give_one_clear_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])
    for every, message in [
        (None, "fewer than 100 documents"),
        (0, "leaves nothing to validate on"),
        (1, "every document"),
        (-3, "hold_out_every = -3: give 0"),
    ]:
        with pytest.raises(UserError, match=message):
            load_text(path, "validation", hold_out_every=every)


def loader(training, rank=0, world=1, global_batch=4, seed=3):
    return build_train_loader(
        training,
        TOKENIZER,
        seed=seed,
        global_batch_sequences=global_batch,
        local_batch_sequences=1,
        dp_rank=rank,
        dp_world_size=world,
    )


def steps_of(training, count, state=None):
    with loader(training) as each:
        if state is not None:
            each.load_state_dict(state)
        samples = [row for _ in range(count) for batch in each.next_step() for row in rows(batch)]
        return samples, each.state_dict()


def test_text_is_trained_on_and_resumed_exactly_with_and_without_workers(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(300))
    plain = TrainingSection(dataset="text", dataset_path=str(path), seq_len=32)
    workers = plain.model_copy(update={"dataloader": plain.dataloader.model_copy(update={"num_workers": 2})})
    expected, _ = steps_of(plain, 12)
    head, state = steps_of(workers, 5)
    tail, _ = steps_of(plain, 7, state)
    assert head + tail == expected
    assert len(set(expected)) == len(expected)


def test_text_smaller_than_one_sample_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "de"])
    with pytest.raises(UserError, match="9 tokens, less than one sample"):
        loader(TrainingSection(dataset="text", dataset_path=str(path), seq_len=9))
    loader(TrainingSection(dataset="text", dataset_path=str(path), seq_len=8)).close()


def validation_of(training, **section):
    return build_validation_loader(
        ValidationSection(**section),
        training,
        TOKENIZER,
        seq_len=16,
        local_batch_sequences=2,
        dp_rank=0,
        dp_world_size=1,
    )


def text_of(validation):
    rows_of_tokens = [row for batch in validation for row in batch.tokens.tolist()]
    return TOKENIZER.decode([token for row in rows_of_tokens for token in row])


def test_validation_reads_the_held_out_documents_or_a_file_of_its_own(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [f"text {number}." for number in range(200)])
    other = write_jsonl(tmp_path / "b.jsonl", ["another", "file"])
    training = TrainingSection(dataset="text", dataset_path=str(train))
    assert text_of(validation_of(training)) == "text 99.text 199."
    assert text_of(validation_of(training, dataset_path=str(other))) == "anotherfile"
    assert text_of(validation_of(TrainingSection(), dataset="text", dataset_path=str(other))) == "anotherfile"
    folder = training.model_copy(update={"dataset_path": str(tmp_path)})
    with pytest.raises(UserError, match=r"b\.jsonl is also trained on"):
        validation_of(folder, dataset_path=str(other))


@pytest.fixture
def hub(monkeypatch):
    """A hub of two splits, in place of the network. Returns the calls."""
    calls = []

    def load_dataset(path, name=None, split=None, streaming=False):
        calls.append((path, name, split, streaming))
        if split not in ("train", "validation"):
            raise ValueError(f"Bad split: {split}")
        texts = make_documents(400) if split == "train" else ["validation text"] * 50
        table = datasets.Dataset.from_dict({"text": list(texts), "url": ["x"] * len(texts)})
        return table.to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("titan_fp8.data.feeds.BOOKMARK_EVERY", 16)
    return calls


def test_c4_is_streamed_and_validated_on_its_own_split(hub):
    training = TrainingSection(dataset="c4", seq_len=32)
    samples, _ = steps_of(training, 3)
    assert TOKENIZER.decode(samples[0][:-1]).startswith(make_documents(400)[0][:30])
    assert "validation text" in text_of(validation_of(training, steps=4))
    assert set(hub) == {("allenai/c4", "en", "train", True), ("allenai/c4", "en", "validation", True)}


@pytest.mark.parametrize("stop", [0, 10, 60, 130])
def test_a_stream_of_the_hub_resumes_exactly(hub, stop):
    training = TrainingSection(dataset="hf:owner/name", seq_len=32)
    expected, _ = steps_of(training, stop + 8)
    _, state = steps_of(training, stop)
    assert json.loads(json.dumps(state)) == state
    assert bool(state["bookmark"]) == (stop > 0 and min(row[0] for row in state["cursors"]) * 4 >= 16)
    assert steps_of(training, 8, state)[0] == expected[4 * stop :]
    assert hub[0] == ("owner/name", None, "train", True)


def test_a_bookmark_of_a_real_stream_leads_to_the_documents_behind_it(hub):
    texts = list(make_documents(400))
    feed = StreamFeed(lambda: datasets.load_dataset("x", split="train"), 1, {0: 0})
    for number in range(900):  # three epochs
        assert feed.text(number) == texts[number % 400]
        if number in (50, 399, 400, 450, 850):
            bookmark = feed.bookmark(number)
            again = StreamFeed(lambda: datasets.load_dataset("x", split="train"), 1, {0: number + 1}, bookmark)
            assert json.loads(bookmark)[0] > number - 17
            assert again.text(number + 1) == texts[(number + 1) % 400]
            assert again.epoch(number + 1) == (number + 1) // 400
            assert feed.epoch(number) == number // 400


def test_streams_that_cannot_be_read_give_one_clear_error(monkeypatch, hub):
    with pytest.raises(UserError, match='column "text"'):
        list(stream_texts([{"content": "x"}]))
    with pytest.raises(UserError, match="holds int"):
        list(stream_texts([{"text": 3}]))
    with pytest.raises(UserError, match="less than one sample"):
        loader(TrainingSection(dataset="c4", seq_len=1_000_000))
    with pytest.raises(UserError, match="no known end"):
        validation_of(TrainingSection(dataset="c4"), steps=-1)

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"cannot stream split 'train' of allenai/c4 \(en\).*no route to host"):
        loader(TrainingSection(dataset="c4"))


def test_prepare_writes_the_same_documents_that_text_reads(tmp_path, capsys):
    texts = make_documents(250)
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert prepare.main(["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "tokens")]) == 0
    for split in ("train", "validation"):
        expected, _ = collect_tokens(load_text(tmp_path / "a.jsonl", split), TOKENIZER, None)
        store = open_shards(tmp_path / "tokens", split, TOKENIZER)
        assert store.read(0, store.total_tokens).tolist() == expected.tolist()
    output = capsys.readouterr()
    assert "248 documents" in output.out
    assert "--training.dataset tokens" in output.out
    assert "documents/s" in output.err  # the progress bar
    samples, _ = steps_of(TrainingSection(dataset="tokens", dataset_path=str(tmp_path / "tokens"), seq_len=32), 2)
    assert len(samples) == 8


def test_prepare_keeps_validation_files_apart(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "train.jsonl", ["train text"])
    write_jsonl(tmp_path / "in" / "validation.jsonl", ["validation text"])
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--num-workers", "0"]
    prepare.main(arguments)
    for split in ("train", "validation"):
        store = open_shards(tmp_path / "out", split, TOKENIZER)
        assert TOKENIZER.decode(store.read(0, store.total_tokens).tolist()) == f"{split} text"
    with pytest.raises(UserError, match="holds token shards"):
        load_text(tmp_path / "out", "train")


def test_prepare_refuses_what_it_cannot_do(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    source = ["--input", str(tmp_path), "--output"]
    with pytest.raises(UserError, match="lies inside --input"):
        prepare.main([*source, str(tmp_path / "out")])
    elsewhere = str(tmp_path.parent / "elsewhere")
    with pytest.raises(UserError, match="must be at least"):
        prepare.main([*source, elsewhere, "--shard-size-tokens", "0"])
    with pytest.raises(UserError, match="does not exist"):
        prepare.main([*source, elsewhere, "--tokenizer", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="does not exist"):
        prepare.main(["--input", str(tmp_path / "nowhere"), "--output", elsewhere])
