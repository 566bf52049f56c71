"""`rlaudio data import --from LAYOUT SRC OUT` and `rlaudio data speak TEXTS OUT`: new data roots."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from rlaudio.config_loader import code_path
from rlaudio.data.importers.base import import_set
from rlaudio.data.importers.catalog import importer_of
from rlaudio.data.problems import raise_fatal
from rlaudio.data.records import scan_records
from rlaudio.data.speak import speak_records, voice_of


def import_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code; raises RlaudioError where nothing could be imported."""
    code_path(Path.cwd() / "here")  # importers may lie in the folder one is in
    source, out = (Path(path) for path in arguments.paths)
    importer = importer_of(arguments.layout)
    with _counted("items") as progressed:
        imported = import_set(importer, source, out, license=arguments.license, progressed=progressed)
    print(f"{len(imported.records)} record(s): {out / 'records.jsonl'}")
    if imported.records[0].license is None:
        print("of no license: say which with --license, or `data.licenses` refuses them")
    if imported.skipped:
        print(f"{len(imported.skipped)} left out: {out / 'skipped.jsonl'}")
        for reason, count in Counter(_kind(reason) for _, reason in imported.skipped).most_common(8):
            print(f"  {count} x {reason}")
    return 0


def speak_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code; raises RlaudioError on texts or voices it cannot use."""
    code_path(Path.cwd() / "here")
    texts, out = (Path(path) for path in arguments.paths)
    scanned = scan_records(texts, complete=None)
    raise_fatal(scanned.problems, name=scanned.path)
    voices = [voice_of(named) for named in arguments.voice]
    with _counted("records") as progressed:
        spoken = speak_records(
            scanned.records, voices, out=out, seed=arguments.seed, language=arguments.language, progressed=progressed
        )
    print(f"{len(spoken.records)} record(s), {spoken.num_texts} text(s) spoken: {out / 'records.jsonl'}")
    if spoken.skipped:
        print(f"{len(spoken.skipped)} left out, first {spoken.skipped[0][0]}: {spoken.skipped[0][1]}")
    return 0


def _kind(reason: str) -> str:
    """A reason without what differs from item to item, so that like ones are counted together."""
    return re.sub(r"'[^']*'|\S*/\S+|\d+(\.\d+)?", "...", reason)[:140]


@contextmanager
def _counted(what: str) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done: progress.update(task, completed=done)
