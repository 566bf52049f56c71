"""Who talks to the policy. One protocol: given the record and what was played so far, say what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlaudio.audio.store import ClipStore
from rlaudio.errors import DataError
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, Message, PromptRecord, Spoken, Turn


@dataclass(frozen=True, slots=True)
class UserMove:
    """What happens before the policy speaks again.

    Attributes:
        messages: given messages (system, given assistant turns) and, last, the user message to answer.
        turn: index of that user message among the record's user messages.
        spoken: what was improvised for it; its `heard`, if any, ends the policy's last reply there.
    """

    messages: tuple[Message, ...]
    turn: int
    spoken: Spoken | None = None


class User(Protocol):
    """Named by `dialogue.user`; built in the rollout actor as `Class(services, **dialogue.user_options)`.

    A class whose `improvises` is True finds words for `improvise` messages; records with such are refused under others.
    A class method `setting_problems(options, settings)`, if there is one, says before a run what cannot be meant.
    """

    async def move(self, record: PromptRecord, played: Sequence[Turn], *, seed: str) -> UserMove | None:
        """The next move after `played`, or None when the dialogue is over.

        Equal records, turns and seeds give equal moves. The player holds the move to `dialogue.seconds_per_turn`.

        Args:
            seed: the same for all siblings of a group, whose users thus differ by what the policy said alone.

        Raises:
            RolloutError: the user cannot go on; names the record and the turn.
        """
        ...


class Completion(Protocol):
    @property
    def text(self) -> str: ...


class TextModel(Protocol):
    """A language model that answers chat messages: `rewards.endpoint.ChatEndpoint`, `dialogue.served.ServedText`."""

    async def complete(
        self, messages: Sequence[dict[str, Any]], *, max_new_tokens: int, temperature: float, seed: int | None
    ) -> Completion:
        """One answer to messages of `role` and `content` (text). Raises EngineError, JudgeError: none came."""
        ...


@dataclass(frozen=True, slots=True)
class UserServices:
    """What a rollout actor lends to its user.

    Attributes:
        model: `dialogue.user_model`, None where none is set.
        clips: where new sounds go: the run's own, in which engine, trainer, judges and a replay look for them.
    """

    model: TextModel | None = None
    clips: ClipStore | None = None


def played_turns(record: PromptRecord) -> list[int]:
    """Indices, over user messages, of the turns the policy has to play: those without a given reply."""
    return [move.turn for move in _moves(record)]


def user_message(record: PromptRecord, turn: int) -> Message:
    """The `turn`-th user message of a record."""
    return [m for m in record.messages if m.role == "user"][turn]


def as_said(record: PromptRecord, played: Sequence[Turn]) -> PromptRecord:
    """The record with the words and sounds of a simulated user where that user improvised in one dialogue."""
    spoken = {turn.index: turn.spoken for turn in played if turn.spoken is not None}
    if not spoken:
        return record
    messages, turn = [], -1
    for message in record.messages:
        turn += message.role == "user"
        said = spoken.get(turn) if message.role == "user" else None
        messages.append(message if said is None else spoken_message(message, said))
    return replace(record, messages=tuple(messages))


def spoken_message(message: Message, said: Spoken) -> Message:
    """The user message as it was said."""
    part = AudioPart(ClipStore.uri(said.sha256), said.sha256, SAMPLE_RATE_HZ, said.text, said.voice)
    return replace(message, parts=(part,), improvise=False)


def heard_replies(played: Sequence[Turn]) -> dict[int, str]:
    """Turn -> its reply as the rest of the dialogue knows it: cut short where the user broke in."""
    replies: dict[int, str] = {}
    last: int | None = None
    for turn in played:
        if last is not None and turn.spoken is not None and turn.spoken.heard is not None:
            replies[last] = turn.spoken.heard
        replies[turn.index] = turn.reply
        last = turn.index
    return replies


class ScriptedUser:
    """Says what the record holds, whatever the policy answers."""

    improvises = False

    def __init__(self, services: UserServices | None = None) -> None:
        pass

    async def move(self, record: PromptRecord, played: Sequence[Turn], *, seed: str) -> UserMove | None:
        move = scripted_move(record, played)
        if move is not None and move.messages[-1].improvise:
            raise DataError(
                f"record {record.id!r}, turn {move.turn}: the words are a simulated user's: set dialogue.user to "
                "rlaudio.dialogue.simulated:SimulatedUser"
            )
        return move


def scripted_move(record: PromptRecord, played: Sequence[Turn]) -> UserMove | None:
    """What the record holds after so many turns."""
    moves = _moves(record)
    return moves[len(played)] if len(played) < len(moves) else None


def _moves(record: PromptRecord) -> list[UserMove]:
    moves: list[UserMove] = []
    pending: list[Message] = []
    turn = -1
    for position, message in enumerate(record.messages):
        pending.append(message)
        if message.role != "user":
            continue
        turn += 1
        following = record.messages[position + 1 : position + 2]
        if not following or following[0].role != "assistant":
            moves.append(UserMove(tuple(pending), turn))
            pending = []
    return moves
