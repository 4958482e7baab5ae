import pytest
import torch

from tests.unit.data.conftest import make_documents, rows
from titan_fp8.data.batch import IGNORE_INDEX
from titan_fp8.data.config import DataloaderSection, TrainingSection, ValidationSection
from titan_fp8.data.loader import build_train_loader, build_validation_loader
from titan_fp8.data.sources import collect_tokens
from titan_fp8.data.token_writer import write_token_folder
from titan_fp8.data.tokenizer import ByteTokenizer
from titan_fp8.runtime.errors import UserError

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens"
    splits = {"train": make_documents(40), "validation": make_documents(9)}
    write_token_folder(path, splits, TOKENIZER, shard_tokens=100, num_workers=0)
    return path


def build(training, rank=0, world=1, local=2, seq_len=16, **section):
    return build_validation_loader(
        ValidationSection(**section),
        training,
        TOKENIZER,
        seq_len=seq_len,
        local_batch_sequences=local,
        dp_rank=rank,
        dp_world_size=world,
    )


def tokens_section(folder):
    return TrainingSection(dataset="tokens", dataset_path=str(folder))


@pytest.mark.parametrize(("world", "local"), [(1, 1), (1, 3), (2, 2), (3, 4), (4, 5)])
def test_each_token_is_a_label_exactly_once_on_any_number_of_ranks(folder, world, local):
    loaders = [build(tokens_section(folder), rank, world, local) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert len({len(each) for each in batches}) == 1
    assert [len(loader) for loader in loaders] == [len(each) for each in batches]
    labels = [
        label
        for step in zip(*batches, strict=True)
        for batch in step
        for label in batch.labels.flatten().tolist()
        if label != IGNORE_INDEX
    ]
    tokens, _ = collect_tokens(make_documents(9), TOKENIZER, None)
    assert labels == tokens[1:].tolist()


@pytest.mark.parametrize("dataset", ["synthetic", "tokens"])
def test_each_validation_sees_the_same_batches(folder, dataset):
    training = TrainingSection() if dataset == "synthetic" else tokens_section(folder)
    loader = build(training, steps=3)
    first, second = list(loader), list(loader)
    assert len(first) == 3
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))


def test_a_number_of_steps_beyond_the_data_ends_with_the_data(folder):
    assert len(list(build(tokens_section(folder), steps=10_000))) == len(build(tokens_section(folder)))


def test_synthetic_validation_shares_no_sample_with_training():
    training = TrainingSection(seq_len=200)
    sizes = {"global_batch_sequences": 50, "local_batch_sequences": 50, "dp_rank": 0, "dp_world_size": 1}
    with build_train_loader(training, TOKENIZER, seed=0, **sizes) as loader:
        trained = {row for batch in loader.next_step() for row in rows(batch)}
    validated = {row for batch in build(training, local=50, seq_len=200, steps=1) for row in rows(batch)}
    assert len(trained) == len(validated) == 50
    assert not trained & validated


def test_workers_that_are_kept_give_the_same_batches_again(folder):
    dataloader = DataloaderSection(num_workers=2, persistent_workers=True, prefetch_factor=1)
    plain = list(build(tokens_section(folder)))
    loader = build(tokens_section(folder), dataloader=dataloader)
    for _ in range(3):
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(loader, plain, strict=True))
    for _ in loader:
        break  # a validation that is cut short does not shift the next one
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(loader, plain, strict=True))
    loader.close()


def test_impossible_validations_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"no known end; set validation\.steps"):
        build(TrainingSection(), steps=-1)
    write_token_folder(tmp_path / "tokens", {"train": make_documents(5)}, TOKENIZER, shard_tokens=100, num_workers=0)
    with pytest.raises(UserError, match="no validation split"):
        build(tokens_section(tmp_path / "tokens"), steps=1)


def test_document_masking_covers_validation(folder):
    training = tokens_section(folder).model_copy(update={"document_masking": True})
    batches = list(build(training))
    assert all(batch.document_ids is not None for batch in batches)
    assert sum((batch.labels == TOKENIZER.bos_id).sum().item() for batch in batches) == 0
