"""Augmentation in the actors: policy, judge and learner hear one changed sound, an evaluation hears the original."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlaudio.actors.reward import RewardWorker
from rlaudio.actors.rollout import PlayOrder, RolloutWorker
from rlaudio.audio.store import ClipStore
from rlaudio.config import AugmentSettings, ModelSettings, RunConfig, SourceSettings
from rlaudio.dialogue.template import ChatTemplate
from rlaudio.experience.builder import read_dialogues
from rlaudio.models.step_audio import StepAudio
from rlaudio.rewards.base import JudgeServices, Scores
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, Dialogue, Judgment, Message, PromptRecord, WeightVersion
from tests.fakes import FakeEngine

HEARD: list[str] = []
"""What `Ears` were given, in order."""


class Ears:
    """A judge that writes down which sounds the record holds, and thinks more of each later sibling."""

    unplayed = 0.0

    def __init__(self, services: JudgeServices, *, name: str) -> None:
        self.name = name

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        HEARD.extend(part.sha256 for part in record.messages[0].parts if isinstance(part, AudioPart))
        return Scores(
            tuple(Judgment(self.name, d.sibling, t.index, float(d.sibling)) for d in dialogues for t in d.turns)
        )


async def test_policy_and_judge_hear_one_changed_sound_and_an_evaluation_the_original(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    store = ClipStore(str(tmp_path))
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ)
    name = store.put(tone.astype(np.float32)).sha256
    record = PromptRecord("r", "t", (Message("user", (AudioPart(store.uri(name), name, SAMPLE_RATE_HZ),)),))
    config = RunConfig()
    config.model = ModelSettings(path=str(tiny_checkpoint))
    config.data.clips, config.rollout.encode_once = str(tmp_path), False
    config.data.augment = AugmentSettings(share=1.0, noise_snr_db=[10, 20])
    config.rewards.sources = [SourceSettings("ears", f"{__name__}:Ears")]
    family = StepAudio(tiny_checkpoint)
    response = ChatTemplate(family.tokenizer, style=family.style).response("one two", "three")
    rollout = RolloutWorker(config, on_gpu=False, engine=FakeEngine(lambda request: response))
    rewards = RewardWorker(config, on_gpu=False)
    await rollout.start(WeightVersion(0, 0))
    await rewards.start()

    async def clips(*, augment: bool) -> tuple[set[str], object]:
        _, batch, _ = await rollout.play(record, PlayOrder(0, 2, 1.0, "s", augment=augment))
        return {span.sha256 for one in read_dialogues(batch) for turn in one.turns for span in turn.clips}, batch

    evaluated, _ = await clips(augment=False)
    assert evaluated == {name}
    played, batch = await clips(augment=True)
    (changed,) = played
    assert changed != name
    ClipStore(str(tmp_path)).get(changed)  # where the learner will look for it
    HEARD.clear()
    await rewards.judge(record, batch)  # type: ignore[arg-type]
    assert [changed] == HEARD
