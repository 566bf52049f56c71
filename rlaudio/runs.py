"""Run folders: one per run, never shared by two live processes, every file in it whole or absent.

```
NAME-YYYYmmdd-HHMMSS-seedN/
  run.json              who made it, from which configuration file: what tells a run from any other folder
  config.yaml           the merged configuration
  lock                  held by the process that writes here
  doctor.json           what the checks before training found
  evaluation-*.json     what was played and judged on each held-out set, before, and after so many steps
  checkpoints/          resume points
  metrics/              curves and samples
  mlflow_run.json       which MLflow run these curves are
  model/                the trained checkpoint, in its family's public layout
  stopped/              weights of a supervised run that was interrupted, in the same layout
  report.json           the closing table; report.html the page to listen to
```
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rlaudio.errors import RunFolderError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps its files. Use as a context manager, or call `release`, to let another process continue it."""

    path: Path
    _lock: TextIO | None = field(default=None, repr=False, compare=False)

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def first_config(self) -> Path | None:
        """The configuration file that the run was started from, if it says: code that it names lies beside it.

        Raises:
            RunFolderError: `run.json` cannot be read.
        """
        path = self.path / "run.json"
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("config")
        except (OSError, ValueError, AttributeError) as error:
            raise RunFolderError(f"{path} cannot be read ({error}): put it back, or start a new run") from error
        return Path(named) if named else None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    def release(self) -> None:
        """Let go of the lock; the kernel does the same when the process dies, however it dies."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def create_run(root: str | Path, *, name: str, seed: int, config: str | Path | None = None) -> RunFolder:
    """Make a new, locked run folder under `root`, unique even when two runs start in the same second.

    Args:
        root: folder of run folders.
        name, seed: go into its name.
        config: the configuration file, remembered for a resume: see `RunFolder.first_config`.

    Raises:
        RunFolderError: `name` is not fit for a folder name, or nothing can be written under `root`.
    """
    if not _NAME.fullmatch(name):
        raise RunFolderError(
            f"run.name {name!r} cannot name a folder: use up to 100 letters, digits, '.', '_' and '-', no leading dot"
        )
    root = Path(root).absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        path = _make_unique(root, f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}")
        lock = _take_lock(path)
        for folder in ("checkpoints", "metrics"):
            (path / folder).mkdir()
        started_from = str(Path(config).absolute()) if config is not None else None
        made = {"name": name, "seed": seed, "created_s": time.time(), "config": started_from}
        write_json_atomic(path / "run.json", made)
    except OSError as error:
        raise RunFolderError(
            f"cannot write a run folder under {root} ({error.strerror}): set run.root to a folder that you may write to"
        ) from error
    return RunFolder(path, _lock=lock)


def keep_run(root: str | Path, *, name: str, seed: int, config: str | Path | None = None) -> RunFolder:
    """The locked run folder `NAME-seedN` under `root`, made where there is none: for what goes on when started again.

    Raises:
        RunFolderError: as `create_run` and `open_run`.
    """
    path = kept_path(root, name=name, seed=seed)
    if (path / "run.json").is_file():
        return open_run(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
        (path / "metrics").mkdir(exist_ok=True)
        started_from = str(Path(config).absolute()) if config is not None else None
        made = {"name": name, "seed": seed, "created_s": time.time(), "config": started_from}
        write_json_atomic(path / "run.json", made)
    except OSError as error:
        raise RunFolderError(
            f"cannot write the run folder {path} ({error.strerror}): set run.root to a folder that you may write to"
        ) from error
    return RunFolder(path, _lock=lock)


def kept_path(root: str | Path, *, name: str, seed: int) -> Path:
    """Where `keep_run` keeps it. Raises RunFolderError: `name` is not fit for a folder name."""
    if not _NAME.fullmatch(name):
        raise RunFolderError(
            f"run.name {name!r} cannot name a folder: use up to 100 letters, digits, '.', '_' and '-', no leading dot"
        )
    return Path(root).absolute() / f"{name}-seed{seed}"


def open_run(path: str | Path) -> RunFolder:
    """Lock an existing run folder to continue it.

    Raises:
        RunFolderError: `path` is not a run, another live process holds it, or it cannot be written. The lock of a
            process that died never stands in the way.
    """
    folder = find_run(path)
    try:
        return RunFolder(folder.path, _lock=_take_lock(folder.path))
    except OSError as error:
        raise RunFolderError(
            f"the run folder {folder.path} cannot be written ({error.strerror}): check its owner and disk"
        ) from error


def find_run(path: str | Path) -> RunFolder:
    """An existing run folder, to read only. Raises RunFolderError when `path` is not one."""
    path = Path(path).absolute()
    if not (path / "run.json").is_file():
        state = "has no run.json" if path.is_dir() else "does not exist"
        raise RunFolderError(
            f"{path} is not a run folder (it {state}): give the path that the run printed as its last line"
        )
    return RunFolder(path)


def write_json_atomic(path: Path, value: Mapping[str, object]) -> None:
    """Write `value` as indented JSON: the file is either the old one or the whole new one.

    Raises:
        ValueError: a number is not finite, which JSON cannot say: use None, or find out why.
    """
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text`: the file is either the old one or the whole new one, also after a power cut.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write {path} ({error.strerror}): free disk space or check the folder's owner"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _make_unique(root: Path, stem: str) -> Path:
    for attempt in range(1, 1000):
        path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()  # exclusive: of two processes exactly one makes it
        except FileExistsError:
            continue
        return path
    raise RunFolderError(f"{root} already holds 999 folders called {stem}-...: set run.root to another folder")


def _take_lock(path: Path) -> TextIO:
    """Hold `lock` for the life of this process. Raises RunFolderError naming the process that already holds it."""
    handle = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - stays open as long as the run
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "an unknown process"
        handle.close()
        raise RunFolderError(
            f"{path} is in use by {holder}: wait for it to end, end it, or start a new run instead of resuming this one"
        ) from None
    except OSError:
        handle.close()
        raise
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    handle.flush()
    return handle
