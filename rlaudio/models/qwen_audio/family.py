"""`Qwen2Audio` and `Qwen25OmniThinker`: checkpoints of both families seen from every side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, Qwen2AudioConfig
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

from rlaudio.errors import CheckpointError
from rlaudio.models import checkpoints
from rlaudio.models.base import AudioPolicy, ChatStyle, Placing
from rlaudio.models.qwen_audio.config import PREPROCESSOR_FILE, unsupported
from rlaudio.models.qwen_audio.ears import (
    OMNI_WINDOW_SAMPLES,
    WINDOW_OVERRIDE,
    QwenEars,
    omni_ears,
    qwen2_audio_ears,
)
from rlaudio.models.qwen_audio.tokenizer import QwenTokenizer
from rlaudio.types import SAMPLE_RATE_HZ, FloatArray

if TYPE_CHECKING:
    from rlaudio.models.qwen_audio.modeling import QwenAudioModule, TowerEncoder

QWEN2_AUDIO_ARCHITECTURE = "RlaudioQwen2Audio"
OMNI_ARCHITECTURE = "RlaudioQwen25OmniThinker"

OMNI_UNUSED = ("thinker.visual.", "thinker.audio_tower.audio_bos_eos_token.", "talker.", "token2wav.")
"""Public names that the thinker does not need to listen and to write: eyes, voice, and two embeddings for video."""

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
DEFAULT_SYSTEM = "You are a helpful assistant."
MARKS = ("<think>", "</think>", *ROLES.values())
"""What a vocabulary of words must hold for a dialogue to be written down; in public ones it is ordinary text."""

Config = TypeVar("Config", bound=PretrainedConfig)


class QwenAudioFamily:
    """What both families share of `rlaudio.models.base.ModelFamily`.

    A subclass reads its own part of config.json in `__init__` and says which names are its tower's.
    """

    style: ChatStyle
    tower_prefix: str
    ignored_prefixes: tuple[str, ...] = ()

    def __init__(self, path: Path | str, *, ears: QwenEars, text: PretrainedConfig) -> None:
        self.path = Path(path)
        self.ears = ears
        self.tokenizer = QwenTokenizer.load(self.path, num_embeddings=text.vocab_size)
        strange = unsupported(ears.audio)
        if strange is not None:
            raise CheckpointError(f"{self.path / checkpoints.CONFIG_FILE} wants a tower with {strange}")
        if self.tokenizer.ids.audio_pad != ears.audio_token_id:
            raise CheckpointError(
                f"{self.path}: <|AUDIO|> is {self.tokenizer.ids.audio_pad} in tokenizer.json but audio_token_index is "
                f"{ears.audio_token_id} in config.json: they are from different checkpoints"
            )

    def pieces(self, num_samples: int) -> tuple[tuple[int, int], ...]:
        return self.ears.pieces(num_samples)

    def num_audio_tokens(self, num_samples: int) -> int:
        return self.ears.num_rows(num_samples)

    def mel(self, samples: FloatArray) -> torch.Tensor:
        return self.ears.mel(samples)

    def load_module(self, *, dtype: torch.dtype, placing: Placing | None = None) -> QwenAudioModule:
        return checkpoints.load_module(self.build_module, self.path, dtype=dtype, ignored=self.ignored, placing=placing)

    def load_encoder(self, *, dtype: torch.dtype) -> TowerEncoder:
        # Deferred, here and below: transformers' model code takes seconds to import, and a driver needs only counts.
        from rlaudio.models.qwen_audio.modeling import TowerEncoder

        def build() -> TowerEncoder:
            return TowerEncoder(self.ears.build_encoder(), prefix=self.tower_prefix)

        def not_heard_with(name: str) -> bool:
            return not self.frozen(name) or self.ignored(name)

        return checkpoints.load_module(build, self.path, dtype=dtype, ignored=not_heard_with)

    def build_module(self) -> QwenAudioModule:
        """The torch module without a checkpoint's weights."""
        raise NotImplementedError

    def engine_options(self) -> dict[str, object]:
        raise NotImplementedError

    def ignored(self, name: str) -> bool:
        """Whether a checkpoint's tensor has no place in the module, and is passed through on export."""
        return name.startswith(self.ignored_prefixes)

    def frozen(self, name: str) -> bool:
        return name.startswith(self.tower_prefix)

    def save(
        self,
        module: AudioPolicy,
        path: Path,
        *,
        dtype: torch.dtype,
        max_shard_bytes: int = checkpoints.MAX_SHARD_BYTES,
    ) -> None:
        """Write `module` as a complete checkpoint at `path`; what it lacks comes from the family's own checkpoint.

        Raises:
            CheckpointError: no torch module, no place, or the family's own checkpoint is gone.
        """
        checkpoints.write_checkpoint(
            Path(path),
            dict(self.public_names(module)),
            dtype=dtype,
            write_files=lambda folder: self._write_config(folder, dtype=dtype),
            source=checkpoints.Source(self.path, self.ignored),
            max_shard_bytes=max_shard_bytes,
        )

    def public_names(self, module: AudioPolicy) -> Iterable[tuple[str, torch.Tensor]]:
        if not isinstance(module, torch.nn.Module):
            raise CheckpointError(f"{type(module).__name__} is not a torch module: pass the one load_module returned")
        return module.named_parameters()

    def _write_config(self, folder: Path, *, dtype: torch.dtype) -> None:
        """config.json as it was read, so that nothing a library version thinks of it gets in; but for the dtype."""
        values = checkpoints.read_config_values(self.path)
        name = str(dtype).removeprefix("torch.")
        # Both spellings are public: transformers 4 writes the second.
        for key in {"dtype", "torch_dtype"} & values.keys() or {"dtype"}:
            values[key] = name
        (folder / checkpoints.CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class Qwen2Audio(QwenAudioFamily):
    """Qwen2-Audio: 30 s of sound at once, a sound's pieces joined between one pair of marks."""

    style = ChatStyle(
        roles=ROLES,
        separator="\n",
        default_system=DEFAULT_SYSTEM,
        opens_thinking=False,
        clip_label="Audio {number}: ",
        clip_tail="\n",
        joins_pieces=True,
    )
    tower_prefix = "audio_tower."

    def __init__(self, path: Path | str) -> None:
        """Read configuration and tokenizer of the checkpoint folder `path`.

        Raises:
            CheckpointError: the folder is not a complete Qwen2-Audio checkpoint.
        """
        self.config = _read_config(Path(path), Qwen2AudioConfig)
        ears = qwen2_audio_ears(self.config)
        chunk_s = _chunk_length_s(Path(path))
        if chunk_s is not None and chunk_s * SAMPLE_RATE_HZ != ears.max_samples:
            raise CheckpointError(
                f"{Path(path) / PREPROCESSOR_FILE} has chunk_length={chunk_s} but config.json's positions make "
                f"{ears.max_samples / SAMPLE_RATE_HZ:g} s: they are from different checkpoints"
            )
        super().__init__(path, ears=ears, text=self.config.text_config)

    @classmethod
    def make_tiny(cls, path: Path, *, words: Sequence[str], seed: int) -> None:
        from rlaudio.models.qwen_audio.writing import write_tiny_qwen2_audio

        write_tiny_qwen2_audio(path, seed=seed, words=(*MARKS, *words))

    def build_module(self) -> QwenAudioModule:
        from rlaudio.models.qwen_audio.modeling import Qwen2AudioModule

        return Qwen2AudioModule(self.config)

    def engine_options(self) -> dict[str, object]:
        return {"hf_overrides": {"architectures": [QWEN2_AUDIO_ARCHITECTURE]}}


class Qwen25OmniThinker(QwenAudioFamily):
    """The thinker of Qwen2.5-Omni, for dialogues of sound and text. Eyes and voice are passed through on export."""

    style = ChatStyle(
        roles=ROLES,
        separator="\n",
        default_system=DEFAULT_SYSTEM,
        opens_thinking=False,
        joins_pieces=True,
    )
    tower_prefix = "thinker.audio_tower."
    ignored_prefixes = OMNI_UNUSED

    def __init__(self, path: Path | str) -> None:
        """Read configuration and tokenizer of the checkpoint folder `path`.

        Raises:
            CheckpointError: the folder is not a complete Qwen2.5-Omni checkpoint.
        """
        self.config = _read_config(Path(path), Qwen2_5OmniThinkerConfig, whole="qwen2_5_omni", part="thinker_config")
        chunk_s = _chunk_length_s(Path(path))
        ears = omni_ears(
            self.config, window_samples=OMNI_WINDOW_SAMPLES if chunk_s is None else chunk_s * SAMPLE_RATE_HZ
        )
        super().__init__(path, ears=ears, text=self.config.text_config)

    @classmethod
    def make_tiny(cls, path: Path, *, words: Sequence[str], seed: int) -> None:
        from rlaudio.models.qwen_audio.writing import write_tiny_qwen25_omni

        write_tiny_qwen25_omni(path, seed=seed, words=(*MARKS, *words))

    def frozen(self, name: str) -> bool:
        """`proj` is the adaptor and is trained, though it lies in the tower by name."""
        return super().frozen(name) and not name.startswith(f"{self.tower_prefix}proj.")

    def build_module(self) -> QwenAudioModule:
        from rlaudio.models.qwen_audio.modeling import OmniThinkerModule

        return OmniThinkerModule(self.config)

    def engine_options(self) -> dict[str, object]:
        # Without sections vLLM does not prepare three axes of positions, which are equal here: see `decoder_config`.
        one_axis = {"text_config": {"rope_parameters": {"mrope_section": None}}}
        return {
            "hf_overrides": {
                "architectures": [OMNI_ARCHITECTURE],
                WINDOW_OVERRIDE: self.ears.max_samples,
                "thinker_config": one_axis,
            }
        }


def _read_config(path: Path, kind: type[Config], *, whole: str = "", part: str = "") -> Config:
    """config.json, or its `part`, as transformers' `kind`; `whole` is the model_type of the file where it differs."""
    file = path / checkpoints.CONFIG_FILE
    values: Any = checkpoints.read_config_values(path)
    wanted = whole or kind.model_type
    if values.get("model_type") != wanted:
        raise CheckpointError(f"{file} says model_type={values.get('model_type')!r}; this family reads {wanted!r}")
    if part:
        values = values.get(part)
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} has no {part}: download it again")
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{file} does not fit: {error}") from error


def _chunk_length_s(path: Path) -> int | None:
    """What the public feature extractor pads to, in seconds; None when its file is not there."""
    file = path / PREPROCESSOR_FILE
    if not file.is_file():
        return None
    try:
        chunk_s = json.loads(file.read_text(encoding="utf-8"))["chunk_length"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} has no readable chunk_length: {error}") from error
    if not isinstance(chunk_s, int) or chunk_s < 1:
        raise CheckpointError(f"{file} has chunk_length={chunk_s!r}: it must be a whole number of seconds")
    return chunk_s
