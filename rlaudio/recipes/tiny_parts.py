"""What a run with `--tiny` works on: a few dialogues, and small checkpoints that speak in the form these need."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlaudio.audio.store import ClipStore
from rlaudio.config import ModelSettings, RunConfig, ServedModelSettings, SftConfig
from rlaudio.config_judges import RewardModelConfig
from rlaudio.config_objects import unjudged_records
from rlaudio.data.records import write_records
from rlaudio.data.tiny import NUMBERS, Wanted, first_records, made_records, num_ids, tag_of, words_of
from rlaudio.dialogue.render import clip_pieces, supervised_turns
from rlaudio.dialogue.users import played_turns, user_message
from rlaudio.errors import ConfigError
from rlaudio.models.base import ModelFamily
from rlaudio.models.families import open_family
from rlaudio.models.last_layer import Shown, fit_last_layer
from rlaudio.recipes.tiny import MAX_MODEL_LEN, Config, Places, Replaced, part_names
from rlaudio.recipes.tiny_pairs import write_pairs
from rlaudio.registry import load_object
from rlaudio.rewards.generative import GenerativeJudge
from rlaudio.rewards.levels import NUM_LEVELS, Scale
from rlaudio.rewards.preferences import read_preferences
from rlaudio.rewards.prompt import PROMPT_WORDS, Comparison, JudgePrompt, Said
from rlaudio.rewards.tagged import TaggedAnswer
from rlaudio.types import Message, PromptRecord, TextPart

NUM_TRAIN, NUM_HELDOUT = 8, 4
_ROWS_PER_S = 25.0
"""Of the families there are, the most."""
_MAX_WORDS = 300
_MAX_REPLY_WORDS = 8
_RATIONALE = "A B"
_SPARE_IDS = 64


@dataclass(frozen=True, slots=True)
class _Set:
    """A file of records of the run: where it is or would be, and where its tiny form goes."""

    old: Path
    new: Path
    split: str
    count: int
    wanted: Wanted


def make_parts(config: Config, changes: Sequence[Replaced], places: Places) -> list[str]:
    """Make everything that `changes` name below `places`, which is new.

    Args:
        config: as the file says, at full size.

    Returns:
        One sentence per part that was made.

    Raises:
        ConfigError: no dialogue can be made that a reward source judges.
        DataError, AudioError: the file's own data cannot be used.
        CheckpointError: a checkpoint cannot be written.
    """
    places.data.mkdir(parents=True)
    named = {change.key for change in changes}
    if isinstance(config, RunConfig):
        return _parts_of_run(config, named, places)
    if isinstance(config, SftConfig):
        return _parts_of_phases(config, named, places)
    return _parts_of_judge(config, named, places)


# ---- reinforcement learning ---------------------------------------------------------------------------------------


def _parts_of_run(config: RunConfig, named: set[str], places: Places) -> list[str]:
    store, told = ClipStore(str(places.data)), list[str]()
    train, records = list[PromptRecord](), list[PromptRecord]()
    for one in _sets_of_run(config, places):
        found, said = _records(one, clips=ClipStore(config.data.clips), store=store, complete=False)
        if not one.old.is_file():
            found = _judged(config, found)
        write_records(one.new, found)
        told.append(said)
        records += found
        train += found if one.split.startswith("train") else []
    model, rewards = config.model, config.rewards
    if "model.path" in named:
        family = _fresh(model, places.policy, words=_spoken_words(records), seed=config.run.seed)
        fit_last_layer(family, list(_replies(train, family, store)), sounds=_Sounds(store))
        told.append(f"{places.policy}: random weights of {model.family}, but for a last layer that speaks in form")
    if "rewards.judge_model.path" in named:
        endpoint = bool(rewards.judge_model.endpoint.url)
        settings = model if endpoint else rewards.judge_model
        family = _fresh(settings, places.judge, words=_judge_words(records, config), seed=config.run.seed + 1)
        shown = list(_verdicts(config, train, family, store))
        if shown:
            fit_last_layer(family, shown, sounds=_Sounds(store), exact=True)
        told.append(f"{places.judge}: as the policy; its verdicts can be read, and mean nothing")
    return told


def _sets_of_run(config: RunConfig, places: Places) -> Iterator[_Set]:
    data, sources = config.data, config.rewards.sources
    tasks = [*(task for source in sources for task in source.only.tasks), *data.augment.keep]
    axes = [axis for source in sources for axis in source.only.axes]
    tags = [str(s.options.get("tag", "answer")) for s in sources if load_object(s.judge) is TaggedAnswer]
    wanted = Wanted(list(dict.fromkeys(tasks)), list(dict.fromkeys(axes)), tag=tags[0] if tags else "")
    if data.train:
        yield _Set(Path(data.train), places.file("train"), "train", NUM_TRAIN, wanted)
    for part, name in zip(data.mixture, part_names(data.mixture), strict=True):
        split = f"train-{name}"
        spoken = _is_spoken(f"{name} {Path(part.path).stem}")
        yield _Set(Path(part.path), places.file(split), split, NUM_TRAIN, replace(wanted, spoken=spoken))
    for name, path in data.heldout.items():
        yield _Set(Path(path), places.file(f"heldout-{name}"), f"heldout-{name}", NUM_HELDOUT, wanted)


def _judged(config: RunConfig, records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Made records, each for the sources that can judge it."""
    names = [source.name for source in config.rewards.sources]
    kept = []
    reasons: dict[str, str] = {}
    for record in records:
        found = {source: problem for _, source, problem in unjudged_records(config, [record])}
        reasons |= found
        if left := tuple(name for name in names if name not in found):
            kept.append(replace(record, sources=left) if found else record)
    if not kept:
        raise ConfigError(
            f"--tiny can make no dialogue that a reward source judges ({'; '.join(reasons.values())}): put records "
            "where data.train names them"
        )
    return kept


def _replies(records: Sequence[PromptRecord], family: ModelFamily, store: ClipStore) -> Iterator[Shown]:
    """Replies to every record, right and wrong ones, with reasoning and without: the form, not the answers."""
    pools: dict[bool, list[str]] = {True: [], False: []}
    for record in records:
        for turn in played_turns(record):
            message = user_message(record, turn)
            pools[bool(message.choices)] += _possible(message)
    for number, record in enumerate(records):
        for shift in range(6):
            messages: list[Message] = []
            for position, message in enumerate(record.messages):
                messages.append(message)
                following = record.messages[position + 1 : position + 2]
                if message.role != "user" or (following and following[0].role == "assistant"):
                    continue
                pool = _possible(message) if message.choices else pools[False]
                text = pool[(number + shift) % len(pool)]
                if (tag := tag_of(message.text)) and shift % 3:
                    text = f"<{tag}> {text} </{tag}>"
                thinking = f"heard {text}" if shift % 2 else ""
                messages.append(Message("assistant", (TextPart(text),), thinking=thinking))
            for row in supervised_turns(replace(record, messages=tuple(messages)), family=family, clips=store):
                yield Shown(row.prompt_ids, row.response_ids, row.clips)


def _possible(message: Message) -> list[str]:
    if message.choices:
        return [_cut(choice.text) for choice in message.choices]
    return [_cut(message.reference_response or message.answer or "yes")]


def _cut(text: str) -> str:
    return " ".join(words_of(text)[:_MAX_REPLY_WORDS]) or "yes"


def _verdicts(
    config: RunConfig, records: Sequence[PromptRecord], family: ModelFamily, store: ClipStore
) -> Iterator[Shown]:
    """Comparisons as every generative source asks them, each with a verdict drawn from its content."""
    for source in config.rewards.sources:
        made = load_object(source.judge)
        if not (isinstance(made, type) and issubclass(made, GenerativeJudge)):
            continue
        options = source.options
        hears = options.get("hears") == "sound"
        prompt = JudgePrompt(
            family.tokenizer,
            style=family.style,
            instructions=options.get("instructions") or "judge",
            max_section_tokens=64,
            scale=Scale(options.get("levels", NUM_LEVELS)),
            pieces=(lambda part: clip_pieces(part, family=family, clips=store)) if hears else None,
        )
        yield from _shown_verdicts(prompt, _comparisons(records), family)


def _shown_verdicts(prompt: JudgePrompt, comparisons: Iterable[Comparison], family: ModelFamily) -> Iterator[Shown]:
    # Without line breaks each token of an answer follows from the one before it, and no layer needs to look further.
    newline = family.tokenizer.encode("\n")
    for comparison in comparisons:
        for first in (False, True):
            asked = prompt.render(comparison, response_first=first)
            digest = hashlib.blake2b(asked.ids.tobytes(), digest_size=8).digest()
            verdict = int.from_bytes(digest, "big") % prompt.scale.num_levels
            answer = prompt.answer(_RATIONALE, verdict)
            yield Shown(asked.ids, answer[~np.isin(answer, newline)], asked.clips)


def _comparisons(records: Sequence[PromptRecord]) -> Iterator[Comparison]:
    replies = [
        text for record in records for turn in played_turns(record) for text in _possible(user_message(record, turn))
    ]
    for number, record in enumerate(records):
        for turn in played_turns(record):
            message = user_message(record, turn)
            reference = _cut(message.reference_response or message.answer or "yes")
            said = (Said(message.role, message.text, message.parts),)
            items = [None, *(item.text for item in message.rubric)]
            for shift in range(8):
                response = replies[(number + 5 * shift + turn) % len(replies)]
                yield Comparison(said, reference, response, items[shift % len(items)])


# ---- supervised ---------------------------------------------------------------------------------------------------


def _parts_of_phases(config: SftConfig, named: set[str], places: Places) -> list[str]:
    store, told, records = ClipStore(str(places.data)), list[str](), list[PromptRecord]()
    for phase in config.phases:
        sets = [(phase.data, phase.name)] if phase.data else []
        names = part_names(phase.mixture)
        sets += [(part.path, f"{phase.name}-{name}") for part, name in zip(phase.mixture, names, strict=True)]
        for path, split in sets:
            wanted = Wanted(spoken=_is_spoken(split), complete=True)
            one = _Set(Path(path), places.file(split), split, NUM_TRAIN, wanted)
            found, said = _records(one, clips=ClipStore(config.clips or "."), store=store, complete=True)
            write_records(one.new, found)
            told.append(said)
            records += found
    if "model.path" in named:
        _fresh(config.model, places.policy, words=_spoken_words(records), seed=config.run.seed)
        told.append(f"{places.policy}: random weights of {config.model.family}")
    return told


def _parts_of_judge(config: RewardModelConfig, named: set[str], places: Places) -> list[str]:
    store, told = ClipStore(str(places.data)), list[str]()
    clips, levels = ClipStore(config.clips or "."), config.asking.levels
    files = [(Path(phase.data), places.file(phase.name), phase.name) for phase in config.phases]
    files.append((Path(config.heldout), places.file("heldout"), "heldout"))
    for old, new, split in files:
        made = write_pairs(old, new, split=split, levels=levels, clips=clips, store=store)
        told.append(f"{new}: {made}")
    if "model.path" in named:
        scale, hears = Scale(levels), config.asking.hears == "sound"
        pairs = [one for _, new, _ in files for one in read_preferences(new, scale=scale, hears=hears, clips=store)]
        texts = [text for one in pairs for text in (one.comparison.reference, one.comparison.response)]
        # Unknown words would make one prompt of several, held-out ones among them.
        texts += [said.text for one in pairs for said in one.comparison.history]
        words = [
            *PROMPT_WORDS,
            *scale.words,
            *words_of(config.reasoning),
            *(w for text in texts for w in words_of(text)),
        ]
        family = _fresh(config.model, places.policy, words=words, seed=config.run.seed)
        prompt = JudgePrompt(
            family.tokenizer,
            style=family.style,
            instructions=config.asking.instructions or "judge",
            max_section_tokens=64,
            scale=scale,
            pieces=(lambda part: clip_pieces(part, family=family, clips=store)) if hears else None,
        )
        shown = list(_shown_verdicts(prompt, [one.comparison for one in pairs], family))
        fit_last_layer(family, shown, sounds=_Sounds(store), exact=True)
        told.append(
            f"{places.policy}: random weights of {config.model.family}, but for a last layer that gives verdicts"
        )
    return told


# ---- what all have ------------------------------------------------------------------------------------------------


class _Sounds(dict[str, Any]):
    """Samples by hash, read when they are asked for."""

    def __init__(self, store: ClipStore) -> None:
        super().__init__()
        self._store = store

    def __missing__(self, sha256: str) -> Any:
        return self._store.get(sha256).samples


def _records(one: _Set, *, clips: ClipStore, store: ClipStore, complete: bool) -> tuple[list[PromptRecord], str]:
    """The records of a set, and a sentence on where they are from."""
    if not one.old.is_file():
        records = made_records(one.count, split=one.split, wanted=one.wanted, store=store)
        return records, f"{one.new}: {len(records)} dialogues made here, for {one.old} is not there"

    def fits(record: PromptRecord) -> bool:
        most = num_ids(record, clips=clips, rows_per_s=_ROWS_PER_S, per_reply=_SPARE_IDS)
        return most <= MAX_MODEL_LEN

    records = first_records(one.old, one.count, clips=clips, store=store, fits=fits, complete=complete)
    return records, f"{one.new}: the first {len(records)} dialogues of {one.old} that are short enough"


def _is_spoken(name: str) -> bool:
    """A part of a mixture whose name or file speaks of text is made of text."""
    return "text" not in name


def _fresh(
    settings: ModelSettings | ServedModelSettings, path: Path, *, words: Iterable[str], seed: int
) -> ModelFamily:
    kept = list(dict.fromkeys((*NUMBERS, *words)))[:_MAX_WORDS]
    load_object(settings.family).make_tiny(path, words=kept, seed=seed)
    return open_family(replace(settings, path=str(path)))


def _spoken_words(records: Sequence[PromptRecord]) -> list[str]:
    """Words of replies first: where there are too many, prompts lose some."""
    replies, prompts = ["heard", "yes"], list[str]()
    for record in records:
        for message in record.messages:
            texts = [message.reference_response or "", *(choice.text for choice in message.choices)]
            texts += [message.thinking or "", message.text if message.role == "assistant" else message.answer or ""]
            replies += [word for text in texts for word in words_of(text)]
            prompts += words_of(message.text)
    return [*replies, *prompts]


def _judge_words(records: Sequence[PromptRecord], config: RunConfig) -> list[str]:
    levels = [source.options.get("levels", NUM_LEVELS) for source in config.rewards.sources]
    scales = [word for level in levels if isinstance(level, int) for word in Scale(level).words]
    rubrics = [item.text for record in records for message in record.messages for item in message.rubric]
    return [*PROMPT_WORDS, *scales, *_spoken_words(records), *(word for text in rubrics for word in words_of(text))]


def write_told(path: Path, told: Sequence[str], changes: Sequence[Replaced]) -> None:
    """`tiny.json`: what was made and replaced."""
    values = {
        "made": list(told),
        "replaced": [{"key": c.key, "file": c.old, "tiny": c.new, "why": c.why} for c in changes],
    }
    path.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
