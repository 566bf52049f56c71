"""A user who improvises; all is real but the model's words: Ray actor, vLLM policy, eSpeak, HTTP, clip store."""

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from rlaudio.actors.pool import PlayedGroup, RolloutPool
from rlaudio.audio.store import ClipStore
from rlaudio.config import DialogueSettings, EndpointSettings, JudgeModelSettings, RunConfig
from rlaudio.experience.builder import read_dialogues
from rlaudio.recipes.cluster import actor_environment
from rlaudio.types import SAMPLE_RATE_HZ, Dialogue, Message, Persona, PromptRecord, TextPart, WeightVersion
from tests.conftest import ROOT
from tests.ray_local.equivalence_world import make_config
from tests.scripted_endpoint import ScriptedEndpoint, said

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

VOICES = [
    "spoken_world.voice:EspeakVoice {voice: en-us}",
    "spoken_world.voice:EspeakVoice {voice: en-us+f2, pitch: 80}",
]
RECORD = PromptRecord(
    "booking",
    "t",
    tuple(Message("user", (TextPart(brief),), answer="yes", improvise=True) for brief in ("a table", "another day")),
    user=Persona("an old sailor", "a table on Friday"),
)


async def answer(number: int, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
    """The same words to the same question, others to others."""
    return said(f"I would like {len(body['messages'][-1]['content'])} tables by the window on Friday, please")


@pytest.fixture
async def pool(tiny_checkpoint: Path, tmp_path: Path) -> AsyncIterator[tuple[RunConfig, RolloutPool]]:
    async with ScriptedEndpoint(answer).running() as server:
        dialogue = DialogueSettings(
            user="rlaudio.dialogue.simulated:SimulatedUser",
            user_options={"voices": VOICES, "repairs": 0.5, "hesitations": 0.3},
            user_model=JudgeModelSettings(endpoint=EndpointSettings(url=server.url, model="m", key_env="")),
            unclosed_thinking="continue",
        )
        config = replace(make_config(tiny_checkpoint, tmp_path / "clips"), dialogue=dialogue)
        code = os.pathsep.join([str(ROOT), str(ROOT / "examples" / "quickstart")])
        rollouts = RolloutPool(config, environment={**actor_environment(), "PYTHONPATH": code})
        try:
            await rollouts.start(WeightVersion(0, 0))
            yield config, rollouts
        finally:
            rollouts.pool.stop()


async def dialogues_of(played: PlayedGroup) -> list[Dialogue]:
    return read_dialogues(await played.ref)


async def test_what_is_improvised_is_spoken_heard_and_shipped_and_a_seed_gives_it_again(
    pool: tuple[RunConfig, RolloutPool],
) -> None:
    config, rollouts = pool
    first, again, other = [await rollouts.play(RECORD, group=group) for group in (1, 1, 2)]
    siblings = await dialogues_of(first)
    assert len(siblings) == config.algorithm.group_size
    assert all(len(dialogue.turns) == 2 for dialogue in siblings)
    clips = ClipStore(config.data.clips)
    for dialogue in siblings:
        for turn in dialogue.turns:
            assert turn.spoken is not None and "tables" in turn.spoken.text
            sound = clips.get(turn.spoken.sha256)
            assert sound.samples.size > SAMPLE_RATE_HZ / 2 and np.abs(sound.samples).max() > 0.01, "nothing is heard"
            assert turn.spoken.sha256 in {clip.sha256 for clip in turn.clips}
            assert turn.spoken.sha256 in first.header.clips
    assert siblings[0].turns[0].spoken == siblings[1].turns[0].spoken, "siblings meet different users"
    said_again = await dialogues_of(again)
    assert [turn.spoken for turn in said_again[0].turns] == [turn.spoken for turn in siblings[0].turns]
    assert [turn.response_ids.tolist() for turn in said_again[0].turns] == [
        turn.response_ids.tolist() for turn in siblings[0].turns
    ]
    assert {name for one in again.states for name in one.names} >= set(again.header.clips)
    assert (await dialogues_of(other))[0].turns[0].spoken != siblings[0].turns[0].spoken
