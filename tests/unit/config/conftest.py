"""Reading a job from a TOML text and options, in a folder of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from titan_fp8.job_config import ConfigErrors, JobConfig, load_job_config


@dataclass
class Reading:
    """What came of one attempt to read a job."""

    job: JobConfig | None = None
    notices: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> JobConfig:
        """The job; the test fails if it was refused."""
        assert self.job is not None, self.errors
        return self.job

    @property
    def error(self) -> str:
        """The one error; the test fails if there is another number of them."""
        assert len(self.errors) == 1, self.errors
        return self.errors[0]


Read = Callable[..., Reading]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """`read("--training.steps", "5", toml="[training]...", world_size=2)`; the TOML file is called `my.toml`."""
    monkeypatch.chdir(tmp_path)

    def attempt(*argv: str, toml: str | None = None, world_size: int = 1) -> Reading:
        options = list(argv)
        if toml is not None:
            Path("my.toml").write_text(toml, encoding="utf-8")
            options = ["--job.config_file", "my.toml", *options]
        try:
            job, notices = load_job_config(options, {"WORLD_SIZE": str(world_size)})
        except ConfigErrors as errors:
            return Reading(errors=errors.render().split("\n"))
        return Reading(job, notices)

    return attempt
