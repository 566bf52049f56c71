"""What the stages of `pipeline.yaml` learn from: `python -m spoken_world.stages`, in the folder of the quickstart.

`data_stages` is a world for supervised training (`base.jsonl`, `coldstart.jsonl`), beside it the same dialogues as text
(`text.jsonl`), comparisons for the judge with those that are held out, and the random checkpoint that it begins as.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlaudio.data.records import read_records, write_records
from rlaudio.rewards.preference_rows import content_key
from rlaudio.runs import write_text_atomic
from rlaudio.types import Message, PromptRecord, TextPart
from spoken_world.attacking import JUDGE_VOCABULARY
from spoken_world.building import fresh
from spoken_world.heldout import heldout_pairs, pair_lines, write_heldout
from spoken_world.judging import JUDGE_PHASES, judge_pairs
from spoken_world.make import WorldConfig, make_world


def make_stages(out: Path, *, base: int, pairs: int, num_processes: int, seed: int = 7) -> None:
    """Make everything that is not there yet; the same arguments give the same bytes."""
    make_world(
        out, WorldConfig(seed=seed, train=0, heldout=0, heldout_voices=0, base=base), num_processes=num_processes
    )
    write_records(out / "text.jsonl", as_text(read_records(out / "base.jsonl", complete=True)))
    write_heldout(out / "judge-heldout.jsonl")
    write_pairs(out / "judge-pairs.jsonl", seed=seed, num=pairs)
    if not (out / "judge-init" / "config.json").is_file():
        fresh(out / "judge-init", words=JUDGE_VOCABULARY, seed=0)


def as_text(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The same dialogues, read instead of heard; how something was said is lost, so such dialogues are left out."""
    return [
        replace(record, id=f"text-{record.id}", messages=tuple(_read(message) for message in record.messages))
        for record in records
        if record.task not in HEARD
    ]


HEARD = ("rate", "pitch")
"""Tasks about how it sounds."""


def _read(message: Message) -> Message:
    return message if message.role == "assistant" else replace(message, parts=(TextPart(message.text),))


def write_pairs(path: Path, *, seed: int, num: int) -> None:
    """Comparisons as in the judge's last phase, with what it shall write in both orders.

    Args:
        num: how many are drawn. Those that are held out, or that mirror one that is, are left out.
    """
    kept_apart = {content_key(pair.comparison) for pair in heldout_pairs()}
    drawn = judge_pairs(seed=seed, num=num, items=0.4, plain=JUDGE_PHASES[-1].plain)
    pairs = (pair for pair in drawn if content_key(pair.comparison) not in kept_apart)
    lines = ({**line, "id": f"pair-{number}"} for number, line in enumerate(pair_lines(pairs)))
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data_stages"))
    parser.add_argument(
        "--base", type=int, default=1200, help="whole dialogues; a quarter also with the demonstrator's"
    )
    parser.add_argument("--pairs", type=int, default=8000, help="comparisons for the judge")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    make_stages(given.out, base=given.base, pairs=given.pairs, num_processes=given.processes)


if __name__ == "__main__":
    main()
