"""From labelled comparisons to supervised rows: what a judge reads and what it should write, in both orders.

The held-out part is kept apart by content, never by id: the same two replies under another name are the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rlaudio.errors import DataError
from rlaudio.experience.builder import make_batch
from rlaudio.rewards.preferences import Labelled
from rlaudio.rewards.prompt import Comparison, JudgePrompt, Said
from rlaudio.types import AudioPart, IntArray

ORDERS = (False, True)
"""Whether the response stands first."""

_SHARES = 10_000


def content_key(comparison: Comparison) -> str:
    """Names the dialogue and the two replies, whichever of them is the reference, whatever the criterion."""
    pair = sorted((_plain(comparison.reference), _plain(comparison.response)))
    return _digest([_dialogue(comparison.history), pair])


def split_heldout(labelled: Sequence[Labelled], *, share: float) -> tuple[list[Labelled], list[Labelled]]:
    """(training, held out): all comparisons of one dialogue fall on one side, drawn from its content.

    Args:
        share: of the dialogues that is held out, 0 to 1.

    Raises:
        DataError: one side is empty.
    """
    sides: tuple[list[Labelled], list[Labelled]] = ([], [])
    for one in labelled:
        drawn = int(_digest(_dialogue(one.comparison.history))[:8], 16) % _SHARES
        sides[drawn < share * _SHARES].append(one)
    if not all(sides):
        raise DataError(
            f"heldout_share={share:g} of {len(labelled)} comparisons leaves {len(sides[0])} to learn from and "
            f"{len(sides[1])} held out: give more of them, another share, or a file of held-out ones"
        )
    return sides


def require_apart(train: Iterable[Labelled], heldout: Iterable[Labelled]) -> None:
    """Raises DataError when two replies to one dialogue are learned from and held out."""
    known = {content_key(one.comparison): one.id for one in train}
    shared = [(one.id, known[key]) for one in heldout if (key := content_key(one.comparison)) in known]
    _refuse_shared(shared)


def require_rows_apart(train: pa.RecordBatch, heldout: Iterable[Labelled], prompt: JudgePrompt) -> None:
    """The same for rows, by what the judge reads: raises DataError when a held-out prompt, in any order, is a row."""
    columns = (train.column(name) for name in ("prompt_id", "prompt_ids", "clips"))
    known = {
        _shown(ids.values.to_numpy(), clips.as_py()): name.as_py() for name, ids, clips in zip(*columns, strict=True)
    }
    found = []
    for one in heldout:
        for order in ORDERS:
            asked = prompt.render(one.comparison, response_first=order)
            key = _shown(asked.ids, [{"sha256": span.sha256} for span in asked.clips])
            if key in known:
                found.append((one.id, known[key]))
    _refuse_shared(found)


def _shown(ids: IntArray, clips: Sequence[Mapping[str, Any]]) -> bytes:
    return ids.tobytes() + "".join(clip["sha256"] for clip in clips).encode()


def _refuse_shared(found: Iterable[tuple[str, str]]) -> None:
    if shared := list(found):
        shown = ", ".join(f"{held!r} (learned from as {name!r})" for held, name in shared[:3])
        raise DataError(
            f"{len(shared)} held-out comparisons are learned from too: {shown}; figures on them would say nothing, "
            "take them out of one side"
        )


def preference_rows(
    labelled: Sequence[Labelled], prompt: JudgePrompt, *, reasoning: str, task: str = "judge"
) -> pa.RecordBatch:
    """Two rows per comparison, one for each order.

    Args:
        prompt: how the judge reads; see `JudgePrompt`.
        reasoning: what is written before the verdict where a record says nothing: a judge's answer without any is
            unreadable.
        task: name of the rows.
    """
    shown = [(one, order) for one in labelled for order in ORDERS]
    rendered = [prompt.render(one.comparison, response_first=order) for one, order in shown]
    told = [one.reasoning[order] if one.reasoning else reasoning for one, order in shown]
    verdicts = [prompt.scale.level(one.level, response_first=order) for one, order in shown]
    return make_batch(
        prompt_id=[f"{one.id}/{'first' if order else 'second'}" for one, order in shown],
        task=[task] * len(shown),
        group=[index // 2 for index in range(len(shown))],
        sibling=[int(order) for _, order in shown],
        turn=[0] * len(shown),
        prompt_ids=[one.ids for one in rendered],
        response_ids=[prompt.answer(text, verdict) for text, verdict in zip(told, verdicts, strict=True)],
        clips=[one.clips for one in rendered],
        clip_targets=[[() for _ in one.clips] for one in rendered],
        thinking=told,
        reply=[prompt.scale.words[verdict] for verdict in verdicts],
    )


def _dialogue(history: Sequence[Said]) -> list[list[str]]:
    return [[said.role, _plain(said.text), *_sounds(said)] for said in history]


def _sounds(said: Said) -> list[str]:
    return [part.sha256 for part in said.parts if isinstance(part, AudioPart)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
