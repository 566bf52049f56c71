"""One shape for every set a judge is measured on: what is asked, and what the answers say."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlaudio.audio.store import ClipStore
from rlaudio.config_judges import AskingSettings, JudgedSetSettings
from rlaudio.rewards.calibration import both_orders, calibrate, judged_pairs
from rlaudio.rewards.judge_sets import (
    best_of_asks,
    duel_asks,
    judge_bench_figures,
    read_judge_bench,
    read_reward_bench_2,
    reward_bench_2_figures,
)
from rlaudio.rewards.levels import Scale
from rlaudio.rewards.preferences import Labelled, read_preferences
from rlaudio.rewards.verdicts import Answer, Ask


class Figures(Protocol):
    """What a judge reached on one set."""

    def table(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class JudgedSet:
    """Questions with a name each, and figures from the answers in the same order."""

    name: str
    asks: tuple[Ask, ...]
    items: tuple[str, ...]
    figures: Callable[[Sequence[Answer]], Figures]

    def lines(self, answers: Sequence[Answer]) -> str:
        """Every answer as a line of JSON, so that figures can be looked into and computed again."""
        rows = (
            {
                "item": item,
                "response_first": ask.response_first,
                "level": answer.level,
                **({"problem": answer.problem} if answer.problem else {}),
            }
            for item, ask, answer in zip(self.items, self.asks, answers, strict=True)
        )
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_set(
    settings: JudgedSetSettings, *, asking: AskingSettings, clips: ClipStore | None, num_resamples: int
) -> JudgedSet:
    """Read and check a set. Raises DataError: names file, line, id, field, value and fix."""
    scale = Scale(asking.levels)
    if settings.kind == "pairs":
        labelled = read_preferences(settings.path, scale=scale, hears=asking.hears == "sound", clips=clips)
        return labelled_set(settings.name, labelled, scale=scale, num_resamples=num_resamples)
    if settings.kind == "reward_bench_2":
        prompts = read_reward_bench_2(settings.path)
        return _per_item(
            settings.name,
            [(item.id, best_of_asks(item)) for item in prompts],
            lambda answers: reward_bench_2_figures(prompts, answers, scale=scale, num_resamples=num_resamples),
        )
    duels = read_judge_bench(settings.path)
    return _per_item(
        settings.name,
        [(item.id, duel_asks(item)) for item in duels],
        lambda answers: judge_bench_figures(duels, answers, scale=scale, num_resamples=num_resamples),
    )


def labelled_set(name: str, labelled: Sequence[Labelled], *, scale: Scale, num_resamples: int) -> JudgedSet:
    """Comparisons with known verdicts, both orders of each."""
    return JudgedSet(
        name,
        tuple(both_orders(labelled)),
        tuple(one.id for one in labelled for _ in range(2)),
        lambda answers: calibrate(judged_pairs(labelled, answers), scale=scale, num_resamples=num_resamples),
    )


def _per_item(
    name: str, asked: Sequence[tuple[str, list[Ask]]], figures: Callable[[Sequence[Sequence[Answer]]], Figures]
) -> JudgedSet:
    def of_all(answers: Sequence[Answer]) -> Figures:
        rest = iter(answers)
        return figures([[next(rest) for _ in asks] for _, asks in asked])

    return JudgedSet(
        name, tuple(ask for _, asks in asked for ask in asks), tuple(item for item, asks in asked for _ in asks), of_all
    )


def path_of(folder: Path, name: str) -> Path:
    """Where `JudgedSet.lines` are kept."""
    return folder / f"verdicts-{name}.jsonl"
