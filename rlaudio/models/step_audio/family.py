"""`StepAudio`: one Step-Audio checkpoint seen from every side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlaudio.errors import CheckpointError
from rlaudio.models import checkpoints
from rlaudio.models.base import AudioPolicy, ChatStyle, Placing
from rlaudio.models.step_audio import checkpoint
from rlaudio.models.step_audio.config import StepAudioConfig, tiny, tiny_values
from rlaudio.models.step_audio.ears import StepAudioEars
from rlaudio.models.step_audio.tokenizer import StepAudioTokenizer, build_word_tokenizer
from rlaudio.types import FloatArray

if TYPE_CHECKING:
    from rlaudio.models.step_audio.modeling import StepAudioEncoder, StepAudioModule

ENGINE_ARCHITECTURE = "StepAudio2ForCausalLM"

STYLE = ChatStyle(roles={"system": "system", "user": "human", "assistant": "assistant"})


class StepAudio:
    """Implements `rlaudio.models.base.ModelFamily` for both public layouts."""

    style = STYLE

    def __init__(self, path: Path | str, *, audio_token_convention: str | None = None) -> None:
        """Read configuration and tokenizer of the checkpoint folder `path`.

        Args:
            path: the checkpoint.
            audio_token_convention: how mel frames are counted; None takes what the checkpoint says ("all_frames" where
                it says nothing, as public ones do). Trainer and engine follow it, and exports write it down.

        Raises:
            CheckpointError: the folder is not a complete Step-Audio checkpoint.
            ConfigError: the convention is unknown.
        """
        self.path = Path(path)
        self._values = checkpoints.read_config_values(self.path)
        self.config: StepAudioConfig = checkpoint.parse_config(
            self._values, file=self.path / checkpoints.CONFIG_FILE, audio_token_convention=audio_token_convention
        )
        self.ears = StepAudioEars(self.config)
        self.tokenizer = StepAudioTokenizer.load(self.path, num_embeddings=self.config.text_config.vocab_size)
        if self.tokenizer.ids.audio_pad != self.config.audio_token_id:
            raise CheckpointError(
                f"{self.path}: <audio_patch> is {self.tokenizer.ids.audio_pad} in tokenizer.json but audio_token_id is "
                f"{self.config.audio_token_id} in config.json: they are from different checkpoints"
            )

    @classmethod
    def make_tiny(cls, path: Path, *, words: Sequence[str], seed: int) -> None:
        # Public checkpoints have an output projection of their own.
        create_tiny(path, words=[word for word in words if not {*word} & {*"<>"}], seed=seed, tied=False)

    def pieces(self, num_samples: int) -> tuple[tuple[int, int], ...]:
        return self.ears.pieces(num_samples)

    def num_audio_tokens(self, num_samples: int) -> int:
        return self.ears.num_rows(num_samples)

    def mel(self, samples: FloatArray) -> torch.Tensor:
        return self.ears.mel(samples)

    def load_module(self, *, dtype: torch.dtype, placing: Placing | None = None) -> StepAudioModule:
        # Deferred: transformers' model code takes seconds to import, and a driver needs only ids and counts.
        from rlaudio.models.step_audio.modeling import StepAudioModule

        return checkpoints.load_module(lambda: StepAudioModule(self.config), self.path, dtype=dtype, placing=placing)

    def load_encoder(self, *, dtype: torch.dtype) -> StepAudioEncoder:
        from rlaudio.models.step_audio.modeling import StepAudioEncoder

        return checkpoints.load_module(
            lambda: StepAudioEncoder(self.config), self.path, dtype=dtype, ignored=lambda name: not self.frozen(name)
        )

    def engine_options(self) -> dict[str, object]:
        overrides = {
            "architectures": [ENGINE_ARCHITECTURE],
            checkpoint.CONVENTION_KEY: self.config.audio_token_convention,
        }
        return {"hf_overrides": overrides}

    def save(
        self,
        module: AudioPolicy,
        path: Path,
        *,
        dtype: torch.dtype,
        max_shard_bytes: int = checkpoints.MAX_SHARD_BYTES,
    ) -> None:
        """Write `module` as a complete checkpoint at `path`, in the layout this one came in.

        Raises:
            CheckpointError: no torch module, or the place cannot be written.
        """
        checkpoints.write_checkpoint(
            Path(path),
            _torch_module(module).state_dict(),
            dtype=dtype,
            write_files=partial(
                checkpoint.write_files,
                values=checkpoint.config_values(self._values, self.config, dtype=dtype),
                tokenizer=self.tokenizer,
            ),
            source=checkpoints.Source(self.path),
            max_shard_bytes=max_shard_bytes,
        )

    def frozen(self, name: str) -> bool:
        return name.startswith("encoder.")

    def public_names(self, module: AudioPolicy) -> Iterable[tuple[str, torch.Tensor]]:
        return _torch_module(module).named_parameters()


def _torch_module(module: AudioPolicy) -> torch.nn.Module:
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(f"{type(module).__name__} is not a torch module: pass the one load_module returned")
    return module


def create_tiny(
    path: Path | str,
    *,
    words: list[str],
    seed: int,
    flat: bool = False,
    tied: bool = True,
    window_s: int = 8,
    audio_token_convention: str = "all_frames",
) -> StepAudio:
    """Write a fresh random checkpoint of the quickstart's size (float32) and open it.

    Args:
        path: folder to write, replaced when it holds a checkpoint.
        words: the vocabulary beside control tokens and role names.
        seed: of the initial weights.
        flat: in the flat public layout instead of the nested one.
        tied: the output projection is the word embedding; public checkpoints have their own.
        window_s: seconds of sound the encoder has positions for.
        audio_token_convention: see `AUDIO_TOKEN_CONVENTIONS`.

    Raises:
        DataError: a word cannot be in a vocabulary.
        CheckpointError: the folder cannot be written.
    """
    from rlaudio.models.step_audio.modeling import StepAudioModule

    tokenizer = StepAudioTokenizer(build_word_tokenizer(words))
    config = tiny(
        vocab_size=tokenizer.vocab_size,
        audio_token_id=tokenizer.ids.audio_pad,
        turn_end_id=tokenizer.ids.turn_end,
        tied=tied,
        window_s=window_s,
        audio_token_convention=audio_token_convention,
    )
    module = StepAudioModule(config)
    module.initialise(seed=seed)
    checkpoints.write_checkpoint(
        Path(path),
        module.state_dict(),
        dtype=torch.float32,
        write_files=partial(checkpoint.write_files, values=tiny_values(config, flat=flat), tokenizer=tokenizer),
    )
    return StepAudio(path)
