#!/usr/bin/env python3
"""Install the peer, and what it needs that is missing here, into a folder of its own.

    python scripts/peer/install.py --site DIR                   from the package registry
    python scripts/peer/install.py --site DIR --wheels DIR      from wheels, without network

The folder is put on `PYTHONPATH` for the peer's processes alone; the environment stays as it is, and PyTorch is the
environment's. Of the wheels those are left out whose package the environment has already. A folder that has the peer
already is not touched.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PEER = {"torchtitan": "0.2.2", "torchao": "0.17.0"}
REQUIREMENTS = [f"{name}=={version}" for name, version in PEER.items()]


def install(site: Path, wheels: Path | None) -> None:
    """Make `site`; it appears under its name only when all is in it.

    Raises:
        SystemExit: a wheel is missing, pip fails, what it installed cannot be imported, or `site` holds something else.
    """
    if is_installed(site):
        return
    if site.exists() and any(site.iterdir()):
        raise SystemExit(
            f"{site} is not empty and holds no {' and '.join(REQUIREMENTS)}; remove it or name another --site"
        )
    wanted = missing_from_registry() if wheels is None else [str(wheel) for wheel in missing_wheels(wheels)]
    site.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{site.name}.", dir=site.parent))
    try:
        offline = [] if wheels is None else ["--no-index"]
        _pip("install", "--quiet", "--no-deps", "--no-compile", *offline, "--target", str(partial), *wanted)
        check_import(partial)
        partial.chmod(0o755)
        partial.replace(site)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_import(site: Path) -> None:
    """Import the peer from `site` in a process of its own.

    Raises:
        SystemExit: that fails; it says with what.
    """
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(Path(__file__).with_name("launch.py")), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise SystemExit(
            f"the peer was installed but cannot be imported: {reason}\n"
            "Nothing was kept. If a module is missing, put its wheel into the folder of --wheels"
        )


def is_installed(site: Path) -> bool:
    """Whether the folder has the peer in the right versions."""
    found = {_key(each.name): each.version for each in importlib.metadata.distributions(path=[str(site)])}
    return PEER.items() <= found.items()


def missing_wheels(folder: Path) -> list[Path]:
    """The peer's wheels, and those of packages that the environment lacks.

    Raises:
        SystemExit: no such folder, or a wheel of the peer is not in it.
    """
    wheels = sorted(folder.glob("*.whl"))
    by_version = {tuple(wheel.name.split("-")[:2]) for wheel in wheels}
    lacking = [
        requirement
        for name, requirement in zip(PEER, REQUIREMENTS, strict=True)
        if (name, PEER[name]) not in by_version
    ]
    if lacking:
        raise SystemExit(
            f"--wheels {folder}: no wheel of {' and '.join(lacking)} there; scripts/bench_peers.sh says how to get them"
        )
    return [wheel for wheel in wheels if (name := wheel.name.split("-")[0]) in PEER or not _is_here(name)]


def missing_from_registry() -> list[str]:
    """The peer and what it needs and the environment lacks, each as name==version.

    Raises:
        SystemExit: pip finds no such set, or it would need another PyTorch.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        _pip("install", "--quiet", "--dry-run", "--report", report.name, *REQUIREMENTS)
        packages = [each["metadata"] for each in json.loads(Path(report.name).read_text())["install"]]
    found = {_key(package["name"]): package["version"] for package in packages}
    if "torch" in found:
        raise SystemExit(f"the peer asks for torch {found['torch']}, which is not this environment's; install it first")
    # In the environment itself it counts as here already.
    return [f"{name}=={version}" for name, version in {**found, **PEER}.items()]


def _is_here(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]).returncode:
        raise SystemExit(
            f"pip could not install the peer ({', '.join(REQUIREMENTS)}), see above; without network, give --wheels DIR"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True, help="folder to make")
    parser.add_argument("--wheels", type=Path, help="folder of wheels (default: the package registry)")
    args = parser.parse_args()
    install(args.site.resolve(), args.wheels)


if __name__ == "__main__":
    main()
