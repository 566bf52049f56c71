"""Records whose users' sounds are heard otherwise: each changed clip is a clip of the store, under its own hash.

Which change a clip gets depends on the run's seed and the clip alone, so rollout actors and judges come to the same one
without asking each other; both read what is in the store already.
"""

import hashlib
from dataclasses import replace

from rlaudio.audio.augment import augment
from rlaudio.audio.store import ClipStore
from rlaudio.config import AugmentSettings
from rlaudio.types import AudioPart, Message, Part, PromptRecord


class Augmenter:
    """Changes the users' sounds of training records.

    Args:
        settings: which operations, how often, how much; and what the tasks forbid beside what records forbid (`keep`).
        clips: where sounds are, and where changed ones are put.
        seed: of the run.
    """

    def __init__(self, settings: AugmentSettings, clips: ClipStore, *, seed: int) -> None:
        pairs = {"speed": settings.speed, "reverberation": settings.reverberation_s, "noise": settings.noise_snr_db}
        pairs["telephone"] = settings.telephone_bits
        self._ranges = {name: (pair[0], pair[1]) for name, pair in pairs.items() if pair}
        self._settings, self._clips, self._seed = settings, clips, seed
        self._changed: dict[tuple[str, frozenset[str]], str] = {}

    @property
    def active(self) -> bool:
        """Whether anything is ever changed."""
        return bool(self._ranges) and self._settings.share > 0

    def apply(self, record: PromptRecord) -> PromptRecord:
        """The record as it is heard, the same wherever it is asked for. Raises AudioError: a clip cannot be read."""
        if not self.active:
            return record
        keep = frozenset(record.keep) | frozenset(self._settings.keep.get(record.task, ()))
        return replace(record, messages=tuple(self._message(message, keep) for message in record.messages))

    def _message(self, message: Message, keep: frozenset[str]) -> Message:
        if message.role != "user":
            return message
        return replace(message, parts=tuple(self._part(part, keep) for part in message.parts))

    def _part(self, part: Part, keep: frozenset[str]) -> Part:
        if not isinstance(part, AudioPart):
            return part
        key = (part.sha256, keep)
        if key not in self._changed:
            self._changed[key] = self._change(part.sha256, keep)
        sha256 = self._changed[key]
        return part if sha256 == part.sha256 else replace(part, uri=self._clips.uri(sha256), sha256=sha256)

    def _change(self, sha256: str, keep: frozenset[str]) -> str:
        samples = self._clips.get(sha256).samples
        drawn = hashlib.blake2b(f"augment\x1f{self._seed}\x1f{sha256}".encode(), digest_size=8).digest()
        seed = int.from_bytes(drawn, "big") >> 1
        changed = augment(samples, ranges=self._ranges, share=self._settings.share, keep=keep, seed=seed)
        return sha256 if changed is samples else self._clips.put(changed).sha256
