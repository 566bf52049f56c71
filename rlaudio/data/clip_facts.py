"""Every sample of many clips, looked at in a pool of processes; what was found of a clip is kept until it changes."""

import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from rlaudio.audio.store import ClipStore
from rlaudio.errors import AudioError, ResourceError

SILENT_PEAK = 1e-3
"""A clip whose loudest sample is below this (-60 dB of full scale) holds no speech."""
_CLIPS_PER_TASK = 32
_CLIPS_PER_PROCESS = 256
"""Fewer are decoded sooner (about 1 ms each) than a process has started."""

Stamp = tuple[int, int]


def cache_path(root: str) -> Path:
    """Where what is known of the clips under `root` is kept for this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = root if "://" in root else os.path.abspath(root)
    return Path(base) / "rlaudio" / "clips" / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.json"


def look_at(
    clips: ClipStore,
    names: Sequence[str],
    *,
    processes: int,
    cache: Path | None,
    progressed: Callable[[int, int], None],
) -> dict[str, str]:
    """Read whole clips: right hash, decodable, not silent.

    Args:
        names: hashes; each is read once.
        processes: at most so many; few clips are read in this one.
        cache: a file of peaks of clips that were right, by size and time of their files; made where it is not there.
        progressed: hears of (clips done, all clips).

    Returns:
        clip -> what is wrong with it, in the order of `names`; clips that are right are not in it.

    Raises:
        ResourceError: a process died.
    """
    stamps = {name: clips.stamp(name) for name in names}
    known = _read(cache) if cache is not None else {}
    peaks = {name: known[name][2] for name in names if name in known and known[name][:2] == stamps[name]}
    new = [name for name in names if name not in peaks]
    bad: dict[str, str] = {}
    progressed(len(peaks), len(names))
    for looked in _looked_at(clips.root, new, processes=processes):
        for name, peak, reason in looked:
            if reason:
                bad[name] = reason
            else:
                peaks[name] = peak
        progressed(len(peaks) + len(bad), len(names))
    if cache is not None and new:
        fresh = {name: (*stamp, peaks[name]) for name, stamp in stamps.items() if stamp and name in peaks}
        _write(cache, {**known, **fresh})
    for name, peak in peaks.items():
        if peak < SILENT_PEAK:
            bad[name] = (
                f"{clips.uri(name)}: silent (its loudest sample is {peak:.1g}); record it again, or leave it out"
            )
    return {name: bad[name] for name in names if name in bad}


def _looked_at(root: str, names: Sequence[str], *, processes: int) -> Iterator[list[tuple[str, float, str]]]:
    tasks = [names[start : start + _CLIPS_PER_TASK] for start in range(0, len(names), _CLIPS_PER_TASK)]
    workers = min(processes, -(-len(names) // _CLIPS_PER_PROCESS))
    if workers <= 1:
        yield from (_look(root, task) for task in tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[list[tuple[str, float, str]]]] = [pool.submit(_look, root, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ResourceError(
                f"a process that reads sounds was ended from outside ({error}), most often for want of memory: "
                "use fewer with --processes"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _look(root: str, names: Iterable[str]) -> list[tuple[str, float, str]]:
    """(clip, loudest sample, what is wrong or nothing) of each."""
    store, found = _store(root), []
    for name in names:
        try:
            found.append((name, float(np.abs(store.get(name).samples).max()), ""))
        except AudioError as error:
            found.append((name, 0.0, str(error)))
    return found


@functools.lru_cache(maxsize=1)
def _store(root: str) -> ClipStore:
    return ClipStore(root, cache_num_bytes=0)


def _read(path: Path) -> Mapping[str, tuple[int, int, float]]:
    """What is there; a cache that cannot be read is none."""
    try:
        lines = json.loads(path.read_text())
        return {name: (int(size), int(time_ns), float(peak)) for name, (size, time_ns, peak) in lines.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, known: Mapping[str, tuple[int, int, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(known))
        os.replace(partial, path)
    except OSError:  # no home to write to: the next look takes as long as this one
        return
