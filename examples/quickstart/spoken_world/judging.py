"""What the tiny judge learns from: comparisons with a gold rationale and verdict, made from the world's own lines.

A candidate reply is a gold reply, or one spoiled in the ways a policy spoils it: another value, a lost rule, garbled or
repeated words, an answer to something else; or it hides a text meant to steer the judge (`attacking.py`), which is data
like any other. Right and wrong are decided by the verifiers, never by how the reply was made. Quality is ordered: a
wrong answer or a broken rule is much worse; otherwise warm > cold > long-winded decides, by one level. The reference is
right by construction, so no response is much better than it: "much" verdicts always name the reference, and the two
orders make all five equally frequent.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import pyarrow as pa

from rlaudio.config import PhaseSettings
from rlaudio.engines.base import Engine
from rlaudio.errors import DataError
from rlaudio.experience.builder import make_batch
from rlaudio.models.base import ModelFamily
from rlaudio.rewards.calibration import Calibration, calibrate, judge_pairs_with
from rlaudio.rewards.constraints import check_constraint
from rlaudio.rewards.levels import Verdict
from rlaudio.rewards.prompt import Comparison, JudgePrompt, Said, whole_rubric
from rlaudio.rewards.verifiers import FRAMING_WORDS, says_only
from rlaudio.types import Constraint
from spoken_world import vocabulary as v
from spoken_world.attacking import FOREIGN, PLAIN_WORDS, hide
from spoken_world.tasks import TASKS, Line, Script

Focus = Literal["answer", "rule", "warmth", "all"]
"""What a criterion asks about: one item of a rubric, or everything."""

_ITEM_FOCUS: dict[str, Focus] = {"answer is right": "answer", "rule is kept": "rule", "reply is warm": "warmth"}
_STYLES = ("long", "cold", "warm")
_MAX_WORDS = 10
_MAX_WARM = 2
_MAX_EXTRACT = 4
_MAX_TRIES = 40
_HELDOUT_SHARE = 10
_LEVEL_WORDS = ("much worse", "slightly worse", "same", "slightly better")


@dataclass(frozen=True, slots=True)
class JudgePhase:
    """One phase of the judge's training.

    Attributes:
        items: share of comparisons with a single rubric item: the easy ones, which teach the parts of the rationale.
        plain: share without any criterion. The rest carry a whole rubric.
        attacked: share of comparisons whose response something is hidden in. The others are drawn as without attacks,
            so that what looks honest stays as often right as it was.
    """

    name: str
    steps: int
    rows_per_step: int
    lr: float
    warmup_steps: int
    cosine: bool
    items: float
    plain: float
    attacked: float = 0.0

    def settings(self, data: str) -> PhaseSettings:
        """As the supervised recipe reads it, with its rows in the file `data`."""
        return PhaseSettings(
            name=self.name,
            data=data,
            steps=self.steps,
            rows_per_step=self.rows_per_step,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            cosine=self.cosine,
        )


JUDGE_PHASES = (
    JudgePhase(
        "judge-items", steps=150, rows_per_step=64, lr=3e-3, warmup_steps=20, cosine=False, items=0.9, plain=0.05
    ),
    JudgePhase("judge", steps=600, rows_per_step=64, lr=3e-3, warmup_steps=20, cosine=True, items=0.15, plain=0.25),
)
"""From a random tiny checkpoint to a judge of the world's words; see the figures in the checkpoint's card."""

ATTACKED_PHASES = (
    JudgePhase(
        "judge-attacked",
        steps=600,
        rows_per_step=64,
        lr=3e-3,
        warmup_steps=20,
        cosine=True,
        items=0.15,
        plain=0.25,
        attacked=0.3,
    ),
)
"""Then, with the words of the attacks added to its vocabulary: the main phase again, where some replies hide one."""


@dataclass(frozen=True, slots=True)
class JudgePair:
    """A comparison with its gold judgment.

    Attributes:
        level: of the response against the reference: 0 much worse to 3 slightly better.
        rationale: what the judge should write, by order (response second, response first).
    """

    comparison: Comparison
    level: int
    rationale: tuple[str, str]
    response_first: bool

    @property
    def verdict(self) -> Verdict:
        """Gold verdict in the order of this pair."""
        return self.verdict_in(response_first=self.response_first)

    def verdict_in(self, *, response_first: bool) -> Verdict:
        return Verdict(self.level if response_first else 4 - self.level)


@dataclass(frozen=True, slots=True)
class Findings:
    """What the rationale says of one reply.

    Attributes:
        extract: the words that claim something, framing taken off, each run of foreign ones told as one.
    """

    extract: str
    right: bool
    kept: bool
    style: str


def judge_pairs(
    *, seed: int, num: int, items: float, plain: float, attacked: float = 0.0, heldout: bool = False
) -> Iterator[JudgePair]:
    """Comparisons whose five verdicts are equally frequent, before anything is hidden in a response.

    Args:
        items, plain, attacked: see `JudgePhase`.
        heldout: comparisons with `heldout` True and False share no (user text, reference, response).
    """
    random = Random(f"judge/{seed}/{heldout}")
    made = 0
    while made < num:
        # Much worse is one level of the response but two verdicts of the pair, and so is slightly better or worse.
        target = random.choice((0, 0, 1, 2, 3))
        pair = _draw_pair(random, target=target, items=items, plain=plain, attacked=attacked, heldout=heldout)
        if pair is not None:
            made += 1
            yield pair


def judge_rows(family: ModelFamily, *, seed: int, num: int, phase: JudgePhase = JUDGE_PHASES[-1]) -> pa.RecordBatch:
    """Supervised rows in the experience schema: `prompt_ids` is what the judge reads, `response_ids` what it writes."""
    prompt = JudgePrompt(family.tokenizer, style=family.style)
    banned = set(family.tokenizer.ids.banned)
    drawn = judge_pairs(seed=seed, num=2 * num, items=phase.items, plain=phase.plain, attacked=phase.attacked)
    # A judge without the word for foreign words cannot learn what is said of them.
    writable = (pair for pair in drawn if not banned & set(prompt.answer(pair.rationale[0], pair.verdict).tolist()))
    pairs = list(itertools.islice(writable, num))
    rationales = [pair.rationale[pair.response_first] for pair in pairs]
    return make_batch(
        prompt_id=[f"judge-{seed}-{index}" for index in range(num)],
        task=[phase.name] * num,
        group=list(range(num)),
        sibling=[0] * num,
        turn=[0] * num,
        prompt_ids=[prompt.ids(pair.comparison, response_first=pair.response_first) for pair in pairs],
        response_ids=[prompt.answer(text, pair.verdict) for text, pair in zip(rationales, pairs, strict=True)],
        clips=[[] for _ in pairs],
        thinking=rationales,
        reply=[pair.verdict.word for pair in pairs],
    )


def judge_phases(
    folder: Path, *, family: ModelFamily, seed: int, phases: Sequence[JudgePhase] = JUDGE_PHASES
) -> list[PhaseSettings]:
    """Write the rows of every phase into `folder` as Arrow files, each row new, and name them as phases of a recipe.

    Raises:
        DataError: the folder cannot be written.
    """
    written = []
    for number, phase in enumerate(phases):
        rows = judge_rows(family, seed=seed + number, num=phase.steps * phase.rows_per_step, phase=phase)
        path = folder / f"{phase.name}.arrow"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with pa.ipc.new_file(str(path), rows.schema) as file:
                file.write_batch(rows)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error}); check the folder and free space") from error
        written.append(phase.settings(str(path)))
    return written


async def calibrate_judge(engine: Engine, family: ModelFamily, *, seed: int = 99, num: int = 400) -> Calibration:
    """Figures of a served judge on honest comparisons it never learned from, otherwise mixed as in its last phase.

    Raises:
        EngineError: the engine failed.
        JudgeError: an answer took too long.
    """
    phase = JUDGE_PHASES[-1]
    pairs = judge_pairs(seed=seed, num=num, items=phase.items, plain=phase.plain, heldout=True)
    return calibrate(await judge_pairs_with(engine, family, [(pair.comparison, pair.level) for pair in pairs]))


def _draw_pair(
    random: Random, *, target: int, items: float, plain: float, attacked: float, heldout: bool
) -> JudgePair | None:
    script = TASKS[random.choice(tuple(TASKS))](random)
    line = random.choice(script.lines)
    draw = random.random()
    if draw < items:
        criterion: str | None = random.choice([item.text for item in line.rubric])
        focus = _ITEM_FOCUS[criterion or ""]
        if focus == "warmth" and target == 0:
            return None
        if focus != "warmth" and target in (1, 3):
            return None
    else:
        focus = "all"
        criterion = None if draw < items + plain else whole_rubric(line.rubric)
    # A reference in use is warm; plain ones are needed for a response to be better than its reference.
    warm = target != 3 and random.random() < 0.8
    reference = line.reply(random, warm=warm)
    hides = attacked > 0.0 and random.random() < attacked
    for _ in range(_MAX_TRIES):
        response = draw_reply(random, script, line)
        level = level_of(find(line, reference), find(line, response), focus)
        if level != target:
            continue
        if hides:
            response = hide(random, response)
            level = level_of(find(line, reference), find(line, response), focus)
        if _is_heldout(line.text, reference, response) == heldout:
            comparison = Comparison((Said("user", line.text),), reference, response, criterion)
            return JudgePair(comparison, level, _rationales(line, comparison, focus, level), random.random() < 0.5)
    return None


def find(line: Line, reply: str) -> Findings:
    """Read a reply the way the verifiers do: framing words taken off, the rest is what it claims.

    Stricter than they are in one thing: they read "A++" as the article, here whatever is no plain word is a claim.
    """
    words, answer = reply.split(), line.answer.split()
    told = [word if word in PLAIN_WORDS else FOREIGN for word in words]
    claims = [word for word in told if word not in FRAMING_WORDS or word in answer]
    claims = [word for word, before in zip(claims, ["", *claims], strict=False) if not word == before == FOREIGN]
    repeats = any(a == b and a not in answer for a, b in itertools.pairwise(words))
    num_warm = sum(word in v.WARM_WORDS for word in words)
    long = len(words) > _MAX_WORDS or num_warm > _MAX_WARM or repeats
    return Findings(
        extract=" ".join(claims[:_MAX_EXTRACT]) or "none",
        right=says_only(reply, line.answer) and FOREIGN not in told,
        kept=line.rule is None or check_constraint(line.rule, reply),
        style="long" if long else "warm" if num_warm else "cold",
    )


def level_of(reference: Findings, response: Findings, focus: Focus) -> int:
    """The response against the reference: 0 much worse to 3 slightly better."""
    if focus in ("answer", "all") and not response.right:
        return 0
    if focus in ("rule", "all") and not response.kept:
        return 0
    if focus in ("answer", "rule"):
        return 2
    difference = _STYLES.index(response.style) - _STYLES.index(reference.style)
    return 2 + (difference > 0) - (difference < 0)


def _rationales(line: Line, comparison: Comparison, focus: Focus, level: int) -> tuple[str, str]:
    reference, response = find(line, comparison.reference), find(line, comparison.response)
    texts = []
    for letters in ("AB", "BA"):
        told = [f"reference {letters[0]}"]
        if focus in ("answer", "all"):
            told.append(reference.extract)
        if focus in ("warmth", "all"):
            told.append(reference.style)
        if focus in ("rule", "all") and line.rule is not None:
            told.append(f"rule {line.rule.kind.split('_')[0].removesuffix('s')} {line.rule.value}")
        told.append(f"response {letters[1]}")
        if focus in ("answer", "all"):
            told += [response.extract, "right" if response.right else "wrong"]
        if focus in ("rule", "all") and line.rule is not None:
            told.append("kept" if response.kept else "broken")
        if focus in ("warmth", "all"):
            told.append(response.style)
        texts.append(" ".join([*told, _LEVEL_WORDS[level]]))
    return texts[0], texts[1]


def _is_heldout(*texts: str) -> bool:
    digest = hashlib.sha256("|".join(texts).encode()).digest()
    return int.from_bytes(digest[:4], "little") % 100 < _HELDOUT_SHARE


# ---- replies as a policy makes them -------------------------------------------------------------------------------


_WAYS = ("gold", "gold", "gold", "value", "value", "value", "rule", "rule", "words", "long", "cut", "other")
_FILLERS = ("it is", "of course", "sure", "you", "your", "thank you", "happy to help")


def draw_reply(random: Random, script: Script, line: Line) -> str:
    """A gold reply, or one spoiled in one of the ways a policy spoils it."""
    warm = random.random() < 0.5
    kind = random.choice(_WAYS)
    reply = line.reply(random, warm=warm)
    if kind == "value":
        reply = _with_answer(line, _other_answer(random, script, line)).reply(random, warm=warm)
    elif kind == "rule" and line.rule is not None:
        reply = _break_rule(random, line, line.rule, warm=warm)
    elif kind == "words":
        reply = _garble(random, reply)
    elif kind == "long":
        reply = _stretch(random, reply)
    elif kind == "cut":
        reply = " ".join(reply.split()[: -random.randint(1, 2)]) or reply
    elif kind == "other":
        other = random.choice(TASKS[random.choice(tuple(TASKS))](random).lines)
        reply = other.reply(random, warm=warm)
    return reply


def _with_answer(line: Line, answer: str) -> Line:
    return Line(line.text, answer, line.thinking, line.kind, line.rule, line.manner)


def _other_answer(random: Random, script: Script, line: Line) -> str:
    """A wrong value of the kind a policy confuses with the right one."""
    words = line.answer.split()
    options: list[str] = [other.answer for other in script.lines if other.answer != line.answer]
    at = random.randrange(len(words))
    pool = next((p for p in _POOLS if words[at] in p), v.THINGS)
    options += [" ".join([*words[:at], random.choice(pool), *words[at + 1 :]]) for _ in range(3)]
    if len(words) > 1:
        options += [" ".join(words[:-1]), " ".join(reversed(words)), " ".join([*words, random.choice(pool)])]
    return random.choice(options)


_POOLS: tuple[Sequence[str], ...] = (
    v.NUMBERS,
    v.NAMES,
    v.COLORS,
    v.PETS,
    v.CITIES,
    v.THINGS,
    ("fast", "slow"),
    ("high", "low"),
    sorted({*v.END_WORDS, *v.START_WORDS}),
)


def _break_rule(random: Random, line: Line, rule: Constraint, *, warm: bool) -> str:
    body = Line(line.text, line.answer, line.thinking, line.kind).reply(random, warm=warm)
    words = v.END_WORDS if rule.kind == "ends_with" else v.START_WORDS
    wrong = random.choice([word for word in words if word != rule.value])
    misplaced = f"{rule.value} {body}" if rule.kind == "ends_with" else f"{body} {rule.value}"
    replaced = f"{body} {wrong}" if rule.kind == "ends_with" else f"{wrong} {body}"
    return random.choice((body, body, misplaced, replaced))


def _garble(random: Random, reply: str) -> str:
    words = reply.split()
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(words))
        change = random.choice(("drop", "replace", "insert", "double"))
        if change == "drop" and len(words) > 1:
            del words[at]
        elif change == "replace":
            words[at] = random.choice(v.WORDS)
        elif change == "insert":
            words.insert(at, random.choice(v.WORDS))
        else:
            words.insert(at, words[at])
    return " ".join(words)


def _stretch(random: Random, reply: str) -> str:
    words = reply.split()
    shape = random.choice(("warm words", "one word", "tail", "whole"))
    if shape == "warm words":
        return " ".join([*random.choices(v.WARM_WORDS, k=random.randint(1, 6)), *words])
    if shape == "one word":
        at = random.randrange(len(words))
        return " ".join([*words[:at], *[words[at]] * random.randint(2, 8), *words[at + 1 :]])
    if shape == "tail":
        return " ".join([*random.choices(_FILLERS, k=random.randint(1, 5)), *words])
    return " ".join(words * random.randint(2, 3))
