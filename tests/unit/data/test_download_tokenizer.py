import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
from huggingface_hub.errors import EntryNotFoundError
from tokenizers.models import WordLevel

SCRIPT = Path(__file__).parents[3] / "scripts" / "download_tokenizer.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("download_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository in a folder, in place of the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    tokenizers.Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))

    def hf_hub_download(repo_id, name, local_dir, token):
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"no {name}")
        shutil.copy(folder / name, local_dir)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return folder


def test_a_tokenizer_is_fetched_and_checked(script, hub, tmp_path, capsys):
    assert script.main(["owner/model", "--local_dir", str(tmp_path / "assets")]) == 0
    assert "2 codes, bos None, eos 1" in capsys.readouterr().out
    assert (tmp_path / "assets" / "model" / "tokenizer.json").is_file()


def test_a_repository_without_a_tokenizer_is_one_clear_error(script, hub, tmp_path, capsys):
    (hub / "tokenizer.json").unlink()
    assert script.main(["owner/model", "--local_dir", str(tmp_path / "assets")]) == 2
    assert "owner/model holds no tokenizer.json" in capsys.readouterr().err
