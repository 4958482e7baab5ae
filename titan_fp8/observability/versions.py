"""What a run depended on, written beside its configuration: the same TOML under another PyTorch is another run."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "numpy", "pydantic", "datasets", "tokenizers", "safetensors", "tensorboard")


def collect_versions() -> dict[str, str | None]:
    """What a run depended on: packages, Python, CUDA, device and the git revision of the source; None where absent."""
    versions: dict[str, str | None] = {"titan_fp8": _package_version("titan-fp8"), "git_revision": git_revision()}
    versions["python"] = platform.python_version()
    versions |= {name: _package_version(name) for name in _PACKAGES}
    versions["cuda"] = torch.version.cuda
    versions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions["platform"] = platform.platform()
    return versions


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(source: Path | None = None) -> str | None:
    """The commit that `source` (default: this package) is checked out at, with `-dirty` when tracked files differ.

    None when it is no git checkout, git is missing, or the checkout tracks none of `source` (an installed copy that
    happens to lie inside another project's repository).
    """
    folder = source or Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--", "."):
            return None
        revision = git("rev-parse", "HEAD")
        return f"{revision}-dirty" if git("status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.SubprocessError):
        return None
