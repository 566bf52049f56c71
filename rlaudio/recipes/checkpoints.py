"""A run's checkpoints: what the learner saves, beside it where the driver stood and the ledger. Whole, or not there.

```
step-000050/
  ...             the learner's files, see `learner/checkpoint.py`
  ledger.sqlite   a copy of the ledger from when the learner had saved
  driver.json     step, weights, where the prompts stood
  manifest.json   size and SHA-256 of every other file: written last, so a folder without it is not a checkpoint
```
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlaudio.errors import CheckpointError
from rlaudio.runs import write_json_atomic
from rlaudio.types import WeightVersion

LEDGER_COPY = "ledger.sqlite"
_DRIVER = "driver.json"
_MANIFEST = "manifest.json"
_UNFINISHED = "saving-"
_DAMAGED = "damaged-"
_HASHING_THREADS = 4


@dataclass(frozen=True, slots=True)
class DriverState:
    """Where the driver stood.

    Attributes:
        step: of the run: batches trained on, whatever optimizer steps they took.
        incarnation, number: of the weights.
        prompts: `PromptSource.state()`.
    """

    step: int
    incarnation: int
    number: int
    prompts: dict[str, Any]

    @property
    def version(self) -> WeightVersion:
        return WeightVersion(self.incarnation, self.number)


class CheckpointStore:
    """`step-000050/` folders, each whole: one is made beside them and gets its name when its manifest lies in it."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of this step."""
        return (self._named(step) / _MANIFEST).is_file()

    def begin(self, step: int) -> Path:
        """An empty folder for the learner to save into. What a save left behind that was cut off goes."""
        for cut_off in self._folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(cut_off)
        path = self._folder / f"{_UNFINISHED}step-{step:06d}"
        path.mkdir(parents=True)
        return path

    def finish(self, path: Path, state: DriverState) -> None:
        """Everything is saved: sum it up. The checkpoint counts from now on, and the oldest ones go. Reads every file.

        Raises:
            CheckpointError: there is a checkpoint of this step, which stays as it is, or a file cannot be read.
        """
        final = self._named(state.step)
        if self.holds(state.step):
            raise CheckpointError(f"{final} is whole already: it is not replaced")
        write_json_atomic(path / _DRIVER, asdict(state))
        write_json_atomic(path / _MANIFEST, {"files": _summed(path)})
        if final.exists():
            shutil.rmtree(final)
        path.rename(final)
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)

    def newest(self) -> Path | None:
        """The newest checkpoint, unexamined."""
        complete = self._complete()
        return complete[-1] if complete else None

    def latest(self, *, told: Callable[[str], None] = lambda text: None) -> tuple[Path, DriverState] | None:
        """The newest checkpoint whose files are those that were saved. A damaged one is put aside, and told of.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        complete = self._complete()
        for path in reversed(complete):
            problem = next(_damages(path), None)
            if problem is None:
                return path, _read_state(path)
            aside = path.with_name(f"{_DAMAGED}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            told(f"{problem}: {path.name} is damaged and put aside as {aside.name}, going on with the one before")
        if complete:
            raise CheckpointError(
                f"every checkpoint in {self._folder} is damaged, the last because {problem}: start a new run, with "
                "model.path as the model/ folder of a damaged one if that can be read"
            )
        return None

    def _named(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if (path / _MANIFEST).is_file())


def _read_state(path: Path) -> DriverState:
    try:
        return DriverState(**json.loads((path / _DRIVER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / _DRIVER} cannot be read ({error}): it was written by another rlaudio; resume with that one"
        ) from error


def _damages(path: Path) -> Iterator[str]:
    """One sentence per file that is not what the manifest says; nothing of a whole checkpoint."""
    try:
        expected = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))["files"]
        found = _summed(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path / _MANIFEST} or a file it names cannot be read ({error})"
        return
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{path / name} is missing"
        elif name not in expected:
            yield f"{path / name} was put there later"
        elif expected[name] != found[name]:
            yield f"{path / name} is not what was saved"


def _summed(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and checksum of every file but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        sums = list(threads.map(_sha256, files))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
        for path, found in zip(files, sums, strict=True)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
