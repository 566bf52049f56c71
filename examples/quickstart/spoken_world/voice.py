"""A `Voice` from eSpeak NG, by ctypes: offline, many speakers, about 150 utterances a second on one core.

eSpeak NG is GPL-3. It is an install-time dependency of this example (`espeakng-loader` brings the library and its
data); the core of rlaudio never imports it.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import threading

import numpy as np

from rlaudio.audio.decode import resample
from rlaudio.errors import AudioError, ResourceError
from rlaudio.types import FloatArray

# Constants of speak_lib.h (eSpeak NG 1.52).
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_RATE, _PITCH = 1, 3
_UTF8 = 1
_SILENCE = 1e-3
_LOUDNESS_RMS = 0.08
_MAX_PEAK = 0.95
_RATES_WPM = (80, 450)
_PITCHES = (0, 99)

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesizer:
    """eSpeak NG as a pure function of text, voice, rate and pitch.

    The library carries state from one utterance to the next (phases of its oscillators, its random generator), which
    starting it again does not reset. So every utterance gets a freshly loaded library (2 ms) with a fixed seed: its
    sound depends on its own arguments alone, in any order and in any process. Calls hold one lock.
    """

    _lock = threading.Lock()

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ResourceError(
                "the spoken world needs the offline voice package espeakng-loader, which is not installed; "
                "run `make setup`, or `pip install espeakng-loader`"
            ) from error
        self._library_path = str(espeakng_loader.get_library_path())
        self._data_path = str(espeakng_loader.get_data_path())
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._collect)

    def speak(self, text: str, *, voice: str, rate_wpm: int, pitch: int) -> FloatArray:
        """Speak `text`.

        Args:
            text: plain words.
            voice: a name of eSpeak NG, with a variant after "+" (e.g. "en-us+f2").
            rate_wpm: words per minute, 80 to 450.
            pitch: 0 to 99 in the scale of eSpeak NG, relative to the voice.

        Returns:
            [N] mono samples in [-1, 1] at `SAMPLE_RATE_HZ`, of even loudness, silence at both ends cut to 40 ms.

        Raises:
            AudioError: the text is empty, an argument is out of range, or the voice is unknown.
        """
        if not text.strip():
            raise AudioError("cannot speak an empty text; give at least one word")
        if not _RATES_WPM[0] <= rate_wpm <= _RATES_WPM[1] or not _PITCHES[0] <= pitch <= _PITCHES[1]:
            raise AudioError(f"rate_wpm={rate_wpm} must lie in {_RATES_WPM} and pitch={pitch} in {_PITCHES}")
        with self._lock:
            library = ctypes.CDLL(self._library_path)
            try:
                pcm, rate_hz = self._synthesize(library, text, voice=voice, rate_wpm=rate_wpm, pitch=pitch)
            finally:
                library.espeak_Terminate()
                _ctypes.dlclose(library._handle)
        samples = _trimmed(pcm.astype(np.float32) / 32768.0, margin=rate_hz // 25)
        return _even(resample(samples, rate_hz=rate_hz))

    def _synthesize(
        self, library: ctypes.CDLL, text: str, *, voice: str, rate_wpm: int, pitch: int
    ) -> tuple[np.ndarray, int]:
        rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, self._data_path.encode(), _DONT_EXIT)
        if rate_hz <= 0:
            raise ResourceError(
                f"eSpeak NG could not start with its data in {self._data_path}; reinstall espeakng-loader"
            )
        library.espeak_SetSynthCallback(self._callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise AudioError(f"eSpeak NG has no voice named {voice!r}; use a name like 'en-us' or 'en-us+f2'")
        library.espeak_SetParameter(_RATE, rate_wpm, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        self._chunks = []
        data = text.encode() + b"\0"
        status = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, _UTF8, None, None)
        chunks, self._chunks = self._chunks, []
        if status != 0 or not chunks:
            raise AudioError(f"eSpeak NG returned no sound for {text!r} in voice {voice!r} (status {status})")
        return np.concatenate(chunks), rate_hz

    def _collect(self, wave: ctypes._Pointer[ctypes.c_short], num_samples: int, _events: int | None) -> int:
        if wave and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, (num_samples,)).copy())
        return 0


def _trimmed(samples: FloatArray, *, margin: int) -> FloatArray:
    """[N] -> [N'] with the silence at both ends cut down to `margin` samples."""
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else samples


def _even(samples: FloatArray) -> FloatArray:
    """[N] at one loudness: variants differ by 20 dB, which says nothing in these tasks."""
    rms, peak = float(np.sqrt(np.mean(samples**2))), float(np.abs(samples).max())
    return samples * np.float32(min(_LOUDNESS_RMS / rms, _MAX_PEAK / peak)) if peak > 0.0 else samples


@functools.cache
def synthesizer() -> Synthesizer:
    """The `Synthesizer` of this process."""
    return Synthesizer()


class EspeakVoice:
    """One speaker: implements `rlaudio.audio.voice.Voice`.

    Args:
        voice: a name of eSpeak NG, e.g. "en-us" or "en-us+f2".
        rate: words per minute.
        pitch: 0 to 99, relative to the voice.

    Raises:
        AudioError: there is no such voice, or it cannot speak like this.
    """

    def __init__(self, voice: str = "en-us", *, rate: int = 175, pitch: int = 50) -> None:
        self.voice, self.rate, self.pitch = voice, rate, pitch
        self.speak("a")  # a run should not find out dialogue by dialogue

    def speak(self, text: str) -> FloatArray:
        """[N] mono samples at `SAMPLE_RATE_HZ`. Raises AudioError when the text cannot be spoken."""
        return synthesizer().speak(text, voice=self.voice, rate_wpm=self.rate, pitch=self.pitch)
