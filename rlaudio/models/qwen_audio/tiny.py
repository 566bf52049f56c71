"""Small random checkpoints of both families, opened: for tests and for `rlaudio doctor`'s tests."""

from __future__ import annotations

from pathlib import Path

from rlaudio.models.qwen_audio.family import Qwen2Audio, Qwen25OmniThinker
from rlaudio.models.qwen_audio.writing import WINDOW_S, write_tiny_qwen2_audio, write_tiny_qwen25_omni


def create_tiny_qwen2_audio(path: Path | str, *, seed: int, window_s: int = WINDOW_S) -> Qwen2Audio:
    """Write a fresh random Qwen2-Audio and open it; its vocabulary is bytes. Raises CheckpointError: no place."""
    write_tiny_qwen2_audio(path, seed=seed, window_s=window_s)
    return Qwen2Audio(path)


def create_tiny_qwen25_omni(path: Path | str, *, seed: int, window_s: int = WINDOW_S) -> Qwen25OmniThinker:
    """Write a fresh random Qwen2.5-Omni and open it; its vocabulary is bytes. Raises CheckpointError: no place."""
    write_tiny_qwen25_omni(path, seed=seed, window_s=window_s)
    return Qwen25OmniThinker(path)
