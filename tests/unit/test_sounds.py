"""The learner's sounds: shipped states are used, what is missing is encoded once, another encoder's never."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rlaudio.audio.encoded import encoded_clip, states_tensor
from rlaudio.errors import LearnerError
from rlaudio.learner.sounds import SoundCache
from rlaudio.types import AudioClip, EncodedClip
from tests.fakes import FakeClips

NAMES = ["a", "b", "c"]
CLIPS = [AudioClip(name, np.full(4 + i, float(i + 1), np.float32)) for i, name in enumerate(NAMES)]
CLIP_BYTES = 4 * 2 * 4


class Ears:
    """Counts what is encoded; `scale` stands for the encoder's weights."""

    def __init__(self) -> None:
        self.encoded: list[float] = []
        self.scale = 1.0

    def mel(self, samples: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(samples.copy())[None]

    def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.encoded += [float(mel[0, 0]) for mel in mels]
        return [mel[:, :4].T.expand(-1, 2) * self.scale for mel in mels]


def cache(ears: Ears, *, capacity_bytes: int = 1 << 20, batch: int = 32) -> SoundCache:
    source = FakeClips(CLIPS)
    return SoundCache(
        source, mel=ears.mel, encode=ears.encode, dtype="float32", capacity_bytes=capacity_bytes, batch=batch
    )


def shipped(name: str, *, encoder: str = "e1", dtype: torch.dtype = torch.float32) -> EncodedClip:
    return encoded_clip(name, torch.full((4, 2), 7.0, dtype=dtype), encoder=encoder)


def test_shipped_states_are_what_is_trained_on_and_only_the_rest_is_encoded() -> None:
    ears = Ears()
    sounds = cache(ears)
    sounds.hold(NAMES)
    assert sounds.lacking([*NAMES, "a"], encoder="e1") == NAMES
    sounds.take([shipped("a"), shipped("b")], encoder="e1")
    assert sounds.lacking(NAMES, encoder="e1") == ["c"]
    sounds.ensure_states(encoder="e1")
    for _ in range(3):
        found = sounds.states(["c", "a", "b", "a"], encoder="e1")
    assert ears.encoded == [3.0]
    assert torch.equal(found[1], states_tensor(shipped("a")))
    assert torch.equal(found[1], found[3])
    assert found[0][0, 0] == 3.0


def test_encoded_one_by_one_states_do_not_depend_on_what_was_encoded_before() -> None:
    class Mixing(Ears):
        def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [states + len(mels) for states in super().encode(mels)]

    fresh, resumed = (cache(Mixing(), batch=1) for _ in range(2))
    fresh.states(["a"], encoder="e1")  # of a step before the one that a checkpoint lies behind
    pairs = zip(fresh.states(NAMES, encoder="e1"), resumed.states(NAMES, encoder="e1"), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_states_of_another_encoder_or_dtype_are_refused_by_name() -> None:
    sounds = cache(Ears())
    with pytest.raises(LearnerError, match="clip a: its states are of encoder e2, this trainer has e1"):
        sounds.take([shipped("a", encoder="e2")], encoder="e1")
    with pytest.raises(LearnerError, match="clip a: its states are bfloat16, this trainer computes in float32"):
        sounds.take([shipped("a", dtype=torch.bfloat16)], encoder="e1")
    assert sounds.lacking(["a"], encoder="e1") == ["a"]


def test_a_version_that_trained_the_encoder_never_gets_an_older_ones_states() -> None:
    ears = Ears()
    sounds = cache(ears)
    (before,) = sounds.states(["a"], encoder="e1")
    ears.scale = 2.0
    (after,) = sounds.states(["a"], encoder="e1@0.1")
    assert torch.equal(after, 2 * before)
    assert sounds.lacking(["a"], encoder="e1@0.2") == ["a"]


def test_the_batch_at_hand_stays_whatever_it_takes() -> None:
    ears = Ears()
    sounds = cache(ears, capacity_bytes=CLIP_BYTES)
    sounds.hold(NAMES)
    sounds.ensure_states(encoder="e1")
    for _ in range(4):
        sounds.states(NAMES, encoder="e1")
    assert len(ears.encoded) == 3, "clips of the batch were encoded again"
    sounds.hold(["c"])
    assert sounds.lacking(NAMES, encoder="e1") == ["a", "b"], "the last batch's clips were not let go"


def test_without_a_cache_every_request_encodes() -> None:
    ears = Ears()
    sounds = cache(ears, capacity_bytes=0)
    sounds.hold(NAMES)
    sounds.ensure_states(encoder="e1")
    for _ in range(2):
        sounds.states(["a", "b", "a"], encoder="e1")
    assert sorted(ears.encoded) == [1.0, 1.0, 2.0, 2.0]
