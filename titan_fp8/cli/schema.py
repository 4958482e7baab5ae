"""`titan-fp8 schema [--check]`: writes the JSON schema of the TOML format, or says whether it is current."""

from collections.abc import Sequence

from titan_fp8.cli.generated import write_or_check
from titan_fp8.config.schema import SCHEMA_FILE, schema_text
from titan_fp8.job_config import JobConfig


def main(argv: Sequence[str]) -> int:
    """Write `titan_fp8/config/schema.json`; with `--check`, return 1 if it is not current."""
    return write_or_check(argv, SCHEMA_FILE, schema_text(JobConfig), command="titan-fp8 schema")
