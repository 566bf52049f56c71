"""The page of a curation: how often records pass, which are kept, by task, with a few of either side to read.

One HTML file that needs no network. What models and records say is data: Jinja escapes it, and the page runs no script.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlaudio.data.curation import FATES, Fate, Rolled
from rlaudio.observe import charts
from rlaudio.runs import write_text_atomic
from rlaudio.types import PromptRecord

_PER_FATE = 4
_MAX_TEXT_CHARS = 400


def write_curation_page(
    path: Path, *, report: Mapping[str, Any], rolled: Sequence[Rolled], records: Sequence[PromptRecord]
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the `.html` file in the run's folder, whose name is the page's title.
        report: what `summarise_curation` returned.
        rolled: what it was made from.
        records: of it, for what the users said.

    Raises:
        RunFolderError: the file cannot be written.
    """
    counts = report["all"]
    by_id = {record.id: record for record in records}
    view = {
        "name": path.absolute().parent.name,
        "report": report,
        "counts": counts,
        "histogram": charts.bars(counts["histogram"], marked=range(report["keep"][0], report["keep"][1] + 1)),
        "tasks": [_task(name, task) for name, task in report["tasks"].items()],
        "examples": [(fate, _examples(fate, report["keep"], rolled, by_id)) for fate in FATES],
    }
    write_text_atomic(path, _render(view))


def _task(name: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    parts = [counts[fate.replace(" ", "_")] for fate in FATES]
    return {"name": name, "counts": counts, "bar": charts.shares(parts, classes=[_tone(fate) for fate in FATES])}


def _tone(fate: Fate) -> str:
    return fate.replace(" ", "-")


def _examples(
    fate: Fate, keep: Sequence[int], rolled: Sequence[Rolled], records: Mapping[str, PromptRecord]
) -> list[dict[str, Any]]:
    """A few records, picked by a hash of their id."""
    chosen = sorted(
        (one for one in rolled if one.fate(keep) == fate), key=lambda one: hashlib.sha256(one.id.encode()).digest()
    )
    return [_example(one, records[one.id]) for one in chosen[:_PER_FATE]]


def _example(one: Rolled, record: PromptRecord) -> dict[str, Any]:
    users = [message for message in record.messages if message.role == "user"]
    replies = [
        [
            {
                "reply": _cut(turn["reply"]),
                "right": bool(turn["correct"] and turn["parsable"]),
                "turn": turn["turn"] + 1,
            }
            for turn in dialogue["turns"]
        ]
        for dialogue in one.dialogues
    ]
    return {
        "id": one.id,
        "task": one.task,
        "passed": one.num_passed,
        "problem": _cut(one.problem),
        "said": [(_cut(message.text), message.answer) for message in users],
        "replies": list(zip(one.passed, replies, strict=True)),
    }


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_CHARS else text[:_MAX_TEXT_CHARS] + " ... (cut for this page)"


def _render(view: Mapping[str, Any]) -> str:
    folder = resources.files("rlaudio.observe") / "page"
    css = "".join((folder / name).read_text(encoding="utf-8") for name in ("report.css", "curation.css"))
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": (folder / "curation.html").read_text(encoding="utf-8")}),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page").render(css=Markup(css), **view)
