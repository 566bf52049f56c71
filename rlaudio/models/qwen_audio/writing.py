"""Small random checkpoints of both families in their public layouts, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2AudioConfig
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

from rlaudio.models import checkpoints
from rlaudio.models.qwen_audio.config import PREPROCESSOR_FILE, tiny_omni, tiny_qwen2_audio
from rlaudio.models.qwen_audio.tokenizer import QwenTokenizer, build_byte_tokenizer, build_word_tokenizer

SPARE_EMBEDDINGS = 10
"""Rows behind the tokenizer's last id, as the public checkpoints have them."""

WINDOW_S = 8


def write_tiny_qwen2_audio(path: Path | str, *, seed: int, window_s: int = WINDOW_S, words: Sequence[str] = ()) -> None:
    """Write a fresh random Qwen2-Audio (float32, 0.3M parameters).

    Args:
        words: the vocabulary; none makes one of bytes.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from rlaudio.models.qwen_audio.modeling import Qwen2AudioModule

    tokenizer = _tokenizer(words)
    values = tiny_qwen2_audio(
        vocab_size=tokenizer.vocab_size + SPARE_EMBEDDINGS, audio_token_id=tokenizer.ids.audio_pad, window_s=window_s
    )
    module = Qwen2AudioModule(Qwen2AudioConfig.from_dict(values))
    module.initialise(seed=seed)
    _write(Path(path), dict(module.named_parameters()), values, tokenizer=tokenizer, window_s=window_s)


def write_tiny_qwen25_omni(path: Path | str, *, seed: int, window_s: int = WINDOW_S, words: Sequence[str] = ()) -> None:
    """Write a fresh random Qwen2.5-Omni (float32, 0.3M parameters), eyes and voice hinted at. As above."""
    from rlaudio.models.qwen_audio.modeling import OmniThinkerModule

    tokenizer = _tokenizer(words)
    ids = tokenizer.ids
    values = tiny_omni(
        vocab_size=tokenizer.vocab_size + SPARE_EMBEDDINGS, audio_ids=(ids.audio_pad, ids.audio_start, ids.audio_end)
    )
    module = OmniThinkerModule(Qwen2_5OmniThinkerConfig.from_dict(values["thinker_config"]))
    module.initialise(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    unused = {
        "talker.thinker_to_talker_proj.weight": torch.randn(4, 8, generator=generator),
        "thinker.audio_tower.audio_bos_eos_token.weight": torch.randn(2, 64, generator=generator),
        "thinker.visual.patch_embed.proj.weight": torch.randn(2, 3, 2, 2, 2, generator=generator),
        "token2wav.code2wav_bigvgan_model.conv_post.weight": torch.randn(3, 3, generator=generator),
    }
    _write(Path(path), dict(module.named_parameters()), values, tokenizer=tokenizer, window_s=window_s, unused=unused)


def _tokenizer(words: Sequence[str]) -> QwenTokenizer:
    file = build_word_tokenizer(list(words)) if words else build_byte_tokenizer()
    return QwenTokenizer(file, num_embeddings=file.get_vocab_size(with_added_tokens=True) + SPARE_EMBEDDINGS)


def _write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    values: dict[str, Any],
    *,
    tokenizer: QwenTokenizer,
    window_s: int,
    unused: dict[str, torch.Tensor] | None = None,
) -> None:
    def write_files(folder: Path) -> None:
        tokenizer.save(folder)
        extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, "chunk_length": window_s}
        for name, content in ((checkpoints.CONFIG_FILE, values), (PREPROCESSOR_FILE, extractor)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    checkpoints.write_checkpoint(path, {**tensors, **(unused or {})}, dtype=torch.float32, write_files=write_files)
