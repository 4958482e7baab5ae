"""Files that are generated from the code: written anew, or compared with what they should hold."""

import sys
from collections.abc import Sequence
from pathlib import Path

from titan_fp8.runtime.errors import UserError

CHECK = "--check"


def write_or_check(argv: Sequence[str], file: Path, text: str, *, command: str) -> int:
    """Write `text` to `file`, or with `--check` in `argv` return 1 when it holds something else.

    Raises:
        UserError: `argv` holds anything else.
    """
    strays = [word for word in argv if word not in (CHECK, "--help", "-h")]
    if strays:
        raise UserError(f"{command}: {strays[0]}: no such option; there is {CHECK}")
    if "--help" in argv or "-h" in argv:
        print(f"usage: {command} [{CHECK}]\n\nWrites {file}, or with {CHECK} says whether it is current.")
        return 0
    if CHECK not in argv:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
        return 0
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return 0
    print(f"{file} is stale; run `{command}`", file=sys.stderr)
    return 1
