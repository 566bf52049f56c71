"""Curation: k dialogues of every record with one policy, judged by verifiers; the records in between are kept.

On the rollout and reward actors of an RL run. What was rolled out lies in the run folder and is not rolled out again.
"""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlaudio.actors.pool import PlayedGroup
from rlaudio.aio import all_or_first_error
from rlaudio.config import JudgeModelSettings, RunConfig, ServedModelSettings, SourceSettings
from rlaudio.config_objects import unjudged_records
from rlaudio.config_stages import CurationConfig
from rlaudio.data.curation import Rolled, RolledFile, require_kept, rolled, still_to_roll, summarise_curation
from rlaudio.data.records import write_records
from rlaudio.dialogue.users import user_message
from rlaudio.errors import ConfigError, DataError, JudgeError, RolloutError
from rlaudio.evals.summary import DialogueResult
from rlaudio.fingerprint import Contents, fingerprint
from rlaudio.observe.curation_page import write_curation_page
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.recipes.playing import playing_actors
from rlaudio.registry import load_object
from rlaudio.rewards.base import Judge, JudgeServices
from rlaudio.rewards.constraints import rules_in_force
from rlaudio.rewards.scope import judged_turns
from rlaudio.rewards.verified import VerifiedReward
from rlaudio.rewards.verifier import Verifier
from rlaudio.runs import RunFolder, write_json_atomic
from rlaudio.types import PromptRecord

ROLLED, IDENTITY, KEPT = "rolled.jsonl", "curation.json", "kept.jsonl"
_MAX_NAMED = 3


class Rollouts(Protocol):
    """What plays; `RolloutPool` does."""

    async def sample(self, record: PromptRecord, *, index: int, num_siblings: int, purpose: str) -> PlayedGroup: ...


class Graders(Protocol):
    """What judges; `RewardPool` does."""

    async def grade(self, played: PlayedGroup) -> list[DialogueResult]: ...


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
    if not any(_asks_a_model(source) for source in chosen):
        rewards = dataclasses.replace(
            rewards, judge_model=JudgeModelSettings(), reference_model=ServedModelSettings(), num_gpus=0.0
        )
    return dataclasses.replace(config, rewards=rewards)


def _verifies(source: SourceSettings) -> bool:
    return getattr(load_object(source.judge), "measures", "") == "verified"


def _asks_a_model(source: SourceSettings) -> bool:
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
    turns = verified_turns(config, records)
    _require_same(config, folder.path / IDENTITY)
    file = RolledFile(folder.path / ROLLED)
    started = time.monotonic()
    missing = still_to_roll(records, file.found, k=curation.k)
    try:
        if missing:
            if known := len(records) - len(missing):
                progress.say(f"{known} of {len(records)} records are rolled out already")
            progress.stage("starting engines")
            async with playing_actors(config, told=progress.say) as actors:
                progress.stage("rolling out")
                await roll_out(
                    config,
                    missing,
                    turns=turns,
                    rollouts=actors.rollouts,
                    graders=actors.rewards,
                    keep=file.add,
                    progressed=lambda done, fields: progress.update(done, len(missing), fields),
                )
    finally:
        file.close()
    progress.stage("writing the report")
    found = [file.found[record.id] for record in records]
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


async def roll_out(
    config: CurationConfig,
    records: Sequence[PromptRecord],
    *,
    turns: Mapping[str, frozenset[int]],
    rollouts: Rollouts,
    graders: Graders,
    keep: Callable[[Rolled], None],
    progressed: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Play and judge every record, as many at once as the engines take; each is kept as soon as it is judged.

    Raises:
        EngineError: no actor is left. What a single record fails at is kept as its problem.
    """
    curation = config.curation
    slots = asyncio.Semaphore(in_flight(config))
    done = num_kept = 0

    async def one(index: int, record: PromptRecord) -> None:
        nonlocal done, num_kept
        async with slots:
            try:
                played = await rollouts.sample(record, index=index, num_siblings=curation.k, purpose="curation")
                results = await graders.grade(played)
                made = rolled(record, results, verified=turns[record.id], pass_share=curation.pass_share)
            except (RolloutError, JudgeError) as error:
                made = dataclasses.replace(rolled(record, (), verified=(), pass_share=1.0), problem=str(error))
        keep(made)
        done += 1
        num_kept += made.fate(curation.keep) == "kept"
        progressed(done, {"kept": num_kept})

    await all_or_first_error(one(index, record) for index, record in enumerate(records))


def in_flight(config: CurationConfig) -> int:
    """Records at once: twice what the engines run at a time, so that the end of a long dialogue leaves none idle."""
    rollout = config.rollout
    return max(2, 2 * rollout.engine.max_num_seqs // config.curation.k) * rollout.actors


def _require_same(config: CurationConfig, path: Path) -> None:
    """A folder's rollouts are of one policy, played and judged in one way; the range that is kept may change."""
    decisive = {
        "model": config.model,
        "dialogue": config.dialogue,
        "sampling": config.sampling,
        "sources": config.rewards.sources,
        "augment": config.data.augment,
        "seed": config.run.seed,
        "k": config.curation.k,
        "pass_share": config.curation.pass_share,
    }
    contents = Contents()
    identity = {name: fingerprint({name: value}, contents=contents) for name, value in decisive.items()}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in identity.items() if known.get(name) != value]:
            raise DataError(
                f"{path.parent} holds rollouts made under another {', '.join(changed)}: resume with the settings that "
                "it began with (curation.keep alone may change), or start a new curation"
            )
    write_json_atomic(path, identity)


def _track(report: Mapping[str, Any], tracker: Tracker) -> None:
    """Shares as numbers of one step, and the histogram as a curve over the number of passes."""
    counts = report["all"]
    shares = {f"curation/{fate}": counts[fate] / counts["records"] for fate in ("kept", "too_hard", "too_easy")}
    rates = {f"curation/{name}": counts[name] for name in ("pass_rate", "pass_rate_kept") if counts[name] is not None}
    tracker.log({**shares, **rates, "curation/records": counts["records"]}, step=0)
    for number, count in enumerate(counts["histogram"]):
        tracker.log({"curation/records_by_passes": count}, step=number)
