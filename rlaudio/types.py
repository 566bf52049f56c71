"""The nouns of the system: frozen, complete when built, numpy only.

Units are in the names (`_s`, `_hz`); shapes are in brackets. A prompt *record* becomes a *group* of sibling
*dialogues*; a dialogue is a list of played *turns*; a *judgment* is what one reward source says of one turn.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

SAMPLE_RATE_HZ = 16_000
"""Every sound inside the system is mono at this rate: decoded and mixed down once, before trainer and engine."""

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class AudioClip:
    """One decoded sound.

    Attributes:
        sha256: hex digest of the stored file's bytes; the clip's only name everywhere.
        samples: [N] mono, in [-1, 1], at `SAMPLE_RATE_HZ`.
    """

    sha256: str
    samples: FloatArray

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True)
class EncodedClip:
    """A sound after the frozen encoder, before the trained adaptor: what is computed once per clip and then travels.

    Attributes:
        sha256: the sound's name, as in `AudioClip`.
        states: [S, width] encoder states; bfloat16 as a uint16 view, see `dtype`.
        dtype: torch's name of what `states` hold ("float32", "bfloat16", "float16").
        encoder: names the encoder's weights; states of two encoders never meet.
    """

    sha256: str
    states: npt.NDArray[Any]
    dtype: str
    encoder: str


# ---- what a prompt asks -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AudioPart:
    """A sound inside a message, by reference. `transcript` is for judges and people, never for the policy.

    So are `voice`, any name of who speaks, and `language`, a BCP 47 tag such as "en" or "zh".
    """

    uri: str
    sha256: str
    sample_rate_hz: int
    transcript: str | None = None
    voice: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


Part = AudioPart | TextPart


@dataclass(frozen=True, slots=True)
class Constraint:
    """A checkable rule for the reply, e.g. kind="ends_with", value="please"; see `rlaudio/rewards/constraints.py`.

    Attributes:
        persists: the rule holds for all later replies too.
    """

    kind: str
    value: str
    persists: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of a multiple choice question, e.g. letter="B", text="a dog"."""

    letter: str
    text: str


@dataclass(frozen=True, slots=True)
class RubricItem:
    """One criterion for the judge. A critical item that fails vetoes the rest."""

    text: str
    weight: float = 1.0
    critical: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a record. Checks belong to user messages: they judge the reply that follows.

    An assistant message is *given* history; a user message without one after it is to be *played*. `thinking` is the
    reasoning of an assistant message, kept apart from its parts so that no control token is ever written as text.
    With `choices` the answer is one of their letters. An `improvise` message is a user's whose words a simulated user
    finds in every dialogue anew; its parts then say what to bring up, and nobody hears them. A `title` stands over the
    message in place of its role's name: sections as a judge reads them (`rewards/agreement.py`).
    """

    role: Role
    parts: tuple[Part, ...]
    answer: str | None = None
    constraints: tuple[Constraint, ...] = ()
    reference_response: str | None = None
    rubric: tuple[RubricItem, ...] = ()
    thinking: str | None = None
    choices: tuple[Choice, ...] = ()
    title: str | None = None
    improvise: bool = False

    @property
    def text(self) -> str:
        """What was said, as text: the transcripts and texts of the parts, joined by a space."""
        return " ".join(p.text if isinstance(p, TextPart) else (p.transcript or "") for p in self.parts).strip()


@dataclass(frozen=True, slots=True)
class Persona:
    """Who a simulated user is, and what that user wants of the whole dialogue; in words, for a language model."""

    persona: str
    goal: str


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One line of a data set: a scripted dialogue to be played against the policy.

    Attributes:
        sources: names of the reward sources that judge it; empty for all. So verifier, rubric and preference records
            share a batch.
        keep: what of its sounds augmentation must not change, because an answer depends on it (e.g. "rate").
        user: who improvises the messages that say so.
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    axis: str | None = None
    license: str | None = None
    sources: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    user: Persona | None = None


# ---- what was played ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class WeightVersion:
    """Which weights. A restore starts a new incarnation, so abandoned weights never look fresh."""

    incarnation: int
    number: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.number}"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a response were sampled from `version`.

    A `mixed` span also attended to keys and values that earlier weights had left (`sync.keep_kv_cache`): no version has
    its log-probabilities, so nothing may compare it with a trainer's.
    """

    version: WeightVersion
    start: int
    end: int
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class ClipSpan:
    """The placeholders of clip `sha256` are tokens [start, end) of the prompt."""

    sha256: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a simulated user said before a turn, in place of an `improvise` message.

    Attributes:
        sha256: the sound, a clip of the run's store.
        text: its words, disfluencies included.
        voice: who spoke.
        heard: the user broke in: all that was heard of the reply before, which ends there for the rest of the dialogue.
            None where the user let the policy finish.
    """

    sha256: str
    text: str
    voice: str | None = None
    heard: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn as it was sampled: exactly these ids are trained on, nothing is tokenised twice.

    Attributes:
        index: which user message of the record it answers, counted from 0 over user messages.
        prompt_ids: [P] everything before the first sampled token, audio placeholders expanded.
        response_ids: [R] sampled ids, the end-of-turn id included when it was sampled.
        logprobs: [R] log-probability of each sampled id under the sampling distribution (nats).
        version_spans: which weights sampled which tokens; together they cover [0, R).
        clips: the placeholder spans of `prompt_ids`, in order.
        thinking: text before `</think>`; None when the turn never closed its reasoning.
        reply: text after `</think>` without the end of turn; empty when the reasoning was never closed.
        finish_reason: "stop" when the end-of-turn id was sampled, "length" when the budget ended first.
        generate_s: wall seconds from request to last token.
        spoken: what it answers, where the user improvised; None where the record holds it.
    """

    index: int
    prompt_ids: IntArray
    response_ids: IntArray
    logprobs: FloatArray
    version_spans: tuple[VersionSpan, ...]
    clips: tuple[ClipSpan, ...]
    thinking: str | None
    reply: str
    finish_reason: FinishReason
    generate_s: float = 0.0
    spoken: Spoken | None = None

    @property
    def parsable(self) -> bool:
        """The turn closed its reasoning and ended by itself."""
        return self.thinking is not None and self.finish_reason == "stop"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One sibling's playing of a record. `turns` may be shorter than the record asks: an unclosed turn ends it."""

    prompt_id: str
    group: int
    sibling: int
    turns: tuple[Turn, ...]


# ---- what was thought of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgment:
    """What one source says of one turn of one sibling.

    Attributes:
        source: name of the reward source as configured.
        sibling: which dialogue of the group.
        turn: index of the judged turn.
        value: the reward, finite, in the source's own range.
        detail: parts worth a curve of their own (e.g. correct, format), or a judge's verdicts.
    """

    source: str
    sibling: int
    turn: int
    value: float
    detail: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RewardShare:
    """What one source gave to the reward of a row: the shares of a row add up to its reward.

    Attributes:
        source: name of the reward source as configured.
        turn: the judged turn: the row's own, or a later one that was not played and that the row answers for.
        value: as the source gave it, or its `unplayed` value.
        share: what became of it after normalising and weighting.
        detail: see `Judgment`.
    """

    source: str
    turn: int
    value: float
    share: float
    detail: dict[str, float] = field(default_factory=dict)
