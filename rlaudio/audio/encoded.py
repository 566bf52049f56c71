"""Encode once: a frozen encoder's states per clip, computed at the first request and shared by everyone after it.

One `EncodeOnce` lives in each rollout actor. What it returns goes to the engine, travels with the experience and is
what the learner trains on, so a clip passes through an encoder once per actor, whatever hears it later.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlaudio.errors import AudioError, EngineError, RlaudioError
from rlaudio.models.base import ClipEncoder
from rlaudio.types import AudioClip, EncodedClip, FloatArray

ENCODE_BATCH = 32
"""Clips encoded at once on a GPU; sorted by length first, which halves the time of a mixed batch."""


def encode_batch(device: torch.device) -> int:
    """Clips to encode at once on a device.

    In company a clip's states differ in their last bits from those it has alone, and what company it has depends on
    what was encoded before: a resumed run, whose cache is empty, would not end as one that was never killed. GPUs need
    batches. A CPU gains little by them, so there every clip is encoded alone, and runs can be equal bit for bit.
    """
    return 1 if device.type == "cpu" else ENCODE_BATCH


def encoded_clip(sha256: str, states: torch.Tensor, *, encoder: str) -> EncodedClip:
    """[S, width] states of a clip as they travel: on the CPU, in memory of their own."""
    # A clone: encoders return views, which would keep a whole padded batch alive.
    kept = states.detach().to("cpu", copy=True).contiguous()
    dtype = str(kept.dtype).removeprefix("torch.")
    # numpy has no bfloat16.
    array = kept.view(torch.uint16).numpy() if kept.dtype == torch.bfloat16 else kept.numpy()
    # One array is shared by engine, siblings and learner, so nobody may write into it.
    array.flags.writeable = False
    return EncodedClip(sha256=sha256, states=array, dtype=dtype, encoder=encoder)


def states_tensor(clip: EncodedClip) -> torch.Tensor:
    """[S, width] the states bit for bit, in memory of their own. The inverse of `encoded_clip`."""
    copied = torch.from_numpy(np.array(clip.states))
    return copied.view(torch.bfloat16) if clip.dtype == "bfloat16" else copied


@dataclass(frozen=True, slots=True)
class Encoded:
    """Answer to one request.

    Attributes:
        clips: one per clip asked for, in order.
        num_forwards: how many of them went through the encoder for this request; the others were there or under way.
    """

    clips: tuple[EncodedClip, ...]
    num_forwards: int


class EncodeOnce:
    """States of one encoder by clip, least recently used out first. Used from one event loop; computes in a thread.

    Requests that come while the encoder runs wait for its next round together, so a burst of groups becomes few
    length-sorted batches. A request that is cancelled takes nothing from the others that wait for the same clip.

    Args:
        encoder: frozen as long as this object lives: where it is trained, engines encode by themselves.
        name: names the encoder's weights; every `EncodedClip` carries it.
        mel: [N] samples -> [n_mels, T], the family's.
        device: where the encoder is.
        capacity_bytes: how much is kept.
        batch: clips at once; None as `encode_batch` says.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        *,
        name: str,
        mel: Callable[[FloatArray], torch.Tensor],
        device: torch.device,
        capacity_bytes: int,
        batch: int | None = None,
    ) -> None:
        self._encoder = encoder
        self._batch = batch or encode_batch(device)
        self._name = name
        self._mel = mel
        self._device = device
        self._capacity_bytes = capacity_bytes
        self._held: OrderedDict[str, EncodedClip] = OrderedDict()
        self._held_bytes = 0
        self._under_way: dict[str, asyncio.Future[EncodedClip]] = {}
        self._queue: list[AudioClip] = []
        self._round: asyncio.Task[None] | None = None
        self.num_forwards = 0

    async def encode(self, clips: Sequence[AudioClip]) -> Encoded:
        """States of `clips`, each computed at most once however many ask at the same time.

        Raises:
            AudioError: a sound cannot be encoded; only those who asked for it are told.
            EngineError: the encoder failed.
        """
        known = {clip.sha256: self._find(clip.sha256) for clip in clips}
        waiting: dict[str, asyncio.Future[EncodedClip]] = {}
        num_forwards = 0
        for clip in clips:
            if known[clip.sha256] is not None or clip.sha256 in waiting:
                continue
            if clip.sha256 not in self._under_way:
                self._under_way[clip.sha256] = _quiet_future()
                self._queue.append(clip)
                num_forwards += 1
            waiting[clip.sha256] = self._under_way[clip.sha256]
        if self._queue and self._round is None:
            self._round = asyncio.create_task(self._encode_queue())
        # Shielded: a cancelled group must not cancel a clip that another group waits for.
        fresh = {sha256: await asyncio.shield(future) for sha256, future in waiting.items()}
        return Encoded(tuple(known[clip.sha256] or fresh[clip.sha256] for clip in clips), num_forwards)

    async def _encode_queue(self) -> None:
        try:
            # One turn of the loop first: siblings that start together belong into one batch.
            await asyncio.sleep(0)
            while self._queue:
                chosen, self._queue = sorted(self._queue, key=lambda clip: (len(clip.samples), clip.sha256)), []
                for start in range(0, len(chosen), self._batch):
                    part = chosen[start : start + self._batch]
                    self._settle(part, await asyncio.to_thread(self._forward, part))
        finally:
            self._round = None
            self._queue.clear()
            for future in self._under_way.values():
                future.cancel()
            self._under_way.clear()

    def _settle(self, clips: Sequence[AudioClip], outcomes: Sequence[EncodedClip | RlaudioError]) -> None:
        for clip, outcome in zip(clips, outcomes, strict=True):
            future = self._under_way.pop(clip.sha256)
            if isinstance(outcome, EncodedClip):
                self.num_forwards += 1
                self._keep(outcome)
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def _forward(self, clips: Sequence[AudioClip]) -> list[EncodedClip | RlaudioError]:
        """Runs in a thread. A sound without features fails alone, a failing encoder fails its whole batch."""
        outcomes: dict[str, EncodedClip | RlaudioError] = {}
        mels: dict[str, torch.Tensor] = {}
        for clip in clips:
            try:
                mels[clip.sha256] = self._mel(clip.samples).to(self._device)
            except AudioError as error:
                outcomes[clip.sha256] = AudioError(f"clip {clip.sha256[:12]}: {error}")
        try:
            with torch.no_grad():
                states = self._encoder.encode(list(mels.values())) if mels else []
            for sha256, clip_states in zip(mels, states, strict=True):
                outcomes[sha256] = encoded_clip(sha256, clip_states, encoder=self._name)
        except Exception as error:  # told to everyone who waits: an unanswered future would hang the group
            failure = error if isinstance(error, RlaudioError) else EngineError(_why(error, len(mels), self._device))
            failure.__cause__ = None if failure is error else error
            outcomes |= dict.fromkeys(mels, failure)
        return [outcomes[clip.sha256] for clip in clips]

    def _find(self, sha256: str) -> EncodedClip | None:
        if sha256 in self._held:
            self._held.move_to_end(sha256)
        return self._held.get(sha256)

    def _keep(self, clip: EncodedClip) -> None:
        self._held[clip.sha256] = clip
        self._held_bytes += clip.states.nbytes
        while self._held_bytes > self._capacity_bytes:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= oldest.states.nbytes


class GroupEars:
    """What one group hears: keeps its clips until the group ends, whatever the cache drops meanwhile.

    Attributes:
        heard: name -> states, each clip once, in the order of first hearing.
        num_forwards: clips that this group was the first to ask for.
    """

    def __init__(self, encoder: EncodeOnce) -> None:
        self._encoder = encoder
        self.heard: dict[str, EncodedClip] = {}
        self.num_forwards = 0

    async def hear(self, clips: Sequence[AudioClip]) -> tuple[EncodedClip, ...]:
        """The clips as the engine shall get them. Raises as `EncodeOnce.encode`."""
        new = [clip for clip in clips if clip.sha256 not in self.heard]
        encoded = await self._encoder.encode(new)
        self.num_forwards += encoded.num_forwards
        self.heard |= {clip.sha256: clip for clip in encoded.clips}
        return tuple(self.heard[clip.sha256] for clip in clips)


def _quiet_future() -> asyncio.Future[EncodedClip]:
    future: asyncio.Future[EncodedClip] = asyncio.get_running_loop().create_future()
    # Everyone who waited may have been cancelled: then nobody fetches the exception, and asyncio would complain.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _why(error: Exception, num_clips: int, device: torch.device) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"the encoder failed on a batch of {num_clips} clips on {device} ({type(error).__name__}: {reason}); if memory "
        "is short, lower rollout.engine.gpu_memory_utilization or set rollout.encoder_device=cpu"
    )
