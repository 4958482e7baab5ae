"""What is wrong with a configuration: all of it at once, each with the place where it was written."""

from collections.abc import Iterable
from dataclasses import dataclass

from titan_fp8.runtime.errors import UserError


@dataclass(frozen=True)
class Violation:
    """One mistake.

    Attributes:
        place: where it was written: `file.toml:14`, `--training.steps`, or a section's name where several keys
            contradict each other. Empty where the message says it.
        message: what is wrong and what to do instead.
    """

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class ConfigErrors(UserError):
    """All mistakes of one configuration. `str()` and `render()` give one line each."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = list(violations)
        super().__init__(self.render())

    def render(self) -> str:
        """One line a violation, in the order in which they were found."""
        return "\n".join(str(violation) for violation in self.violations)


class HelpRequested(Exception):
    """The command line asks for help; `str()` is the text to print."""
