"""The heart of the data package, for every kind of source: which sample comes when does not depend on who asks."""

import json
import pickle
import time

import pytest
import torch

from tests.unit.data.conftest import make_documents
from titan_fp8.data import sources as sources_module
from titan_fp8.data.config import DataloaderSection, TrainingSection
from titan_fp8.data.dataset_spec import DatasetSpec
from titan_fp8.data.feeds import StreamFeed
from titan_fp8.data.loader import TrainLoader
from titan_fp8.data.sources import (
    BlockSource,
    LaneSource,
    Position,
    StepPlan,
    SyntheticSource,
    collect_tokens,
    lanes_of_slots,
)
from titan_fp8.data.token_store import ArrayStore
from titan_fp8.data.tokenizer import ByteTokenizer
from titan_fp8.runtime.errors import UserError

SEQ_LEN = 24
TOKENIZER = ByteTokenizer()


class FakeStream:
    """What the package uses of `datasets.IterableDataset`."""

    opened = 0
    read = 0

    def __init__(self, texts):
        self.texts, self.place = texts, 0
        FakeStream.opened += 1

    def __iter__(self):
        while self.place < len(self.texts):
            self.place += 1
            FakeStream.read += 1
            yield {"text": self.texts[self.place - 1], "url": "x"}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def make_source(kind, seed=5, shuffle=True, documents=50, masking=True):
    texts = make_documents(documents)
    if kind == "synthetic":
        return SyntheticSource(TOKENIZER, 150, seed, document_masking=True)  # long enough that no two are equal
    if kind == "tokens":
        store = ArrayStore(*collect_tokens(texts, TOKENIZER, None))
        return BlockSource(store, SEQ_LEN, seed, "print", shuffle, document_masking=masking)
    what = texts if kind == "text" else DatasetSpec("stream", "hf:fake", "train", "fake")
    return LaneSource(what, TOKENIZER, SEQ_LEN, seed, kind, shuffle, document_masking=masking)


@pytest.fixture(params=["synthetic", "tokens", "text", "stream"])
def source(request, fake_stream):
    return make_source(request.param, documents=600)


@pytest.fixture
def fake_stream(monkeypatch):
    texts = [*make_documents(600)]
    texts[3:3] = ["", None]  # left out, and not counted
    monkeypatch.setattr(sources_module, "open_stream", lambda spec: FakeStream(texts))
    monkeypatch.setattr("titan_fp8.data.feeds.BOOKMARK_EVERY", 4)


def sequence(ranks, source, steps=60, global_batch=8):
    """The samples of a run on one rank that is never interrupted."""
    return ranks(source, 1, global_batch).samples(steps)


@pytest.mark.parametrize(("world", "local"), [(1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(ranks, source, world, local):
    assert ranks(source, world, 8, local).samples(20) == sequence(ranks, source, 20)


def test_a_rank_gets_consecutive_slots_as_microbatches(ranks, source):
    single = ranks(source, 1, 8, 8).step()[0].tokens
    pair = ranks(source, 2, 8, 2)
    batches = [loader.next_step() for loader in pair.loaders]
    assert [[len(batch.tokens) for batch in each] for each in batches] == [[2, 2], [2, 2]]
    assert torch.equal(torch.cat([batch.tokens for each in batches for batch in each]), single)


@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(ranks, source, stop):
    expected = ranks(source, 1, 8)
    first = ranks(source, 1, 8)
    for _ in range(stop):
        expected.step(), first.step()
    time.sleep(0.02)  # the background reads ahead of the state
    resumed = ranks(source, 1, 8).load(first.state())
    for _ in range(10):
        for a, b in zip(expected.step(), resumed.step(), strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.document_ids, b.document_ids)
    assert resumed.state() == expected.state()


def test_a_state_taken_before_the_first_step_and_loaded_is_the_beginning(ranks, source):
    state = ranks(source, 2, 8).state()
    assert ranks(source, 4, 8).load(state).samples(5) == sequence(ranks, source, 5)


def test_loading_an_earlier_state_goes_back(ranks, source):
    run = ranks(source, 2, 8)
    state = run.state()
    before = run.samples(6)
    assert run.load(state).samples(6) == before


@pytest.mark.parametrize("worlds", [(4, 2, 1), (1, 8, 2), (2, 2, 4, 1)])
def test_a_change_of_world_size_keeps_every_sample_once(ranks, source, worlds):
    state, samples = None, []
    for world in worlds:
        run = ranks(source, world, 8)
        if state:
            run.load(state)
        samples += run.samples(7)
        state = run.state()
    assert samples == sequence(ranks, source, 7 * len(worlds))


@pytest.mark.parametrize(
    "plans",
    [
        [(4, 8), (3, 6), (4, 8)],
        [(2, 4), (1, 2), (4, 8)],
        [(2, 6), (5, 5), (1, 7)],
        [(1, 12), (4, 8), (2, 2), (3, 12)],
    ],
)
def test_a_change_of_the_global_batch_keeps_every_sample_once(ranks, source, plans):
    state, samples = None, []
    for world, global_batch in plans:
        run = ranks(source, world, global_batch)
        if state:
            run.load(state)
        samples += run.samples(9)
        state = run.state()
    reference = sequence(ranks, source, 80, plans[0][1])
    assert len(set(reference)) == len(reference)
    assert samples == reference[: len(samples)]


def test_a_state_is_the_same_on_each_number_of_ranks_and_survives_json_and_pickle(ranks, source):
    runs = [ranks(source, world, 8) for world in (1, 2, 8)]
    for run in runs:
        run.samples(11)
    states = [run.state() for run in runs]
    for state in states:
        state.pop("bookmark")  # any place before the slowest lane will do
    assert states[0] == states[1] == states[2]
    assert json.loads(json.dumps(states[0])) == pickle.loads(pickle.dumps(states[0])) == states[0]
    assert len(json.dumps(states[0])) < 1000


@pytest.mark.parametrize("kind", ["text", "tokens", "synthetic"])
def test_worker_processes_give_the_same_samples_and_state(ranks, kind):
    source = make_source(kind)
    plain, workers = ranks(source, 1, 8), ranks(source, 1, 8, workers=3)
    assert workers.samples(4) == plain.samples(4)
    state = workers.state()
    assert state == plain.state()
    assert workers.load(state).samples(3) == plain.samples(3)


@pytest.mark.parametrize("kind", ["synthetic", "tokens", "text"])
def test_another_seed_gives_another_order_and_the_state_keeps_its_own(ranks, kind):
    first, other = ranks(make_source(kind, seed=1), 1, 8), ranks(make_source(kind, seed=2), 1, 8)
    head = first.samples(2)
    assert head != other.samples(2)
    assert other.load(first.state()).samples(4) == first.samples(4)


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_block_comes_once_an_epoch_in_an_order_of_its_own(ranks, shuffle):
    source = make_source("tokens", shuffle=shuffle)
    blocks = source.blocks
    samples = ranks(source, 1, 1).samples(2 * blocks)
    first, second = samples[:blocks], samples[blocks:]
    assert len(set(first)) == blocks
    assert sorted(first) == sorted(second)
    assert (first == second) != shuffle


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_document_is_read_once_before_any_is_read_again(shuffle):
    source = make_source("text", shuffle=shuffle)
    feed = source.feed(Position(lanes=4), frozenset())
    orders = [[feed.text(epoch * 50 + place) for place in range(50)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(source.documents)
    assert (orders[0] == orders[1]) != shuffle
    assert (orders[0] == list(source.documents)) != shuffle


def test_no_token_of_a_lane_is_lost_or_repeated(ranks):
    source = make_source("text", shuffle=False, masking=False)
    samples = ranks(source, 2, 4).samples(100)
    for lane in range(4):
        windows = samples[lane::4]
        stream = [token for window in windows for token in window[:-1]]
        documents = [source.documents[(lane + 4 * n) % 50] for n in range(100)]
        expected = [token for text in documents for token in TOKENIZER.encode(text, bos=True, eos=True)]
        assert stream == expected[: len(stream)]
        assert [window[-1] for window in windows] == [expected[(n + 1) * SEQ_LEN] for n in range(100)]


def test_each_rank_tokenizes_only_its_share(monkeypatch):
    source = make_source("text", documents=2000)
    encoded = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(
        ByteTokenizer, "encode", lambda self, text, **marks: encoded.append(text) or encode(self, text, **marks)
    )
    position = Position(lanes=8)
    shares = []
    for rank in range(4):
        slots = StepPlan(8, 1, rank, 4).slots()
        encoded.clear()
        reader = source.reader(position, lanes_of_slots(slots, 0, 8, 8))
        for step in range(50):
            for slot in slots:
                reader.window(8 * step + slot)
        shares.append(set(encoded))
    assert not any(shares[a] & shares[b] for a in range(4) for b in range(a))
    assert all(len(share) > 20 for share in shares)


@pytest.mark.parametrize(("global_batch", "lanes"), [(8, 8), (6, 8), (4, 8), (16, 8), (5, 7), (12, 8)])
@pytest.mark.parametrize("first", [0, 3, 16])
def test_lanes_of_slots_are_those_that_a_long_run_meets(global_batch, lanes, first):
    slots = range(1, 3)
    met = {(first + step * global_batch + slot) % lanes for step in range(200) for slot in slots}
    assert lanes_of_slots(slots, first, global_batch, lanes) == met


@pytest.mark.parametrize(("global_batch", "said"), [(8, None), (4, None), (2, None), (6, "2.0"), (16, "2.0")])
def test_what_a_change_of_the_global_batch_costs_is_said(ranks, caplog, monkeypatch, global_batch, said):
    monkeypatch.setattr("titan_fp8.runtime.logging.logger.propagate", True)
    source = make_source("text")
    state = ranks(source, 1, 8).state()
    run = ranks(source, 2, global_batch)
    with caplog.at_level("INFO"):
        run.loaders[0].load_state_dict(state)
    assert ("times its share" in caplog.text) == (said is not None)
    assert (said or "") in caplog.text


def test_with_fewer_documents_than_slots_no_two_slots_read_the_same_text(ranks):
    source = make_source("text", documents=1)
    text = source.documents[0] = "abcdefghij" * 100
    source.documents.total_bytes = 1000
    samples = ranks(source, 1, 8).samples(3)
    stream = TOKENIZER.encode(text, bos=True, eos=True)
    assert [token for sample in samples for token in sample[:-1]] == stream[: 24 * SEQ_LEN]


def test_a_resumed_stream_continues_at_its_bookmark_instead_of_the_beginning(ranks, fake_stream):
    run = ranks(make_source("stream", masking=False), 1, 2)
    run.samples(50)
    state = run.state()
    run.close()
    bookmark = json.loads(state["bookmark"])
    cursors = [lane + 2 * document for lane, (document, _) in enumerate(state["cursors"])]
    assert 0 <= min(cursors) - bookmark[0] <= 4
    assert bookmark[0] > 30
    FakeStream.read = 0
    resumed = ranks(make_source("stream", masking=False), 1, 2).load(state)
    resumed.step()
    resumed.close()
    assert 0 < FakeStream.read < 30


def test_a_bookmark_is_the_newest_one_that_leaves_nothing_out(fake_stream):
    texts = list(make_documents(50))
    feed = StreamFeed(lambda: FakeStream(texts), 1, {0: 0})
    for number in range(31):
        feed.text(number)
    assert feed.bookmark(2) is None
    for oldest, expected in [(4, 4), (11, 8), (12, 12), (30, 28)]:
        assert json.loads(feed.bookmark(oldest))[0] == expected


def test_a_stream_begins_again_at_its_end_and_resumes_in_a_later_epoch(ranks, fake_stream, monkeypatch):
    texts = list(make_documents(50))
    monkeypatch.setattr(sources_module, "open_stream", lambda spec: FakeStream(texts))
    expected = [token for _ in range(5) for text in texts for token in TOKENIZER.encode(text, bos=True, eos=True)]
    run = ranks(make_source("stream", masking=False), 1, 1)
    steps = len(expected) // SEQ_LEN - 2
    samples = run.samples(steps)
    assert [token for sample in samples for token in sample[:-1]] == expected[: steps * SEQ_LEN]
    assert json.loads(run.state()["bookmark"])[1] == 4
    resumed = ranks(make_source("stream", masking=False), 1, 1).load(run.state())
    assert resumed.samples(20) == run.samples(20)


def test_an_empty_stream_is_an_error_of_its_own(ranks, monkeypatch):
    monkeypatch.setattr(sources_module, "open_stream", lambda spec: FakeStream(["", None]))
    with pytest.raises(UserError, match="empty"):
        ranks(make_source("stream", masking=False), 1, 2).step()


class Broken(SyntheticSource):
    """A source that fails at one sample."""

    def window(self, sample):
        if sample == 20:
            raise UserError("sample 20 is bad")
        return super().window(sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_background_is_raised_where_the_step_would_be(ranks, workers):
    run = ranks(Broken(TOKENIZER, SEQ_LEN, 0), 1, 8, workers=workers)
    run.step(), run.step()
    for _ in range(2):
        with pytest.raises(UserError, match=r"^sample 20 is bad$"):
            run.step()
    assert run.loaders[0].samples == 16


class Fatal(SyntheticSource):
    """A source whose process is killed."""

    def window(self, sample):
        if sample == 9:
            import os

            os._exit(3)
        return super().window(sample)


def test_a_worker_that_dies_is_reported_with_its_exit_code(ranks):
    run = ranks(Fatal(TOKENIZER, SEQ_LEN, 0), 1, 8, workers=2)
    run.step()
    with pytest.raises(UserError, match="exit code 3"):
        run.step()


def test_a_state_of_other_data_is_refused_by_name(ranks):
    state = ranks(make_source("text"), 1, 8).state()
    with pytest.raises(UserError, match=r"documents was 50 and is 51.*exclude_from_loading"):
        ranks(make_source("text", documents=51), 1, 8).load(state)
    with pytest.raises(UserError, match="shuffle was True and is False"):
        ranks(make_source("text", shuffle=False), 1, 8).load(state)
    with pytest.raises(UserError, match="dataset was 'text' and is 'tokens'"):
        ranks(make_source("tokens"), 1, 8).load(state)
    with pytest.raises(UserError, match="version None"):
        ranks(make_source("text"), 1, 8).load({})


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="12 is not a multiple of 8"):
        StepPlan(12, 2, 0, 4)


def test_a_closed_loader_gives_no_steps_and_closes_twice(ranks):
    loader = ranks(make_source("synthetic"), 1, 8).loaders[0]
    loader.next_step()
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()


def test_a_new_epoch_is_logged_when_its_first_step_is_handed_out(ranks, log_messages):
    source = make_source("tokens")
    run = ranks(source, 2, 4)
    run.samples(source.blocks // 4)
    assert "epoch" not in "\n".join(log_messages)
    run.samples(2)
    assert "\n".join(log_messages).count("epoch 2 begins") == 1


def test_the_state_of_several_ranks_without_a_way_to_exchange_it_is_an_error():
    loader = TrainLoader(make_source("text"), StepPlan(8, 1, 0, 2), TrainingSection())
    with pytest.raises(RuntimeError, match=r"torch\.distributed"):
        loader.state_dict()


def test_the_background_reads_no_further_ahead_than_asked():
    seen = []

    class Watched(SyntheticSource):
        def window(self, sample):
            seen.append(sample)
            return super().window(sample)

    training = TrainingSection(dataloader=DataloaderSection(num_workers=0))
    with TrainLoader(Watched(TOKENIZER, SEQ_LEN, 0), StepPlan(1, 1, 0, 1), training) as loader:
        loader.next_step()
        time.sleep(0.2)
        assert 2 <= len(seen) <= 4
