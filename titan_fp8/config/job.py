"""`[job]`: which file configures the run, and where the run's files go."""

from titan_fp8.config.section import Section, key


class JobSection(Section):
    """The run itself: its configuration file and its folder."""

    config_file: str | None = key(None, min_length=1)
    """TOML file to read. Keys on the command line override it. A path that does not exist is looked up by its base
    name in `train_configs/`. Without it every key keeps its default."""

    dump_folder: str = key("./outputs", min_length=1)
    """The run's folder: the resolved configuration, metrics, checkpoints and traces are written below it. The same
    command again resumes from the newest complete checkpoint in it when checkpoints are enabled."""

    description: str = "default job"
    """Free text that names the run in the log and in the trackers."""

    print_config: bool = False
    """Print the resolved configuration as TOML when the run starts."""

    save_config_file: str | None = key(None, min_length=1)
    """Write a further copy of the resolved configuration to this file, relative to `dump_folder`. The run's folder
    holds `config.toml` in any case."""

    custom_config_module: str = ""
    """Python module (dotted name) that exports a subclass of `JobConfig` called `JobConfig`. It is imported before the
    configuration is parsed and becomes its root, so that its keys can be set like all others."""
