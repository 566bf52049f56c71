"""Clips as the learner needs them: encoder states while the encoder is frozen, log-mel features while it is trained.

States come with the experience; what did not come is read from the clip store and encoded here, once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from rlaudio.audio.encoded import states_tensor
from rlaudio.errors import LearnerError
from rlaudio.types import AudioClip, EncodedClip, FloatArray

_MEL = "mel"


class ClipSource(Protocol):
    """Where sounds come from: `ClipStore`, or a fake."""

    def get(self, sha256: str) -> AudioClip: ...


class SoundCache:
    """Features per clip, least recently used out first; those of the batch at hand stay, whatever they take.

    States are kept under their encoder's name, which changes with every version that trains it.

    Args:
        source: the clips.
        mel: [N] samples -> [n_mels, T], the family's.
        encode: [n_mels, T_i] per clip -> [S_i, width] per clip, without gradient.
        dtype: torch's name of what `encode` returns and shipped states must be.
        capacity_bytes: how much is kept, mels (float16) and states together. 0 keeps nothing, not even held clips.
        batch: clips encoded at once; see `rlaudio.audio.encoded.encode_batch`.
    """

    def __init__(
        self,
        source: ClipSource,
        *,
        mel: Callable[[FloatArray], torch.Tensor],
        encode: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
        dtype: str,
        capacity_bytes: int,
        batch: int,
    ) -> None:
        self._batch = batch
        self._source = source
        self._mel = mel
        self._encode = encode
        self._dtype = dtype
        self._capacity_bytes = capacity_bytes
        self._kept: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._kept_bytes = 0
        self._held: dict[str, None] = {}

    def hold(self, names: Iterable[str]) -> None:
        """The clips of a new batch: their states stay until the next one begins."""
        self._held = dict.fromkeys(names)
        self._shrink()

    def mels(self, names: Sequence[str]) -> list[torch.Tensor]:
        """[n_mels, T] float32 per clip, kept as float16. Raises AudioError: a clip is missing or damaged."""
        found: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(names):
            mel = self._find((_MEL, name))
            if mel is None:
                mel = self._mel(self._source.get(name).samples).half()
                self._keep((_MEL, name), mel)
            found[name] = mel.float()
        return [found[name] for name in names]

    def lacking(self, names: Iterable[str], *, encoder: str) -> list[str]:
        """Those of `names` whose states by `encoder` are not here, each once."""
        return [name for name in dict.fromkeys(names) if (encoder, name) not in self._kept]

    def take(self, clips: Iterable[EncodedClip], *, encoder: str) -> None:
        """Keep states that were made elsewhere.

        Args:
            clips: as they were shipped.
            encoder: the trainer's own.

        Raises:
            LearnerError: made by another encoder, or of another dtype, than the trainer's.
        """
        for clip in clips:
            if clip.encoder != encoder:
                raise LearnerError(
                    f"clip {clip.sha256}: its states are of encoder {clip.encoder}, this trainer has {encoder}: "
                    "rollout actors and learner must load the same checkpoint (model.path), with the encoder frozen"
                )
            if clip.dtype != self._dtype:
                raise LearnerError(
                    f"clip {clip.sha256}: its states are {clip.dtype}, this trainer computes in {self._dtype}: set one "
                    "model.dtype for both"
                )
            self._keep((encoder, clip.sha256), states_tensor(clip))

    def states(self, names: Sequence[str], *, encoder: str) -> list[torch.Tensor]:
        """[S, width] states per clip, on the CPU; those that are not here are encoded, whose name is `encoder`.

        Raises:
            AudioError: a clip is missing or damaged.
        """
        found: dict[str, torch.Tensor] = {}
        missing: list[tuple[str, torch.Tensor]] = []
        for name in dict.fromkeys(names):
            states = self._find((encoder, name))
            if states is None:
                # Not through mels(): float16 would make the trainer hear something else than the engine.
                missing.append((name, self._mel(self._source.get(name).samples)))
            else:
                found[name] = states
        missing.sort(key=lambda item: (item[1].shape[-1], item[0]))
        for start in range(0, len(missing), self._batch):
            part = missing[start : start + self._batch]
            for (name, _), states in zip(part, self._encode([mel for _, mel in part]), strict=True):
                # A clone: the encoder returns views, which would keep the whole padded batch alive.
                found[name] = states.detach().cpu().clone()
                self._keep((encoder, name), found[name])
        return [found[name] for name in names]

    def ensure_states(self, *, encoder: str) -> None:
        """Encode what is held and not here yet, in length-sorted batches over all of it."""
        if self._capacity_bytes > 0:
            self.states(list(self._held), encoder=encoder)

    def clear(self) -> None:
        """Forget everything but which clips are held."""
        self._kept.clear()
        self._kept_bytes = 0

    def _find(self, key: tuple[str, str]) -> torch.Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return None

    def _keep(self, key: tuple[str, str], tensor: torch.Tensor) -> None:
        if key in self._kept:
            self._kept_bytes -= self._kept.pop(key).nbytes
        self._kept[key] = tensor
        self._kept_bytes += tensor.nbytes
        self._shrink()

    def _shrink(self) -> None:
        held = self._held if self._capacity_bytes > 0 else {}
        while self._kept_bytes > self._capacity_bytes:
            oldest = next((key for key in self._kept if key[0] == _MEL or key[1] not in held), None)
            if oldest is None:
                return
            self._kept_bytes -= self._kept.pop(oldest).nbytes
