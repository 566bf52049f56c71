"""Distillation: k reasoned answers of the current policy to chosen records, filtered, to fine-tune it on.

One step of modality-grounded reasoning distillation (MGRD, arXiv:2511.15848); a pipeline repeats it between supervised
and reinforcement learning (`examples/mgrd`). On the rollout and reward actors of an RL run, as curation is: what was
rolled out lies in the run folder and is not rolled out again, and filters may change without playing anew.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaudio.config import JudgeModelSettings, RunConfig, ServedModelSettings
from rlaudio.config_objects import unjudged_records
from rlaudio.config_stages import DistilConfig
from rlaudio.data.distil import Writable, require_answers, sift, summarise_distil
from rlaudio.data.records import write_records
from rlaudio.dialogue.template import ChatTemplate
from rlaudio.dialogue.users import played_turns
from rlaudio.errors import DataError
from rlaudio.models.base import ModelFamily
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.recipes.curation import asks_a_model
from rlaudio.recipes.playing import playing_actors
from rlaudio.recipes.rolling import Rolling, require_same, rolled_out
from rlaudio.runs import RunFolder, write_json_atomic
from rlaudio.types import PromptRecord

IDENTITY, RECORDS = "distil.json", "records.jsonl"


def filtering(config: DistilConfig) -> DistilConfig:
    """The run as it is rolled out: with the sources that a filter asks, and no judge model that none of them asks."""
    asked = {one.source for one in config.distil.filters}
    chosen = [source for source in config.rewards.sources if source.name in asked]
    rewards = dataclasses.replace(config.rewards, sources=chosen, shuffle=False)
    if not any(asks_a_model(source) for source in chosen):
        rewards = dataclasses.replace(
            rewards, judge_model=JudgeModelSettings(), reference_model=ServedModelSettings(), num_gpus=0.0
        )
    return dataclasses.replace(config, rewards=rewards)


def require_judged(config: RunConfig, records: Sequence[PromptRecord]) -> None:
    """Raises DataError: a filter's source cannot judge a record that was selected; names it, and why."""
    chosen = {source.name for source in config.rewards.sources}
    for record, name, said in unjudged_records(config, records):
        if name in chosen:
            raise DataError(f"record {record.id!r} cannot be filtered: {said}: change it, the filter, or distil.tasks")


def writable_by(family: ModelFamily) -> Writable:
    """Answers are learned as text, tokenised anew: ids that are never sampled may come of it, which `sft` refuses."""
    template = ChatTemplate(family.tokenizer, style=family.style)
    banned = frozenset(family.tokenizer.ids.banned)

    def writable(thinking: str, reply: str) -> bool:
        try:
            return banned.isdisjoint(template.response(thinking, reply))
        except DataError:
            return False  # it spells a control token

    return writable


async def run_distil(
    config: DistilConfig,
    *,
    records: Sequence[PromptRecord],
    writable: Writable,
    folder: RunFolder,
    tracker: Tracker,
    progress: Progress,
) -> dict[str, Any]:
    """Roll out what is missing, then write the answers that pass, and `report.json`.

    Args:
        config: as `filtering` returns it.
        records: as `rlaudio.data.distil.select` chose them.
        writable: `writable_by` the policy's family.

    Returns:
        The content of `report.json`.

    Raises:
        DataError: nothing passes (the report is written); or the folder holds rollouts of another policy or settings.
        EngineError: no actor is left; what was rolled out stays.
    """
    distil = config.distil
    by_id = {record.id: record for record in records}
    rolling = Rolling(
        purpose="distil",
        k=distil.k,
        turns={record.id: frozenset(played_turns(record)) for record in records},
        pass_share=1.0,
        kept=lambda one: bool(sift(by_id[one.id], one, distil, writable=writable).kept),
    )
    require_same(config, folder.path / IDENTITY, free="distil.filters and distil.most", k=distil.k)
    started = time.monotonic()
    found = await rolled_out(config, records, rolling, folder=folder, progress=progress, play=playing_actors)
    progress.stage("filtering")
    sifted = [sift(record, rolled, distil, writable=writable) for record, rolled in zip(records, found, strict=True)]
    problems = [one.problem for one in found if one.problem]
    report = summarise_distil(sifted, distil) | {
        "policy": config.model.path,
        "seed": config.run.seed,
        "problems": {said: problems.count(said) for said in dict.fromkeys(problems)},
        "timings_s": {"all": time.monotonic() - started},
    }
    _track(report, tracker)
    write_json_atomic(folder.report_json, report)
    require_answers(report, problems=problems)
    output = Path(distil.output or folder.path / RECORDS)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_records(output, [answered for one in sifted for answered in one.kept])
    return report


def _track(report: Mapping[str, Any], tracker: Tracker) -> None:
    total = sum(report["turns"].values())
    shares = {f"distil/turns_{fate}": number / total for fate, number in report["turns"].items()}
    passes = {f"distil/passes_{name}": share for name, share in report["passes"].items() if share is not None}
    tracker.log({**shares, **passes, "distil/answers": report["answers"]}, step=0)
