"""What a submitted run takes along: its configuration with every path settled, and the code beside it. Never data.

The configuration is merged and checked here, so the job starts from what was typed; its paths are absolute and mean the
nodes' files. What a path setting names (records, clips, checkpoints, runs) stays where it is.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaudio.config import PATH, RunConfig
from rlaudio.config_loader import to_yaml
from rlaudio.errors import ConfigError
from rlaudio.jobs.passed import FILE, written
from rlaudio.runs import find_run

MAX_PACKAGE_BYTES = 50 << 20
"""Uncompressed. Ray keeps packages in the head's memory and copies them to every node."""
MAX_PACKAGE_FILES = 5000
CONFIG_NAME = "config.yaml"
"""The merged configuration inside the package."""

_CLOSED_FOLDERS = frozenset(
    {"__pycache__", "venv", "node_modules", "build", "dist", "data", "base_data", "runs", "mlruns", "mlflow_artifacts"}
)
_NEVER = ("*.pyc", "*.log", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "auth_token*", "credentials*", "mlflow.db*")
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""Equal content gives an equal package, which Ray then has already."""


@dataclass(frozen=True, slots=True)
class Package:
    """Files of a job's working directory.

    Attributes:
        files: path inside the package -> file here; the configuration is not among them.
        config_yaml: the merged configuration.
        left_behind: (setting, absolute path or URI) that every node must see for itself.
        secrets: variables that the job's processes find in their environment; see `rlaudio.jobs.passed`.
    """

    files: dict[str, Path]
    config_yaml: str
    left_behind: tuple[tuple[str, str], ...]
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values()) + len(self.config_yaml.encode())

    def write(self, path: Path) -> None:
        """Write it as a zip, the same bytes for the same content."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, file in sorted(self.files.items()):
                _add(archive, name, file.read_bytes(), mode=0o755 if os.access(file, os.X_OK) else 0o644)
            _add(archive, CONFIG_NAME, self.config_yaml.encode(), mode=0o644)
            if self.secrets:
                _add(archive, FILE, written(self.secrets), mode=0o600)


def pack(config: RunConfig, config_path: str | Path, *, excludes: Sequence[str] = ()) -> Package:
    """Collect what a job of `config` needs besides an installed rlaudio.

    Args:
        config: loaded from `config_path`, so its paths are absolute.
        config_path: its folder's code and small files come along; of a run folder's `config.yaml` those of the file
            that the run was started from, if it is still there.
        excludes: patterns of paths relative to that folder that stay here, as in `fnmatch`.

    Raises:
        ConfigError: more than MAX_PACKAGE_BYTES or MAX_PACKAGE_FILES would be sent; names the biggest files.
    """
    paths = dict(_paths(config))
    folder = code_folder(config_path)
    closed = {Path(path) for path in paths.values() if "://" not in path}
    files: dict[str, Path] = {}
    for file in _files(folder, closed=closed) if folder is not None else ():
        name = file.relative_to(folder).as_posix() if folder is not None else file.name
        if name != CONFIG_NAME and not any(_matches(name, pattern) for pattern in excludes):
            files[name] = file
        if len(files) > MAX_PACKAGE_FILES:
            raise ConfigError(
                f"{folder} holds more than {MAX_PACKAGE_FILES} files besides data: give the configuration a folder of "
                "its own, or leave some out with --exclude PATTERN"
            )
    package = Package(files, to_yaml(config), tuple(paths.items()))
    if package.size_bytes > MAX_PACKAGE_BYTES:
        raise ConfigError(_too_big(package, folder))
    return package


def code_folder(config_path: str | Path) -> Path | None:
    """The folder whose code a configuration may name; None for a run whose first configuration is gone."""
    path = Path(config_path).absolute()
    if not (path.parent / "run.json").is_file():
        return path.parent
    first = find_run(path.parent).first_config
    return first.parent if first is not None and first.is_file() else None


def _files(folder: Path, *, closed: set[Path]) -> Iterator[Path]:
    """Regular files below `folder`, in order: nothing hidden, closed, secret by its name, or linked from outside."""
    root = folder.resolve()
    for base, folders, names in os.walk(folder):
        here = Path(base)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _CLOSED_FOLDERS
            and not name.endswith(".egg-info")
            and here / name not in closed
            and not (here / name).is_symlink()
        )
        for name in sorted(names):
            file = here / name
            if name.startswith(".") or file in closed or any(fnmatch.fnmatch(name.lower(), one) for one in _NEVER):
                continue
            if file.is_file() and file.resolve().is_relative_to(root):
                yield file


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.rstrip("/")
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}/*")


def _paths(value: Any, *, key: str = "") -> Iterator[tuple[str, str]]:
    """(setting, path) of everything that a configuration marks as a path and that is set."""
    for one in dataclasses.fields(value):
        name, item = f"{key}{one.name}", getattr(value, one.name)
        if one.metadata.get("path") == PATH["path"]:
            for inner, path in item.items() if isinstance(item, dict) else (("", item),):
                if path:
                    yield (f"{name}.{inner}" if inner else name), str(path)
        elif dataclasses.is_dataclass(item):
            yield from _paths(item, key=f"{name}.")


def _too_big(package: Package, folder: Path | None) -> str:
    biggest = sorted(((path.stat().st_size, name) for name, path in package.files.items()), reverse=True)[:5]
    listed = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for size, name in biggest)
    return (
        f"{folder} would be sent to every node and holds {package.size_bytes / 1e6:.1f} MB besides data, more than "
        f"{MAX_PACKAGE_BYTES / 1e6:.0f}: the biggest files are {listed}; move them to where all nodes read them, or "
        "leave them out with --exclude PATTERN"
    )


def _add(archive: zipfile.ZipFile, name: str, content: bytes, *, mode: int) -> None:
    entry = zipfile.ZipInfo(name, date_time=_ZIP_DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = mode << 16
    archive.writestr(entry, content)
