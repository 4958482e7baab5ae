import itertools

import numpy as np
import pytest

from titan_fp8.data import packing
from titan_fp8.data.batch import IGNORE_INDEX, WindowBlock
from titan_fp8.data.packing import Cursor, Lane, Window, encode_document

TEXTS = ["hello", "", "a", "some longer text", "xyz" * 20]


BEGINNING = Cursor()


def lane(tokenizer, seq_len, cursor=BEGINNING, masking=False):
    return Lane(lambda n: TEXTS[n % len(TEXTS)], tokenizer, seq_len, cursor=cursor, document_masking=masking)


def endless_stream(tokenizer):
    for text in itertools.cycle(TEXTS):
        if text:
            yield from tokenizer.encode(text, bos=True, eos=True)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 300])
def test_windows_are_the_stream_cut_with_one_token_of_overlap(tokenizer, seq_len):
    stream = list(itertools.islice(endless_stream(tokenizer), seq_len * 10 + 1))
    packed = lane(tokenizer, seq_len)
    for number in range(10):
        window = packed.next_window()
        assert window.tokens.tolist() == stream[number * seq_len : (number + 1) * seq_len + 1]
        assert window.length == seq_len + 1
        assert window.tokens.dtype == np.int32


@pytest.mark.parametrize("seq_len", [1, 7, 64])
@pytest.mark.parametrize("masking", [False, True])
def test_a_lane_continues_exactly_from_its_cursor(tokenizer, seq_len, masking):
    packed = lane(tokenizer, seq_len, masking=masking)
    for _ in range(25):
        resumed = lane(tokenizer, seq_len, packed.cursor, masking)
        assert resumed.cursor == packed.cursor
        a, b = packed.next_window(), resumed.next_window()
        np.testing.assert_array_equal(a.tokens, b.tokens)
        if masking:
            np.testing.assert_array_equal(a.document_ids, b.document_ids)
        assert resumed.cursor == packed.cursor


def test_document_ids_change_exactly_at_each_beginning_of_a_document(tokenizer):
    packed = lane(tokenizer, 100, masking=True)
    for _ in range(5):
        window = packed.next_window()
        begins = window.tokens == tokenizer.bos_id
        begins[0] = False
        np.testing.assert_array_equal(window.document_ids, np.cumsum(begins))


def test_a_long_document_is_tokenized_in_pieces_that_join_seamlessly(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 16)
    text = "one two three\nfour five\n" + "x" * 50 + " six seven eight nine ten eleven twelve"
    pieces = list(encode_document(tokenizer, text))
    assert len(pieces) > 4
    assert max(map(len, pieces)) <= 18
    assert np.concatenate(pieces).tolist() == tokenizer.encode(text, bos=True, eos=True)
    decoded = [tokenizer.decode(piece.tolist()) for piece in pieces]
    assert decoded[0] == "one two three\n"
    assert decoded[-1].startswith(" ")


def test_a_batch_has_the_next_token_as_label(tokenizer):
    windows = [lane(tokenizer, 8).next_window() for _ in range(4)]
    batches = WindowBlock.stack(windows).batches(2)
    assert [batch.tokens.shape for batch in batches] == [(2, 8), (2, 8)]
    assert batches[0].tokens[0].tolist() == windows[0].tokens[:-1].tolist()
    assert batches[0].labels[0].tolist() == windows[0].tokens[1:].tolist()
    assert batches[0].document_ids is None


def test_labels_across_documents_are_ignored_only_under_document_masking():
    tokens = np.arange(5, dtype=np.int32)
    masked = Window(tokens, np.array([0, 0, 1, 1, 2], dtype=np.int32), 5)
    assert WindowBlock.stack([masked]).batches(1)[0].labels.tolist() == [[1, IGNORE_INDEX, 3, IGNORE_INDEX]]
    assert WindowBlock.stack([masked]).batches(1)[0].document_ids.tolist() == [[0, 0, 1, 1]]
    assert WindowBlock.stack([Window(tokens, None, 5)]).batches(1)[0].labels.tolist() == [[1, 2, 3, 4]]


def test_labels_behind_the_real_tokens_are_ignored():
    windows = [Window(np.arange(5, dtype=np.int32), None, length) for length in (5, 3, 1, 0)]
    labels = WindowBlock.stack(windows).batches(4)[0].labels
    ignored = IGNORE_INDEX
    assert labels.tolist() == [[1, 2, 3, 4], [1, 2, ignored, ignored], [ignored] * 4, [ignored] * 4]


def test_a_batch_moves_as_a_whole():
    window = Window(np.arange(5, dtype=np.int32), np.zeros(5, dtype=np.int32), 5)
    batch = WindowBlock.stack([window]).batches(1)[0].to("meta")
    assert {batch.tokens.device.type, batch.labels.device.type, batch.document_ids.device.type} == {"meta"}
