"""Encode once: one forward per clip however many ask, nobody's failure or cancellation is another's, bytes bounded."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rlaudio.audio.encoded import ENCODE_BATCH, EncodeOnce, GroupEars, encode_batch, encoded_clip, states_tensor
from rlaudio.errors import AudioError, EngineError
from rlaudio.models.base import ClipEncoder
from rlaudio.types import AudioClip, FloatArray

WIDTH = 4


class CountingEncoder:
    """States say which clip they are of; remembers every batch; can be held back and made to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.fails = False

    def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.open.wait(10)
        if self.fails:
            raise RuntimeError("out of memory")
        self.batches.append([mel.shape[-1] for mel in mels])
        return [mel[:1].T.expand(-1, WIDTH) for mel in mels]

    @property
    def num_clips(self) -> int:
        return sum(len(batch) for batch in self.batches)


def mel(samples: FloatArray) -> torch.Tensor:
    if not np.isfinite(samples).all():
        raise AudioError("holds NaN")
    return torch.from_numpy(samples.copy())[None].expand(2, -1)


def clip(name: str, length: int = 3) -> AudioClip:
    return AudioClip(name, np.full(length, float(ord(name[0])), np.float32))


def once(encoder: ClipEncoder, *, capacity_bytes: int = 1 << 20, batch: int | None = ENCODE_BATCH) -> EncodeOnce:
    device = torch.device("cpu")
    return EncodeOnce(encoder, name="e1", mel=mel, device=device, capacity_bytes=capacity_bytes, batch=batch)


async def test_a_group_of_eight_over_three_turns_runs_the_encoder_once_per_clip() -> None:
    encoder = CountingEncoder()
    cache = once(encoder)
    groups = [GroupEars(cache) for _ in range(2)]

    async def sibling(ears: GroupEars) -> None:
        heard = []
        for name in "abc":
            heard.append(clip(name))
            states = await ears.hear(heard)
            assert [one.sha256 for one in states] == [one.sha256 for one in heard]
            assert [one.states[0, 0] for one in states] == [ord(one.sha256) for one in heard]

    await asyncio.gather(*(sibling(ears) for ears in groups for _ in range(8)))
    assert encoder.num_clips == cache.num_forwards == 3
    assert [ears.num_forwards for ears in groups] == [3, 0], "a forward is told to the group that asked first"
    assert all(list(ears.heard) == ["a", "b", "c"] for ears in groups)


async def test_clips_that_come_together_are_encoded_in_batches_of_like_length() -> None:
    encoder = CountingEncoder()
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 500, ENCODE_BATCH + 8)]
    cache = once(encoder)
    clips = [clip(f"{i}", length) for i, length in enumerate(lengths)]
    await asyncio.gather(*(cache.encode([one]) for one in clips))
    assert encoder.batches == [sorted(lengths)[:ENCODE_BATCH], sorted(lengths)[ENCODE_BATCH:]]


async def test_on_a_cpu_states_are_the_same_bits_in_any_company() -> None:
    class Mixing(CountingEncoder):
        """States that know what was encoded beside them, as those of real encoders do in their last bits."""

        def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [states + len(mels) for states in super().encode(mels)]

    alone = (await once(Mixing(), batch=None).encode([clip("a")])).clips[0]
    among = (await once(Mixing(), batch=None).encode([clip(name) for name in "cab"])).clips[1]
    assert np.array_equal(alone.states, among.states)
    assert [encode_batch(torch.device(kind)) for kind in ("cpu", "cuda")] == [1, ENCODE_BATCH]


async def test_a_cancelled_request_takes_nothing_from_the_others() -> None:
    encoder = CountingEncoder()
    cache = once(encoder)
    encoder.open.clear()
    impatient, patient = (asyncio.create_task(cache.encode([clip("a")])) for _ in range(2))
    await asyncio.sleep(0.02)
    impatient.cancel()
    await asyncio.sleep(0)
    encoder.open.set()
    assert (await patient).clips[0].sha256 == "a"
    assert impatient.cancelled()
    assert encoder.num_clips == 1


async def test_a_bad_sound_fails_alone_and_a_bad_encoder_tells_everyone() -> None:
    encoder = CountingEncoder()
    cache = once(encoder)
    broken = AudioClip("broken", np.full(3, np.nan, np.float32))
    answers = await asyncio.gather(cache.encode([broken]), cache.encode([clip("a")]), return_exceptions=True)
    assert isinstance(answers[0], AudioError) and "clip broken" in str(answers[0])
    assert not isinstance(answers[1], BaseException)
    encoder.fails = True
    answers = await asyncio.gather(cache.encode([clip("b")]), cache.encode([clip("c")]), return_exceptions=True)
    assert all(isinstance(answer, EngineError) and "out of memory" in str(answer) for answer in answers)
    encoder.fails = False
    (again,) = (await cache.encode([clip("b")])).clips
    assert again.sha256 == "b", "a failure must not be remembered"


async def test_memory_is_bounded_and_a_group_keeps_what_it_hears() -> None:
    encoder = CountingEncoder()
    clip_bytes = 3 * WIDTH * 4
    cache = once(encoder, capacity_bytes=2 * clip_bytes)
    ears = GroupEars(cache)
    for name in "abcd":
        await ears.hear([clip(name)])
    await ears.hear([clip(name) for name in "abcd"])
    assert encoder.num_clips == 4, "the group's own clips were encoded again"
    await cache.encode([clip("c"), clip("d")])
    assert encoder.num_clips == 4
    await cache.encode([clip("a")])
    assert encoder.num_clips == 5, "nothing was ever dropped"
    assert cache._held_bytes == 2 * clip_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_become_arrays_and_tensors_again_bit_for_bit(dtype: torch.dtype) -> None:
    states = torch.randn(7, WIDTH).to(dtype)
    made = encoded_clip("a", states[1:5], encoder="e1")
    assert made.dtype == str(dtype).removeprefix("torch.")
    back = states_tensor(made)
    assert back.dtype == dtype
    assert torch.equal(back, states[1:5])
    back.zero_()  # a copy: the shared array is nobody's to change
    assert torch.equal(states_tensor(made), states[1:5])
    with pytest.raises(ValueError, match="read-only"):
        made.states[0] = 0
