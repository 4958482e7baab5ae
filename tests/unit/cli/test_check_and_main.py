"""`titan-fp8`: finding commands, exit codes, and the two passes of `check`."""

import sys
import types

import pytest

from titan_fp8.cli import check, config_docs, generated
from titan_fp8.cli.main import COMMANDS, main
from titan_fp8.config.errors import Violation
from titan_fp8.runtime.errors import UserError


@pytest.fixture
def model_rules(monkeypatch):
    """The second pass, replaced: jobs that it was asked about, and the violations that it will find."""
    asked, violations = [], []

    def check_model(job):
        asked.append(job)
        return violations

    monkeypatch.setitem(sys.modules, "titan_fp8.model_plan", types.SimpleNamespace(check_model=check_model))
    return asked, violations


def test_a_right_configuration_is_asked_about_the_model_and_ends_with_0(model_rules, capsys):
    asked, _ = model_rules
    assert main(["check", "--model.converters=float8", "--training.steps=5"]) == 0
    assert [job.training.steps for job in asked] == [5]
    output = capsys.readouterr()
    assert 'read as "quantize.linear.float8"' in output.err
    assert output.out == ""


def test_the_model_is_not_asked_about_a_wrong_configuration(model_rules, capsys):
    asked, _ = model_rules
    assert main(["check", "--training.steps=0", "--training.seq_len=0"]) == 2
    assert asked == []
    assert capsys.readouterr().err.count("must be at least 1") == 2


def test_violations_of_the_model_are_printed_and_end_with_2(model_rules, capsys):
    model_rules[1].append(Violation("model", "is too large"))
    assert main(["check"]) == 2
    assert capsys.readouterr().err == "model: is too large\n"


def test_only_rank_0_speaks(model_rules, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert check.main(["--training.steps=0"]) == 2
    assert capsys.readouterr().err == ""


def test_help_goes_to_standard_output(capsys):
    assert main(["check", "--help", "training"]) == 0
    assert "--training.seq_len" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["chek"], 2)])
def test_without_a_command_all_are_listed(argv, code, capsys):
    assert main(argv) == code
    output = capsys.readouterr()
    text = output.err if code else output.out
    assert all(command in text for command in COMMANDS)
    assert ('did you mean "check"?' in text) is (argv == ["chek"])


def test_a_users_mistake_in_a_command_is_one_line_and_2(capsys):
    assert main(["schema", "--chekc"]) == 2
    assert capsys.readouterr().err == "titan-fp8 schema: --chekc: no such option; there is --check\n"


def test_a_defect_in_a_command_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise KeyError("a defect")

    monkeypatch.setattr(config_docs, "main", broken)
    with pytest.raises(KeyError):
        main(["config-docs"])


def test_an_interrupt_ends_a_command_without_a_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(config_docs, "main", interrupted)
    assert main(["config-docs"]) == 130
    assert capsys.readouterr() == ("", "")


def test_generated_files_are_written_and_compared(tmp_path, capsys):
    file = tmp_path / "folder" / "page.md"

    def run(text, *argv):
        return generated.write_or_check(argv, file, text, command="make page")

    assert run("one", "--check") == 1
    assert "is stale; run `make page`" in capsys.readouterr().err
    assert run("one") == 0
    assert run("one", "--check") == 0
    assert run("two", "--check") == 1
    assert file.read_text() == "one"
    with pytest.raises(UserError, match="no such option"):
        run("two", "--force")
