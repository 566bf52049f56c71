"""Curation on real actors: a rollout actor with vLLM plays, a reward actor judges, what was done is not done again."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlaudio.audio.store import ClipStore
from rlaudio.config import SourceSettings
from rlaudio.config_stages import CurationConfig, CurationSettings
from rlaudio.data.records import read_records
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import NullTracker
from rlaudio.recipes.curation import run_curation, verifying
from rlaudio.runs import create_run
from rlaudio.types import AudioPart, Constraint, PromptRecord
from tests.ray_local.equivalence_world import make_config, make_records

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

K = 3


def records_with_rules(clips: Path) -> list[PromptRecord]:
    """Noise of two turns each; a random policy breaks the rule of the hard ones, whatever it says."""
    store, made = ClipStore(str(clips)), []
    for number, record in enumerate(make_records(clips)):
        rule = Constraint("max_words", "1000") if number % 2 else Constraint("starts_with", "unheard")
        users = tuple(
            replace(
                message,
                parts=tuple(replace(p, uri=store.uri(p.sha256)) for p in message.parts if isinstance(p, AudioPart)),
                constraints=(rule,),
            )
            for message in record.messages
        )
        made.append(replace(record, id=f"{'easy' if number % 2 else 'hard'}-{number}", messages=users))
    return made


def curation_config(checkpoint: Path, clips: Path, **chosen: Any) -> CurationConfig:
    played = make_config(checkpoint, clips)
    config = CurationConfig(**{name: getattr(played, name) for name in vars(played) if name != "recipe"})
    config.rewards.sources = [SourceSettings("verified", "rlaudio.rewards.verified:VerifiedReward")]
    config.curation = CurationSettings(k=K, **chosen)
    return verifying(config)


async def test_a_real_policy_s_rollouts_are_counted_and_not_made_twice(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = records_with_rules(tmp_path)

    async def curate(records: Sequence[PromptRecord], **chosen: Any) -> dict[str, Any]:
        with Progress() as progress:
            return await run_curation(
                curation_config(tiny_checkpoint, tmp_path, **chosen),
                records=records,
                folder=folder,
                tracker=NullTracker(),
                progress=progress,
            )

    with create_run(tmp_path / "runs", name="curation", seed=3) as folder:
        report = await curate(records[:3], keep=[0, K - 1])
        lines = [json.loads(line) for line in (folder.path / "rolled.jsonl").read_text().splitlines()]
        assert [len(line["passed"]) for line in lines] == [K] * 3, "k dialogues of each"
        told = [turn for line in lines for dialogue in line["dialogues"] for turn in dialogue["turns"]]
        assert told and all(turn["num_tokens"] > 0 for turn in told)
        hard = [line for line in lines if line["id"].startswith("hard")]
        assert not any(passed for line in hard for passed in line["passed"])
        kept = {line["id"] for line in lines if sum(line["passed"]) < K}
        assert {one.id for one in read_records(folder.path / "kept.jsonl")} == kept
        assert report["all"]["kept"] == len(kept) and report["all"]["unjudged"] == 0

        def none_needed(*_: object, **__: object) -> None:
            raise AssertionError("engines were started for nothing")

        monkeypatch.setattr("rlaudio.recipes.curation.playing_actors", none_needed)
        assert (await curate(records[:3], keep=[0, K - 1]))["all"] == report["all"]
