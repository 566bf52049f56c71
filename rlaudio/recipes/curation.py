"""Curation: k dialogues of every record with one policy, judged by verifiers; the records in between are kept.

On the rollout and reward actors of an RL run. What was rolled out lies in the run folder and is not rolled out again.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaudio.config import JudgeModelSettings, RunConfig, ServedModelSettings, SourceSettings
from rlaudio.config_objects import unjudged_records
from rlaudio.config_stages import CurationConfig
from rlaudio.data.curation import require_kept, summarise_curation
from rlaudio.data.records import write_records
from rlaudio.dialogue.users import user_message
from rlaudio.errors import ConfigError, DataError
from rlaudio.observe.curation_page import write_curation_page
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.recipes.playing import playing_actors
from rlaudio.recipes.rolling import Rolling, require_same, rolled_out
from rlaudio.registry import load_object
from rlaudio.rewards.base import Judge, JudgeServices
from rlaudio.rewards.constraints import rules_in_force
from rlaudio.rewards.scope import judged_turns
from rlaudio.rewards.verified import VerifiedReward
from rlaudio.rewards.verifier import Verifier
from rlaudio.runs import RunFolder, write_json_atomic
from rlaudio.types import PromptRecord

IDENTITY, KEPT = "curation.json", "kept.jsonl"
_MAX_NAMED = 3


def verifying(config: CurationConfig) -> CurationConfig:
    """The run as curation plays it: with the sources that say what is right, and no judge model that none of them asks.

    Raises:
        ConfigError: no source verifies.
    """
    names = config.curation.sources
    chosen = [source for source in config.rewards.sources if source.name in names or (not names and _verifies(source))]
    if not chosen:
        has = ", ".join(f"{source.name} ({source.judge})" for source in config.rewards.sources)
        raise ConfigError(
            f"no reward source verifies, the run has {has}: add one, such as rlaudio.rewards.verified:VerifiedReward, "
            "or name in curation.sources those that report `correct`"
        )
    rewards = dataclasses.replace(config.rewards, sources=chosen, shuffle=False)
    if not any(asks_a_model(source) for source in chosen):
        rewards = dataclasses.replace(
            rewards, judge_model=JudgeModelSettings(), reference_model=ServedModelSettings(), num_gpus=0.0
        )
    return dataclasses.replace(config, rewards=rewards)


def _verifies(source: SourceSettings) -> bool:
    return getattr(load_object(source.judge), "measures", "") == "verified"


def asks_a_model(source: SourceSettings) -> bool:
    """A verifier asks none; of any other class nobody knows."""
    made = load_object(source.judge)
    return not (isinstance(made, type) and issubclass(made, Verifier))


def verified_turns(config: RunConfig, records: Sequence[PromptRecord]) -> dict[str, frozenset[int]]:
    """Record -> the turns that decide whether its dialogues pass.

    Args:
        config: with verifying sources alone.

    Raises:
        DataError: records that no verifier speaks of, or that one cannot judge.
    """
    chosen = {source.name for source in config.rewards.sources}
    unjudged = [(record, said) for record, name, said in unjudged_records(config, records) if name in chosen]
    if problems := [f"record {record.id!r}: {said}" for record, said in unjudged]:
        raise DataError(f"{len(problems)} records cannot be judged: {_some(problems)}: change them, or the sources")
    judges = [(source, _built(source)) for source in config.rewards.sources]
    found = {
        record.id: frozenset(turn for source, judge in judges for turn in _decisive(source, judge, record))
        for record in records
    }
    if silent := [name for name, turns in found.items() if not turns]:
        raise DataError(
            f"{len(silent)} of {len(records)} records have no verifier ({_some(silent)}): none of "
            f"{', '.join(source.name for source in config.rewards.sources)} speaks of a turn that is played; give "
            "their user messages an `answer` or `constraints`, widen the sources' `only`, or leave the records out"
        )
    return found


def _decisive(source: SourceSettings, judge: Judge, record: PromptRecord) -> Iterator[int]:
    """Turns that a source judges; not those in which any reply at all would be right."""
    for turn in judged_turns(source, judge, record):
        anything_goes = user_message(record, turn).answer is None and not rules_in_force(record, turn)
        if not (isinstance(judge, VerifiedReward) and anything_goes):
            yield turn


def _built(source: SourceSettings) -> Judge:
    """A verifier, to be asked of which turns it speaks; of any other judge those of its `only` count."""
    made = load_object(source.judge)
    if isinstance(made, type) and issubclass(made, Verifier):
        judge: Judge = made(JudgeServices(), name=source.name, **source.options)
        return judge
    return _Anything(source.name)


class _Anything:
    """Stands for a judge that is not built here."""

    unplayed = 0.0

    def __init__(self, name: str) -> None:
        self.name = name

    async def score(self, record: PromptRecord, dialogues: Sequence[Any]) -> Any:
        raise NotImplementedError


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


# ---- the run ------------------------------------------------------------------------------------------------------


async def run_curation(
    config: CurationConfig,
    *,
    records: Sequence[PromptRecord],
    folder: RunFolder,
    tracker: Tracker,
    progress: Progress,
) -> dict[str, Any]:
    """Roll out what is missing, then write the kept records, `report.json` and `report.html`.

    Args:
        config: as `verifying` returns it.

    Returns:
        The content of `report.json`.

    Raises:
        DataError: nothing is kept (the report is written); or the folder holds rollouts of another policy or settings.
        EngineError: no actor is left; what was rolled out stays.
    """
    curation = config.curation
    rolling = Rolling(
        purpose="curation",
        k=curation.k,
        turns=verified_turns(config, records),
        pass_share=curation.pass_share,
        kept=lambda one: one.fate(curation.keep) == "kept",
    )
    require_same(config, folder.path / IDENTITY, free="curation.keep", k=curation.k, pass_share=curation.pass_share)
    started = time.monotonic()
    found = await rolled_out(config, records, rolling, folder=folder, progress=progress, play=playing_actors)
    progress.stage("writing the report")
    report = summarise_curation(found, curation) | {
        "policy": config.model.path,
        "seed": config.run.seed,
        "timings_s": {"all": time.monotonic() - started},
    }
    _track(report, tracker)
    write_json_atomic(folder.report_json, report)
    write_curation_page(folder.report_html, report=report, rolled=found, records=records)
    require_kept(report)
    kept = {one.id for one in found if one.fate(curation.keep) == "kept"}
    output = Path(curation.output or folder.path / KEPT)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_records(output, [record for record in records if record.id in kept])
    return report


def _track(report: Mapping[str, Any], tracker: Tracker) -> None:
    """Shares as numbers of one step, and the histogram as a curve over the number of passes."""
    counts = report["all"]
    shares = {f"curation/{fate}": counts[fate] / counts["records"] for fate in ("kept", "too_hard", "too_easy")}
    rates = {f"curation/{name}": counts[name] for name in ("pass_rate", "pass_rate_kept") if counts[name] is not None}
    tracker.log({**shares, **rates, "curation/records": counts["records"]}, step=0)
    for number, count in enumerate(counts["histogram"]):
        tracker.log({"curation/records_by_passes": count}, step=number)
