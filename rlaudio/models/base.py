"""What rlaudio asks of a model: one family object that knows a checkpoint from every side.

A family is named in the configuration as `package.module:Class` (default `rlaudio.models.step_audio:StepAudio`).
Trainer, engine, dialogue player and judge all go through it: ids, sounds and weights are prepared in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlaudio.types import FloatArray

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids a template may write and a policy must not sample at will.

    Attributes:
        turn_start, turn_end: `<|BOT|>`, `<|EOT|>`.
        audio_start, audio_pad, audio_end: around and inside a clip; one `audio_pad` per row the adaptor returns.
        think_start, think_end: around reasoning; None where the tokenizer spells `<think>` in ordinary tokens.
        pad: fills batches.
        stop: every id that ends a turn.
        banned: ids masked out of sampling for text-only training.
    """

    turn_start: int
    turn_end: int
    audio_start: int
    audio_pad: int
    audio_end: int
    think_start: int | None
    think_end: int | None
    pad: int
    stop: tuple[int, ...]
    banned: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """How a family writes a dialogue down; `rlaudio.dialogue.template` is the only reader.

    A message is `turn_start`, the role's word, a line break, the content, `turn_end`, then `separator`.

    Attributes:
        roles: the word for "system", "user" and "assistant" in a header.
        separator: text between turns ("" for Step-Audio, a line break for Qwen).
        default_system: system message of a record that has none; "" adds none.
        opens_thinking: generation starts behind `<think>` and a line break.
        clip_label: text before each clip, `{number}` counted from 1 over the dialogue; "" for none.
        clip_tail: text after each clip.
        joins_pieces: pieces of a sound longer than the window stand in one pair of `audio_start`, `audio_end`;
            else each piece has its own.
    """

    roles: Mapping[str, str]
    separator: str = ""
    default_system: str = ""
    opens_thinking: bool = True
    clip_label: str = ""
    clip_tail: str = ""
    joins_pieces: bool = False


class Tokenizer(Protocol):
    """Text to ids and back. Text never yields a special id: special tokens written inside text are plain text."""

    ids: SpecialIds

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class AudioPolicy(Protocol):
    """The trainable torch module, right-padded batches in, logits out.

    A module returned by `ModelFamily.load_module`. `encode` is the frozen part (run once per clip), `forward` the
    trainable part: `decode` over what `adapt` returns.
    """

    @property
    def embedding(self) -> torch.Tensor:
        """[vocabulary, hidden] word embeddings."""
        ...

    @property
    def decoder(self) -> PreTrainedModel:
        """The text model: a submodule that `decode` calls once, with `embedding` in it; ZeRO-3 shards it by layer."""
        ...

    def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[n_mels, T_i] per clip -> [S_i, width] states per clip; a caller with a frozen encoder says no_grad."""
        ...

    def adapt(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[S_i, width] per clip -> [n_i, hidden] rows per clip, as many as the clip has placeholders."""
        ...

    def decode(
        self, input_ids: torch.Tensor, *, rows: Sequence[torch.Tensor], spans: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """`forward` from the adaptor's rows on: one [n_i, hidden] per entry of `spans`."""
        ...

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        states: Sequence[torch.Tensor],
        spans: Sequence[tuple[int, int, int]],
    ) -> torch.Tensor:
        """Hidden states of the decoder's last layer, after the final norm.

        Args:
            input_ids: [B, T] int64, right-padded, placeholders included.
            states: one [S_i, width] per entry of `spans`, as `encode` returned them; the adaptor runs here.
            spans: (row, start, end) of each clip's placeholders in `input_ids`.

        Returns:
            [B, T, hidden]; project with `logits`.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., vocabulary] float32."""
        ...


class ClipEncoder(Protocol):
    """The frozen part of a policy alone: what a rollout actor holds to encode each clip once."""

    def encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[n_mels, T_i] per clip -> [S_i, width] per clip, bit for bit what `AudioPolicy.encode` returns."""
        ...


class Placing(Protocol):
    """What becomes of each parameter as soon as it is read, before the next one is: so the whole need never be here."""

    def wants(self, name: str) -> bool:
        """Whether `place` needs the values; else it gets a parameter of the right shape with anything in it."""
        ...

    def place(self, name: str, parameter: nn.Parameter) -> None:
        """Called once per parameter, in file order. May change the parameter's data, not the object."""
        ...


class ModelFamily(Protocol):
    """One checkpoint seen from every side. Cheap to build: reads configuration and tokenizer, no weights.

    Attributes:
        style: how dialogues are written down.
    """

    path: Path
    tokenizer: Tokenizer
    style: ChatStyle

    def pieces(self, num_samples: int) -> tuple[tuple[int, int], ...]:
        """[start, end) in samples of the pieces a sound is cut into, in order; one piece where it fits the window.

        Every piece is a clip of its own for `num_audio_tokens` and `mel`: trainer and engine cut alike because neither
        cuts, the prompt is built from pieces.

        Raises:
            AudioError: shorter than one row.
        """
        ...

    def num_audio_tokens(self, num_samples: int) -> int:
        """How many rows the adaptor returns for a clip of `num_samples` at 16 kHz = placeholders in the prompt.

        Raises:
            AudioError: shorter than one row, or longer than the model's window.
        """
        ...

    def mel(self, samples: FloatArray) -> torch.Tensor:
        """[N] samples -> [n_mels, T] float32 log-mel features; the same code runs inside the engine."""
        ...

    def load_module(self, *, dtype: torch.dtype, placing: Placing | None = None) -> AudioPolicy:
        """The torch module with the checkpoint's weights.

        Args:
            dtype: of the parameters.
            placing: takes each parameter (by its public name) as soon as it is read: ZeRO-3 divides it then.

        Raises:
            CheckpointError: a tensor is missing, extra or misshapen; names it.
        """
        ...

    def load_encoder(self, *, dtype: torch.dtype) -> ClipEncoder:
        """The frozen encoder alone, without the decoder's memory. Raises CheckpointError as `load_module`."""
        ...

    def engine_options(self) -> dict[str, object]:
        """Keyword arguments of vLLM's EngineArgs for this family (hf_overrides), beyond what rlaudio sets."""
        ...

    def save(self, module: AudioPolicy, path: Path, *, dtype: torch.dtype) -> None:
        """Write a complete checkpoint under public names (safetensors, config, tokenizer), atomically."""
        ...

    def frozen(self, name: str) -> bool:
        """Whether a parameter (public name) is never trained, so it is never sent to engines."""
        ...

    def public_names(self, module: AudioPolicy) -> Iterable[tuple[str, torch.Tensor]]:
        """(public name, parameter) of the module, in file order."""
        ...


class TinyFamily(Protocol):
    """A family class that can make a small checkpoint of itself, which `--tiny` asks for; it need not have this."""

    @classmethod
    def make_tiny(cls, path: Path, *, words: Sequence[str], seed: int) -> None:
        """Write a small random checkpoint in float32, with an output projection of its own, on a CPU in seconds.

        Args:
            path: a new folder.
            words: its vocabulary beside what the family's own templates write: no whitespace, and angle brackets only
                around tags such as "<answer>", which a family may leave out.
            seed: of the weights.
        """
        ...
