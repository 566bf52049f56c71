"""The same words in another room, over another line, or said faster: what augmentation may do to a user's sound.

Every operation declares what it changes of the voice, so that it is not applied where an answer depends on that: a
faster voice is no longer "slow". All is drawn from one seed, with no state between sounds.

torchaudio 2.11 has no codecs any more (`apply_codec` and `AudioEffector` left with its bindings to SoX and FFmpeg), so
the only line here is a telephone's: 8 kHz and 8-bit mu-law, which its functional module still has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from rlaudio.types import SAMPLE_RATE_HZ, FloatArray

_SPEED_STEP = 0.05
"""Resampling by 19/20 is cheap, by 937/1000 it is not."""
_TELEPHONE_HZ = 8_000
_MAX_PEAK = 0.99
_DIRECT = 0.6
"""Share of a reverberant sound's energy that arrives directly: nearer than across a hall."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One way to change a sound.

    Attributes:
        changes: what an answer may depend on and is different afterwards; see `rlaudio.data.lines.KEEPS`.
        apply: ([N] samples, amount, generator) -> [N'] samples.
    """

    changes: frozenset[str]
    apply: Callable[[FloatArray, float, np.random.Generator], FloatArray]


def augment(
    samples: FloatArray, *, ranges: Mapping[str, tuple[float, float]], share: float, keep: Collection[str], seed: int
) -> FloatArray:
    """Apply each operation with probability `share`, in the order of `OPERATIONS`, with an amount from its range.

    Args:
        samples: [N] mono, in [-1, 1], at `SAMPLE_RATE_HZ`.
        ranges: operation -> least and greatest amount: factor of speed, dB over the noise, seconds of reverberation,
            bits of the telephone.
        keep: what must not change; operations that change any of it are left out.
        seed: decides everything.

    Returns:
        [N'] the sound, which is `samples` itself where nothing was drawn.
    """
    generator = np.random.default_rng(seed)
    changed = samples
    for name, operation in OPERATIONS.items():
        # Drawn whether it is used or not: what one operation does must not depend on what another is allowed.
        drawn, position, own = generator.random(), generator.random(), int(generator.integers(2**63))
        if name not in ranges or drawn >= share or operation.changes & set(keep):
            continue
        low, high = ranges[name]
        changed = operation.apply(changed, low + (high - low) * position, np.random.default_rng(own))
    return changed if changed is samples else _fitting(changed)


def _speed(samples: FloatArray, factor: float, generator: np.random.Generator) -> FloatArray:
    """Faster and higher, or slower and lower, as a tape would."""
    import torch
    from torchaudio import functional

    factor = max(_SPEED_STEP, round(factor / _SPEED_STEP) * _SPEED_STEP)
    wave, _ = functional.speed(torch.from_numpy(np.array(samples)), SAMPLE_RATE_HZ, factor)
    return np.asarray(wave.numpy(), np.float32)


def _reverberation(samples: FloatArray, decay_s: float, generator: np.random.Generator) -> FloatArray:
    """A room in which sound falls by 60 dB in `decay_s`: exponentially fading noise behind the direct sound."""
    import torch
    from torchaudio import functional

    num = max(2, int(decay_s * SAMPLE_RATE_HZ))
    tail = generator.standard_normal(num) * 10 ** (-3 * np.arange(num) / num)
    tail[0] = 0.0
    room = tail * np.sqrt((1 - _DIRECT) / np.sum(tail**2))
    room[0] = np.sqrt(_DIRECT)
    room_wave = torch.from_numpy(room.astype(np.float32))
    return np.asarray(functional.fftconvolve(torch.from_numpy(np.array(samples)), room_wave).numpy(), np.float32)


def _noise(samples: FloatArray, snr_db: float, generator: np.random.Generator) -> FloatArray:
    """Pink noise, `snr_db` below the sound."""
    import torch
    from torchaudio import functional

    spectrum = np.fft.rfft(generator.standard_normal(len(samples)))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1.0))
    noise = torch.from_numpy(np.fft.irfft(spectrum, len(samples)).astype(np.float32))
    wave = torch.from_numpy(np.array(samples))
    return np.asarray(functional.add_noise(wave, noise, torch.tensor(snr_db)).numpy(), np.float32)


def _telephone(samples: FloatArray, bits: float, generator: np.random.Generator) -> FloatArray:
    """Band to 4 kHz, mu-law of so many bits (a telephone has 8)."""
    import torch
    from torchaudio import functional

    levels = 1 << max(2, round(bits))
    narrow = functional.resample(torch.from_numpy(np.array(samples)), SAMPLE_RATE_HZ, _TELEPHONE_HZ).clamp(-1.0, 1.0)
    coded = functional.mu_law_decoding(functional.mu_law_encoding(narrow, levels), levels)
    wide = functional.resample(coded, _TELEPHONE_HZ, SAMPLE_RATE_HZ)[: len(samples)]
    return np.asarray(wide.numpy(), np.float32)


OPERATIONS: Mapping[str, Operation] = {
    "speed": Operation(frozenset({"rate", "pitch", "timbre"}), _speed),
    "reverberation": Operation(frozenset({"timbre", "loudness"}), _reverberation),
    "noise": Operation(frozenset({"noise", "loudness"}), _noise),
    "telephone": Operation(frozenset({"timbre"}), _telephone),
}
"""In the order in which a voice meets them: the speaker, the room, what else sounds there, the line."""


def _fitting(samples: FloatArray) -> FloatArray:
    peak = float(np.abs(samples).max())
    return samples * np.float32(_MAX_PEAK / peak) if peak > _MAX_PEAK else samples
