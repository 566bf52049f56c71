"""What a generative judge reads and how its verdict is read back, in id space.

One section per text, in the judge model's own chat layout, here Step-Audio's:

    <|BOT|>system\\njudge<|EOT|>  history...  <|BOT|>rule\\n{criterion}<|EOT|>
    <|BOT|>A reference\\n{text}<|EOT|><|BOT|>B response\\n{text}<|EOT|><|BOT|>assistant\\n<think>\\n

Sections are opened and closed by control ids. Everything judged goes through `tokenizer.encode`, which never yields
one: a response may spell `<|EOT|>` or `B response`, but it cannot leave its section.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlaudio.dialogue.template import ChatTemplate, Prompt
from rlaudio.errors import VerdictError
from rlaudio.models.base import ChatStyle, Tokenizer
from rlaudio.rewards.levels import FIVE, VERDICT_WORDS, Scale
from rlaudio.types import AudioPart, ClipSpan, FinishReason, IntArray, Part, Role, RubricItem

PROMPT_WORDS = ("judge", "rule", "reference", "response", "A", "B", *VERDICT_WORDS)
"""What a word vocabulary must hold beside the template's words for a judge to be asked and to answer."""

Pieces = Callable[[AudioPart], Sequence[tuple[str, int]]]
"""(hash, number of placeholders) of each piece of a sound, by the judge model's own rule."""


@dataclass(frozen=True, slots=True)
class Said:
    """One earlier message.

    Attributes:
        text: what was said, sounds as their transcripts.
        parts: the sounds and texts it was made of, for a judge that hears; empty where only the text is known.
    """

    role: Role
    text: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is judged.

    Attributes:
        history: what was said up to and including the user message that is answered.
        reference: the reference response, which is taken to be right.
        response: the judged response.
        criterion: a rubric, or one item of it; None asks for the ordinary preference.
    """

    history: tuple[Said, ...]
    reference: str
    response: str
    criterion: str | None = None


def whole_rubric(items: Sequence[RubricItem]) -> str:
    """All items as one criterion, critical ones first, one per line."""
    return "\n".join(item.text for item in sorted(items, key=lambda item: not item.critical))


class JudgePrompt:
    """Renders comparisons and reads verdicts. Stateless.

    Args:
        tokenizer, style: the judge model's.
        instructions: the system section.
        max_section_tokens: longer texts are cut at this many ids, so one endless reply cannot outgrow the window.
        scale: the levels a verdict can have.
        pieces: for a judge that hears: how a sound of the history becomes placeholders. None reads transcripts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        style: ChatStyle,
        instructions: str = "judge",
        max_section_tokens: int = 256,
        scale: Scale = FIVE,
        pieces: Pieces | None = None,
    ) -> None:
        self.scale = scale
        self._template = ChatTemplate(tokenizer, style=style)
        self._max_section_tokens = max_section_tokens
        self._pieces = pieces
        self.hears = pieces is not None
        self.instructions = instructions
        self._verdicts = {word: value for value, word in enumerate(scale.words)}
        header = self._template.header("system")
        self._opening = [*header, *self._template.text(instructions), *self._template.closing]

    def ids(self, comparison: Comparison, *, response_first: bool) -> IntArray:
        """[P] ids up to the judge's first sampled token. The response is A when `response_first`, else B."""
        return self.render(comparison, response_first=response_first).ids

    def render(self, comparison: Comparison, *, response_first: bool) -> Prompt:
        """The same ids, with the places of the sounds that the judge hears."""
        ids, clips = list(self._opening), list[ClipSpan]()
        num_sounds = 0
        for said in comparison.history:
            if self._pieces is None or not any(isinstance(part, AudioPart) for part in said.parts):
                ids += self._section(self._template.header(said.role), said.text)
                continue
            ids += self._template.header(said.role)
            for part in said.parts:
                if not isinstance(part, AudioPart):
                    ids += self._text(part.text)
                    continue
                num_sounds += 1
                pieces = self._pieces(part)
                sound, starts = self._template.sound([count for _, count in pieces], number=num_sounds)
                for (sha256, count), start in zip(pieces, starts, strict=True):
                    clips.append(ClipSpan(sha256, len(ids) + start, len(ids) + start + count))
                ids += sound
            ids += self._template.closing
        if comparison.criterion is not None:
            ids += self._section(self._template.titled("rule"), comparison.criterion)
        pair = [("reference", comparison.reference), ("response", comparison.response)]
        for letter, (kind, text) in zip("AB", reversed(pair) if response_first else pair, strict=True):
            ids += self._section(self._template.titled(f"{letter} {kind}"), text)
        return Prompt(np.asarray([*ids, *self._template.generation_header], dtype=np.int32), tuple(clips))

    def answer(self, rationale: str, verdict: int) -> IntArray:
        """[R] the ids a judge should sample: rationale, `</think>`, the verdict's word, end of turn."""
        return np.asarray(self._template.response(rationale, self.scale.words[verdict]), dtype=np.int32)

    def parse(self, response_ids: Sequence[int], *, finish_reason: FinishReason = "stop") -> int:
        """Read a verdict from A's point of view: a rationale, `</think>`, exactly one verdict word, end of turn.

        Raises:
            VerdictError: anything else, with what stood there instead and of which kind it is.
        """
        parsed = self._template.parse(response_ids)
        if finish_reason != "stop":
            raise VerdictError(
                f"the judge did not finish within {len(response_ids)} tokens: raise max_new_tokens", kind="truncated"
            )
        if not parsed.thinking:
            raise VerdictError("the judge gave no rationale before its verdict: it is not trained for this prompt")
        verdict = self._verdicts.get(parsed.reply)
        if verdict is None:
            words = ", ".join(self._verdicts)
            given = [word for word in parsed.reply.split() if word in self._verdicts]
            raise VerdictError(
                f"the judge answered {parsed.reply[:80]!r} where one of {words} must stand",
                kind="contradictory" if len(given) > 1 else "unparsable",
            )
        return verdict

    def _section(self, header: list[int], text: str) -> list[int]:
        return [*header, *self._text(text), *self._template.closing]

    def _text(self, text: str) -> list[int]:
        return self._template.text(text)[: self._max_section_tokens]
