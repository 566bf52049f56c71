"""rlaudio, as `rlaudio train` runs it: rollout actor, reward actor and learner rank in Ray, `rlaudio.loop.train`.

BENCH_EVENTS_FD=N python -m peer_sides.ours WORLD OUT STEPS LEARNING_RATE MICRO_BATCH_TOKENS STALENESS
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer_sides.events import even_share, tell
from rlaudio.config import RunConfig, SourceSettings
from rlaudio.data.run_data import read_data
from rlaudio.data.source import PromptSource
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.loop import Parts, train
from rlaudio.observe.observer import Observer
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import JsonlTracker
from rlaudio.recipes.cluster import joined_ray
from rlaudio.recipes.rl import resource_needs, running_actors
from rlaudio.rewards.base import JudgeServices, Scores
from rlaudio.types import Dialogue, Judgment, PromptRecord, WeightVersion

GROUP, PROMPTS, NEW_TOKENS = 8, 8, 64


class EvenShare:
    """The reward: the share of sampled ids that are even. Keeps what was sampled for the first update.

    Args:
        dump: JSON as `peer_hooks.FirstUpdate` writes it.
    """

    def __init__(self, services: JudgeServices, *, name: str, dump: str) -> None:
        self.name, self.unplayed = name, 0.0
        self._dump = Path(dump)
        self._sequences: list[dict[str, Any]] = []
        self._num_groups = 0

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        self._num_groups += 1
        if self._num_groups <= PROMPTS:
            self._keep(record, dialogues)
        return Scores(
            tuple(
                Judgment(self.name, dialogue.sibling, turn.index, even_share(turn.response_ids.tolist()), {})
                for dialogue in dialogues
                for turn in dialogue.turns
            )
        )

    def _keep(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> None:
        self._sequences += [
            {
                "prompt": record.id,
                "prompt_ids": turn.prompt_ids.tolist(),
                "response_ids": turn.response_ids.tolist(),
                "logprobs": turn.logprobs.tolist(),
            }
            for dialogue in dialogues
            for turn in dialogue.turns
        ]
        if self._num_groups == PROMPTS:
            self._dump.write_text(json.dumps(self._sequences), encoding="utf-8")


class Told(Observer):
    """The run's observer, which also says when an update has ended."""

    def step(self, step: int, **told: Any) -> None:
        super().step(step, **told)
        tell("update", number=step + 1, tokens=self.totals.num_response_tokens)


def settings(world: Path, out: Path, *, steps: int, lr: float, micro_batch_tokens: int, staleness: int) -> RunConfig:
    """One AdamW step per 8 groups of 8, no reference, as on the other sides; everything else is the default."""
    config = RunConfig()
    config.run.name, config.run.root, config.run.steps = "peers", str(out), steps
    config.model.path = str(world / "model")
    config.model.family = "rlaudio.models.qwen_audio:Qwen2Audio"
    config.data.train, config.data.clips = str(world / "records.jsonl"), str(world)
    config.sampling.max_new_tokens = NEW_TOKENS
    config.rollout.engine.max_num_seqs = GROUP * PROMPTS
    config.rewards.sources = [
        SourceSettings("even", "peer_sides.ours:EvenShare", options={"dump": str(out / "first.json")})
    ]
    algorithm, learner = config.algorithm, config.learner
    algorithm.group_size, algorithm.groups_per_step, algorithm.max_staleness = GROUP, PROMPTS, staleness
    algorithm.kl_coef = 0.0
    algorithm.dynamic_sampling = False
    learner.lr, learner.micro_batch_tokens = lr, micro_batch_tokens
    return config


async def run(config: RunConfig, *, out: Path) -> None:
    data = read_data(config.data)
    with Progress(stream=sys.stderr) as progress:
        tracker = JsonlTracker(out / "metrics.jsonl")
        observer = Told(tracker=tracker, progress=progress, num_steps=config.run.steps)
        actors = running_actors(config, version=WeightVersion(0, 0), checkpoint=None, told=progress.say)
        async with actors as live:
            tell("ready")
            ledger = Ledger.in_memory()
            parts = Parts(
                prompts=Issuer(PromptSource(data.train, seed=0), ledger),
                ledger=ledger,
                rollouts=live.rollouts,
                rewards=live.rewards,
                learner=live.learner,
                weights=live.weights,
                observer=observer,
                version=live.version,
                save=_not_saved,
            )
            await train(config.algorithm, parts, first_step=0, last_step=config.run.steps, save_every=10**9)


async def _not_saved(step: int) -> None:
    """No side saves."""


def main() -> None:
    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    config = settings(
        world,
        out,
        steps=int(sys.argv[3]),
        lr=float(sys.argv[4]),
        micro_batch_tokens=int(sys.argv[5]),
        staleness=int(sys.argv[6]),
    )
    with joined_ray(resource_needs(config)):
        asyncio.run(run(config, out=out))


if __name__ == "__main__":
    main()
