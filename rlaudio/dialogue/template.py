"""The chat template, in id space: messages in, token ids and clip spans out; a sampled response in, its parts out.

The family's `ChatStyle` says how it looks. History is cut in ids, never re-tokenised: what the policy sampled is what
it later reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlaudio.dialogue.thinking import ThinkingMarks
from rlaudio.models.base import ChatStyle, Tokenizer
from rlaudio.types import ClipSpan, IntArray, Role


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids up to the first sampled token, and where the clips' placeholders stand in them."""

    ids: IntArray
    clips: tuple[ClipSpan, ...]


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A response split after the token that completes `</think>`.

    Attributes:
        thinking: text of the reasoning; "" when the policy answered at once, None when it was never closed.
        reply: text after it, without the end of turn; empty when the reasoning was never closed.
        history_ids: the reply's ids as later turns read them, without the end of turn.
    """

    thinking: str | None
    reply: str
    history_ids: tuple[int, ...]


class ChatTemplate:
    """Stateless: every method returns ids for one piece; `Context` strings them together."""

    def __init__(self, tokenizer: Tokenizer, *, style: ChatStyle) -> None:
        self.style = style
        self._tokenizer = tokenizer
        self._ids = tokenizer.ids
        self._newline = tokenizer.encode("\n")
        self._marks = ThinkingMarks(tokenizer, opened=style.opens_thinking)
        self._headers = {role: self.titled(word) for role, word in style.roles.items()}
        self.closing = [self._ids.turn_end, *tokenizer.encode(style.separator)]
        """What follows a message's content."""

    def header(self, role: Role) -> list[int]:
        return self._headers[role]

    def titled(self, title: str) -> list[int]:
        """The header of a section of any name."""
        return [self._ids.turn_start, *self._tokenizer.encode(f"{title}\n")]

    def text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def sound(self, counts: Sequence[int], *, number: int) -> tuple[list[int], list[int]]:
        """The dialogue's `number`-th sound, of one piece per entry of `counts`.

        Returns:
            Its ids, and the index in them at which each piece's placeholders start.
        """
        ids, starts = self.text(self.style.clip_label.format(number=number)), []
        for place, count in enumerate(counts, start=1):
            if place == 1 or not self.style.joins_pieces:
                ids.append(self._ids.audio_start)
            starts.append(len(ids))
            ids += [self._ids.audio_pad] * count
            if place == len(counts) or not self.style.joins_pieces:
                ids.append(self._ids.audio_end)
        return [*ids, *self.text(self.style.clip_tail)], starts

    @property
    def turn_end(self) -> int:
        return self._ids.turn_end

    @property
    def stop(self) -> tuple[int, ...]:
        return self._ids.stop

    @property
    def generation_header(self) -> list[int]:
        return [*self._headers["assistant"], *self._marks.opener]

    def response(self, thinking: str, reply: str) -> list[int]:
        """The ids a policy should sample for this reasoning and reply: the target of supervised training.

        Raises:
            DataError: the reasoning spells `</think>` and the tokenizer has no token of its own for it.
        """
        return [*self._marks.write(thinking, reply=reply), *self.text(reply), self.turn_end]

    def parse(self, response_ids: Sequence[int]) -> ParsedResponse:
        """Split a sampled response. Only the first `</think>` counts; ids after the end of turn cannot occur."""
        ids = [int(i) for i in response_ids]
        reasoning = self._marks.split(ids)
        if reasoning.text is None:
            return ParsedResponse(thinking=None, reply="", history_ids=())
        after = ids[reasoning.end :]
        if after and after[-1] in self._ids.stop:
            after = after[:-1]
        if reasoning.end and after[: len(self._newline)] == self._newline:
            after = after[len(self._newline) :]
        reply = self._tokenizer.decode(after).strip()
        return ParsedResponse(thinking=reasoning.text, reply=reply, history_ids=tuple(after))


class Context:
    """The growing id sequence of one dialogue. One writer: the player that owns it."""

    def __init__(self, template: ChatTemplate, *, keep_thinking: bool) -> None:
        self.template = template
        self.keep_thinking = keep_thinking
        self._ids: list[int] = []
        self._clips: list[ClipSpan] = []
        self._num_sounds = 0
        self._reply = (0, 0)

    def open(self, role: Role, *, title: str | None = None) -> None:
        """Begin a message; a dialogue that does not begin with a system message gets the style's own first."""
        default = self.template.style.default_system
        if not self._ids and default and role != "system":
            self.open("system")
            self.add_text(default)
            self.close()
        self._ids.extend(self.template.header(role) if title is None else self.template.titled(title))

    def add_text(self, text: str) -> None:
        self._ids.extend(self.template.text(text))

    def add_sound(self, pieces: Sequence[tuple[str, int]]) -> None:
        """Append one sound: (hash, number of placeholders) of each piece it is cut into."""
        self._num_sounds += 1
        ids, starts = self.template.sound([count for _, count in pieces], number=self._num_sounds)
        for (sha256, count), start in zip(pieces, starts, strict=True):
            first = len(self._ids) + start
            self._clips.append(ClipSpan(sha256, first, first + count))
        self._ids.extend(ids)

    def close(self) -> None:
        self._ids.extend(self.template.closing)

    def prompt(self) -> Prompt:
        """Everything so far, opened for the assistant's next turn."""
        ids = np.asarray([*self._ids, *self.template.generation_header], dtype=np.int32)
        return Prompt(ids, tuple(self._clips))

    def add_response(self, response_ids: Sequence[int]) -> ParsedResponse:
        """Append an assistant turn: with its reasoning when thinking is kept, else only the reply's own ids."""
        parsed = self.template.parse(response_ids)
        if self.keep_thinking:
            body = [int(i) for i in response_ids]
            if body and body[-1] == self.template.turn_end:
                body.pop()
            self._ids.extend([*self.template.generation_header, *body])
            tail = len(body) > 0 and body[-1] in self.template.stop  # another one than the end of turn
        else:
            self._ids.extend([*self.template.header("assistant"), *parsed.history_ids])
            tail = False
        end = len(self._ids) - tail
        self._reply = (end - len(parsed.history_ids), end)
        self.close()
        return parsed

    def break_in(self, heard: str) -> str:
        """End the last response, to which nothing was added yet, where the user broke in.

        Args:
            heard: the beginning of its reply, whole words.

        Returns:
            What is left of the reply: `heard`, or less where an id spans the end of a word, which is then not kept.
        """
        start, end = self._reply
        reply = self._ids[start:end]
        kept, left = 0, ""
        for length in range(1, len(reply) + 1):
            text = self.template.decode(reply[:length]).strip()
            whole = heard == text or (heard.startswith(text) and heard[len(text)].isspace())
            if whole and len(text) > len(left):
                kept, left = length, text
        del self._ids[start + kept :]
        self.close()
        return left
