"""`titan-fp8 COMMAND ...`: finds the command's module and runs its `main`.

A command is `titan_fp8.cli.<command>` with `main(argv) -> int`. It is imported only when it is asked for, so that
`check` answers without torch. A mistake that the user can mend (`UserError`) ends in its message and exit code 2;
any other exception is a defect and keeps its traceback.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from titan_fp8.runtime.errors import UserError
from titan_fp8.runtime.suggest import did_you_mean

COMMANDS = {
    "check": "check a job's configuration and model, without training",
    "plan": "show what the converters do to each module of a job's model",
    "prepare": 'write text as token shards for training.dataset = "tokens"',
    "plot": "draw the loss curves of runs",
    "config-docs": "write docs/configuration.md",
    "schema": "write the JSON schema of the TOML format",
}
"""Command -> what it does. The module has underscores where the command has dashes."""

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else ""
    if command in ("--help", "-h"):
        print(_usage())
        return 0
    if command not in COMMANDS:
        problem = f"no such command: {command}{did_you_mean(command, COMMANDS)}\n\n" if command else ""
        print(f"{problem}{_usage()}", file=sys.stderr)
        return USAGE_ERROR
    # An installed script has its own folder on sys.path, `python -m` the current one: user modules are found in both.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(f"titan_fp8.cli.{command.replace('-', '_')}").main(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this, closing standard output complains once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {purpose}" for command, purpose in COMMANDS.items()]
    return "\n".join(["usage: titan-fp8 COMMAND ...", "", *lines, "", "titan-fp8 COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
