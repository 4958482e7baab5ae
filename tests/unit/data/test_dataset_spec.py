import pytest

from titan_fp8.data.config import TrainingSection, ValidationSection
from titan_fp8.data.dataset_spec import DatasetSpec, training_spec, validation_spec
from titan_fp8.runtime.errors import UserError


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    return str(tmp_path)


def training(dataset, path=None, **more):
    return TrainingSection(dataset=dataset, dataset_path=path, **more)


def test_names_of_sources():
    assert training_spec(training("synthetic")).kind == "synthetic"
    assert training_spec(training("c4_test")).kind == "synthetic"
    assert training_spec(training("c4")) == DatasetSpec("stream", "c4", "train", "allenai/c4", "en")
    assert training_spec(training("c4_validation")).split == "validation"
    assert training_spec(training("hf:a/b")) == DatasetSpec("stream", "hf:a/b", "train", "a/b", None)
    assert training_spec(training("hf:a/b:en")) == DatasetSpec("stream", "hf:a/b:en", "train", "a/b", "en")
    assert training_spec(training("c4", "/mirror/c4")).path == "/mirror/c4"


def test_local_sources_have_a_path(path):
    assert training_spec(training("text", path)) == DatasetSpec("text", "text", "train", path)
    assert training_spec(training("tokens", path)).kind == "tokens"
    assert training_spec(training("c4_test", path)).kind == "text"


@pytest.mark.parametrize(
    ("dataset", "more", "message"),
    [
        ("syntetic", {}, r'not one of .*did you mean "synthetic"'),
        ("hf:", {}, "names no data set"),
        ("text", {}, r"needs training\.dataset_path"),
        ("tokens", {}, r"needs training\.dataset_path"),
        ("text", {"path": "/nowhere/at/all"}, '"/nowhere/at/all" does not exist'),
        ("synthetic", {"path": "/tmp"}, "has no use"),
        ("synthetic", {"hold_out_every": 10}, "hold_out_every = 10 is for text"),
    ],
)
def test_impossible_training_sources_are_refused(dataset, more, message):
    with pytest.raises(UserError, match=message):
        training_spec(training(dataset, **more))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("synthetic", DatasetSpec("synthetic", "synthetic", "validation")),
        ("c4_test", DatasetSpec("synthetic", "c4_test", "validation")),
        ("c4", DatasetSpec("stream", "c4", "validation", "allenai/c4", "en")),
        ("hf:a/b", DatasetSpec("stream", "hf:a/b", "validation", "a/b")),
    ],
)
def test_validation_is_by_default_the_held_out_part_of_the_training_source(dataset, expected):
    assert validation_spec(ValidationSection(), training(dataset)) == expected


@pytest.mark.parametrize("section", [{}, {"dataset": "text"}, {"dataset_path": "same"}])
def test_validation_on_the_training_path_is_its_held_out_part(path, section):
    if "dataset_path" in section:
        section = {"dataset_path": path + "/."}
    expected = DatasetSpec("text", "text", "validation", path)
    assert validation_spec(ValidationSection(**section), training("text", path)) == expected


def test_validation_on_a_path_of_its_own_may_read_all_of_it(path, tmp_path):
    (tmp_path / "other").mkdir()
    spec = validation_spec(ValidationSection(dataset_path=str(tmp_path / "other")), training("text", path))
    assert (spec.split, spec.own_path) == ("validation", True)
    spec = validation_spec(ValidationSection(dataset="text", dataset_path=path), training("synthetic"))
    assert spec.own_path


def test_validation_never_reads_what_training_reads():
    with pytest.raises(UserError, match="none is left"):
        validation_spec(ValidationSection(), training("c4_validation"))
    for dataset in ("c4", "c4_validation"):
        with pytest.raises(UserError, match="is what training reads"):
            validation_spec(ValidationSection(dataset=dataset), training(dataset))
    assert validation_spec(ValidationSection(dataset="c4_validation"), training("c4")).split == "validation"
    assert validation_spec(ValidationSection(dataset="hf:a/b"), training("hf:a/b")).split == "validation"
