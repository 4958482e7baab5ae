"""From a command line to a checked job: defaults < TOML file < command line.

The steps, each of which goes on after a mistake so that all are reported together:

1. the options; the TOML file that they name; a configuration class of the user's own;
2. names: unknown ones are answered with the nearest, older ones are read as what they became;
3. types and ranges, source by source: a mistake in the file counts even where the command line overrides it;
4. sources against each other: keys without effect, sections of converters that are not named;
5. the job; values whose feature does not exist yet; rules between keys, of a section and of the whole job. A rule that
   reads a key which was refused before is left out: its answer would mean nothing.

Nothing here knows a section by name: `titan_fp8.job_config` gives the root class and the rules.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from titan_fp8.config.command_line import enter_options, help_topic, last_value, split_options
from titan_fp8.config.effect import refuse_keys_without_effect
from titan_fp8.config.errors import ConfigErrors, HelpRequested, Violation
from titan_fp8.config.given import CONFIG_FILE_KEY, Given, Sources
from titan_fp8.config.help import help_text
from titan_fp8.config.keys import Key, all_keys, all_sections
from titan_fp8.config.section import Problem, Section
from titan_fp8.config.text import show
from titan_fp8.config.toml_file import TomlFile, enter_toml, find_config_file, read_toml
from titan_fp8.config.values import build, check_values

RootT = TypeVar("RootT", bound=Section)
Rule = Callable[[Any, int], Iterator[Problem]]
"""A rule over the whole job: (job, number of processes) -> what is broken."""
SourceRule = Callable[[Mapping[str, Key], Sources], None]
"""A rule over what was given where. It notes violations or drops keys."""


class Loader(Generic[RootT]):
    """How to read one kind of job.

    Attributes:
        root: its class.
        rules: rules over the whole job.
        source_rules: rules over what was given where.
        find_root: gives the user's own class for `job.custom_config_module`, or raises `ValueError`.
    """

    def __init__(
        self,
        root: type[RootT],
        *,
        rules: Sequence[Rule] = (),
        source_rules: Sequence[SourceRule] = (),
        find_root: Callable[[str], type[RootT]] | None = None,
    ) -> None:
        self.root = root
        self.rules = rules
        self.source_rules = source_rules
        self.find_root = find_root

    def load(self, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[RootT, list[str]]:
        """The job that `argv` (without the program's name) asks for, and lines to log about how it was read.

        Args:
            argv: options.
            environ: WORLD_SIZE is the number of processes, 1 if it is not set.

        Raises:
            ConfigErrors: with every violation.
            HelpRequested: `--help` is among the options.
        """
        sources = Sources()
        options = split_options(argv, sources)
        topic = help_topic(options)
        place = f"--{CONFIG_FILE_KEY}"
        asked = last_value(options, CONFIG_FILE_KEY)
        path = find_config_file(asked, place, sources) if asked and topic is None else None
        file = None if path is None else read_toml(path, sources)
        root = self._root(last_value(options, _CUSTOM_KEY), file, sources)
        keys, sections = all_keys(root), all_sections(root)
        if topic is not None:
            raise HelpRequested(help_text(root, topic))
        if file is not None:
            enter_toml(file, keys, sections, sources)
        enter_options(options, keys, sections, sources)
        if path is not None and CONFIG_FILE_KEY in sources.cli:
            sources.cli[CONFIG_FILE_KEY] = Given(CONFIG_FILE_KEY, str(path), place, "cli", show(str(path)))
        job = self._check(root, keys, sources, _world_size(environ, sources))
        if sources.violations:
            raise ConfigErrors(sources.violations)
        return job, sources.notices

    def _root(self, asked: str | None, file: TomlFile | None, sources: Sources) -> type[RootT]:
        place = f"--{_CUSTOM_KEY}"
        if asked is None and file is not None:
            asked, place = file.get(_CUSTOM_KEY), file.place(tuple(_CUSTOM_KEY.split(".")))
        if not asked or not isinstance(asked, str) or self.find_root is None:
            return self.root
        try:
            return self.find_root(asked)
        except ValueError as error:
            sources.violations.append(Violation(place, f"{_CUSTOM_KEY} = {show(asked)}: {error}"))
            return self.root

    def _check(self, root: type[RootT], keys: Mapping[str, Key], sources: Sources, world_size: int) -> RootT:
        check_values(root, keys, sources.toml, sources)
        check_values(root, keys, sources.cli, sources)
        for source_rule in (*self.source_rules, refuse_keys_without_effect):
            source_rule(keys, sources)
        values = {path: given.value for path, given in (sources.toml | sources.cli).items()}
        job, missing = build(root, keys, values, sources)
        _refuse_unsupported(keys, sources)
        found = [*_section_problems(job, "", bool(missing))]
        for rule in self.rules:
            found += _complete(rule(job, world_size), bool(missing))
        sources.violations += [_violation(problem, keys, sources) for problem in found]
        return job  # pyright: ignore[reportReturnType] (build gives an instance of root)


_CUSTOM_KEY = "job.custom_config_module"


def _world_size(environ: Mapping[str, str], sources: Sources) -> int:
    text = environ.get("WORLD_SIZE", "1")
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    sources.violations.append(Violation("WORLD_SIZE", f"{show(text)} in the environment is no number of processes"))
    return 1


def _refuse_unsupported(keys: Mapping[str, Key], sources: Sources) -> None:
    for path, key in keys.items():
        given = sources.winner(path)
        if given is None or given.value == key.default:
            continue
        if not key.is_supported or given.value in key.unsupported_values:
            remedy = f"leave it at {show(key.default)}" if key.default is not None else "leave it unset"
            sources.violations.append(given.violation(f"not supported yet; {remedy}"))


def _section_problems(section: Section, prefix: str, is_incomplete: bool) -> Iterator[Problem]:
    for problem in _complete(section.problems(), is_incomplete):
        path = ".".join(part for part in (prefix.rstrip("."), problem.key) if part)
        yield Problem(path, problem.text, problem.is_sentence)
    for name in type(section).model_fields:
        inner = section.__dict__.get(name)
        if isinstance(inner, Section):
            yield from _section_problems(inner, f"{prefix}{name}.", is_incomplete)


def _complete(problems: Iterator[Problem], is_incomplete: bool) -> list[Problem]:
    """What a rule finds. Where values were refused, a rule ends when it reads one of them."""
    found = []
    try:
        for problem in problems:
            found.append(problem)
    except AttributeError:
        if not is_incomplete:
            raise
    return found


def _violation(problem: Problem, keys: Mapping[str, Key], sources: Sources) -> Violation:
    given = sources.winner(problem.key)
    if problem.key not in keys:
        return Violation(problem.key, problem.text)
    key = keys[problem.key]
    place = key.section if given is None else given.place
    if problem.is_sentence:
        return Violation("" if given is None else given.place, problem.text)
    value = show(key.default) if given is None else given.text
    return Violation(place, f"{key.path} = {value}: {problem.text}")
