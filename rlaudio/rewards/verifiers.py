"""Whether a reply gives the right answer, and keeps the rules of its turn: pure functions, no model, no state.

A turn is correct when its answer is matched (if one is given) and every rule in force holds. All comparisons ignore
case, punctuation and whitespace.

How an answer is matched: `says_only`, where the record gives no choices. Words that a rule demands are taken off the
reply first, then words that frame an answer without being one (`FRAMING_WORDS`: "sure", "it is", "your name"). What is
left must be exactly the answer. So "seven" and "sure, it is seven" are right, while "six seven eight" is wrong: every
word that is not known to be mere framing counts as a claim, hence listing candidates never pays, whatever the category.
The price is strictness: "two plus five is seven" is wrong too. `numeric` is looser in words and as strict in numbers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rlaudio.errors import DataError
from rlaudio.rewards.constraints import check_constraint
from rlaudio.rewards.quantities import Quantity, quantities
from rlaudio.rewards.wording import find_run, without_run, words
from rlaudio.types import Constraint, Message

FRAMING_WORDS = frozenset(
    """
    a an the this that its thats heres im ill youre it is are was be am i me my you your we our so well and for of to in
    here there now as sure okay ok yes right certainly absolutely alright indeed got course thank thanks please welcome
    sorry dear friend sir happy glad pleased nice great good lovely wonderful help helping meet hear know think believe
    asking question will would can do have remember say said answer reply call called asked want like live make made
    name color colour pet code city number word voice speech sound sounds speaking speak
    """.split()
)
"""English words that frame an answer without being one. Words of the answer itself are never taken off."""

_RIVALS = frozenset("yes no right wrong well please thanks friend sir dear".split())
"""Words that may frame, and may be the answer. Where the answer is made of them, the others are claims like any other:
else "please thanks sir" would match each of its words."""

DENIALS = frozenset("not isnt arent wasnt never neither nor cannot".split())
"""Where these stand beside an answer, it may be denied: "it is not seven"."""


def exact(reply: str, answer: str) -> bool:
    """The reply is the answer and nothing else."""
    return words(reply) == words(answer)


def says_only(reply: str, answer: str, *, framing: frozenset[str] = FRAMING_WORDS) -> bool:
    """The reply is the answer, once, as one run of words, plus framing words at most.

    Args:
        reply: free text.
        answer: one or more words.
        framing: words that may surround the answer; those the answer is made of are kept in any case.
    """
    reply_words, answer_words = words(reply), words(answer)
    if not answer_words or find_run(reply_words, answer_words) < 0:
        return False
    claims = {*answer_words, *(_RIVALS if _RIVALS.issuperset(answer_words) else ())}
    return [word for word in reply_words if word not in framing or word in claims] == answer_words


def numeric(reply: str, answer: str, *, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> bool:
    """The reply names the answer's number, denies nothing, and names no other; "7", "seven" and "7.0" are the same.

    Units: where the answer has one ("5 minutes"), a number in the reply counts in its own, converted ("300 s"), and
    without a unit as if it had the answer's. Where the answer has none, units in the reply are not looked at.

    Args:
        tolerance: how far off a number may be, in the answer's unit.
        relative_tolerance: the same as a share of the answer; the larger of both counts.

    Raises:
        DataError: the answer does not name exactly one number.
    """
    wanted = quantities(answer)
    if len(wanted) != 1:
        raise DataError(f"answer {answer!r} names {len(wanted)} numbers, a numeric check needs one; correct the record")
    found = quantities(reply)
    allowed = max(tolerance, relative_tolerance * abs(wanted[0].value))
    right = bool(found) and all(_same(one, wanted[0], allowed=allowed) for one in found)
    return right and DENIALS.isdisjoint(words(reply))


def _same(found: Quantity, wanted: Quantity, *, allowed: float) -> bool:
    unit = wanted.scaled / wanted.value if wanted.dimension and wanted.value else 1.0
    if wanted.dimension and found.dimension:
        if found.dimension != wanted.dimension:
            return False
        off = abs(found.scaled - wanted.scaled) / unit
    else:
        off = abs(found.value - wanted.value)
    return off <= allowed + 1e-9 * max(1.0, abs(wanted.value))


_MARK = re.compile(r"\W*(\w)\s*[).:]")
_IN_PARENTHESES = re.compile(r"[(\[{*]\s*(\w)\s*[)\]}*]")
_NAMED = re.compile(r"\b(?i:option|choice|letter|answer(?:\s+is)?)\s*:?\s*(\w)(?=\s*(?:[).,:;!?*]|$))")
_CAPITAL = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
_ARTICLE = re.compile(r"\s+[a-z]")


def multiple_choice(reply: str, answer: str, choices: Mapping[str, str]) -> bool:
    """The reply picks one choice, by its letter or its text, and it is the right one. Two picks are none.

    A letter counts at the start ("b) a dog", "B: ..."), in parentheses, behind "answer", "option", "choice" or
    "letter", as a capital anywhere, or bare as the first or last word where nothing else is picked. "A dog" and "I
    think" hold an article and a pronoun.

    Args:
        reply: free text, e.g. "B", "(b) a dog", "The answer is B." or "it is a dog".
        answer: the letter of the right choice.
        choices: letter -> text.

    Raises:
        DataError: the answer is not one of the letters.
    """
    texts = {letter.casefold(): words(text) for letter, text in choices.items()}
    right = answer.strip().casefold()
    if right not in texts:
        raise DataError(f"answer {answer!r} is not one of the choices {sorted(choices)}; correct the record")
    marked = _MARK.match(reply)
    picked = {match.casefold() for find in (_IN_PARENTHESES, _NAMED) for match in find.findall(reply)} & set(texts)
    picked |= {match[1].casefold() for match in _CAPITAL.finditer(reply) if not _is_word(reply, match)} & set(texts)
    picked |= ({marked[1].casefold()} if marked else set()) & set(texts)
    rest = words(reply)
    if marked and marked[1].casefold() in texts:
        rest = rest[1:]
    # Longest text first: "red" must not be found inside "dark red".
    for letter, text in sorted(texts.items(), key=lambda item: -len(item[1])):
        if find_run(rest, text) >= 0:
            picked.add(letter)
            rest = without_run(rest, text)
    if not picked and rest:
        # Bare letters lead or end a reply: the article "a" inside a sentence is no choice.
        picked = {rest[0], rest[-1]} & set(texts)
    return picked == {right} and DENIALS.isdisjoint(rest)


def _is_word(reply: str, match: re.Match[str]) -> bool:
    """ "A dog", "I think": letters that are words of their own."""
    return match[1] in "AI" and bool(_ARTICLE.match(reply, match.end()))


Matcher = Callable[[str, str], bool]


def matcher_for(
    name: str, message: Message, *, tolerance: float, relative_tolerance: float, framing: frozenset[str]
) -> Matcher:
    """The check `(reply, answer) -> right` that `name` stands for.

    Args:
        name: "auto" is "choice" where the message has choices, else "only"; "only", "exact", "numeric", "choice".

    Raises:
        DataError: "choice", and the message has none.
        KeyError: another name.
    """
    choices = {choice.letter: choice.text for choice in message.choices}
    if name == "auto":
        name = "choice" if choices else "only"
    if name == "choice" and not choices:
        raise DataError("the message has no choices; add them to the record, or match its answer in another way")
    matchers: Mapping[str, Matcher] = {
        "only": partial(says_only, framing=framing),
        "exact": exact,
        "numeric": partial(numeric, tolerance=tolerance, relative_tolerance=relative_tolerance),
        "choice": partial(multiple_choice, choices=choices),
    }
    return matchers[name]


MATCHERS = ("auto", "only", "exact", "numeric", "choice")


def turn_correct(
    message: Message,
    reply: str,
    *,
    match: str = "auto",
    rules: Sequence[Constraint] | None = None,
    num_tokens: int | None = None,
    tolerance: float = 0.0,
    relative_tolerance: float = 0.0,
    framing: frozenset[str] = FRAMING_WORDS,
) -> bool:
    """Whether `reply` answers `message`: its answer matched (when given) and all rules kept.

    Args:
        message: a user message with its checks. Without answer and rules every non-empty reply is correct.
        reply: the text after the reasoning.
        match: see `matcher_for`.
        rules: those in force in this turn (`constraints.rules_in_force`); None: the message's own.
        num_tokens: sampled ids of the turn, for rules that count them.
        tolerance, relative_tolerance: see `numeric`.
        framing: see `says_only`.

    Raises:
        DataError: a rule is unknown or malformed, or the answer cannot be matched that way.
    """
    rules = message.constraints if rules is None else rules
    kept = [check_constraint(rule, reply, num_tokens=num_tokens) for rule in rules]
    if not words(reply) or not all(kept):
        return False
    if message.answer is None:
        return True
    matches = matcher_for(match, message, tolerance=tolerance, relative_tolerance=relative_tolerance, framing=framing)
    said, left = words(reply), _without_demanded(words(reply), rules, message.answer)
    return matches(reply if left == said else " ".join(left), message.answer)


def _without_demanded(said: list[str], rules: Sequence[Constraint], answer: str) -> list[str]:
    """A reply's words without those that kept rules demand: they answer the rule, not the question."""
    left = said
    for rule in rules:
        demanded = words(rule.value)
        if rule.kind == "starts_with" and left[: len(demanded)] == demanded:
            left = left[len(demanded) :]
        elif rule.kind == "ends_with" and left[-len(demanded) :] == demanded:
            left = left[: -len(demanded)]
        elif rule.kind in ("must_include", "must_include_any"):
            variants = [words(one) for one in rule.value.split("|")] if rule.kind.endswith("any") else [demanded]
            here = [one for one in variants if find_run(left, one) >= 0 > find_run(words(answer), one)]
            left = without_run(left, here[0]) if here else left
    return left
