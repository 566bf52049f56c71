"""Users who improvise: equal seeds give equal dialogues, nothing meant is lost, and a reply ends where it was heard."""

import asyncio
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from rlaudio.audio.store import ClipStore
from rlaudio.config import DialogueSettings, EndpointSettings, JudgeModelSettings
from rlaudio.data.lines import parse_record
from rlaudio.data.records import record_to_json
from rlaudio.dialogue.disfluency import Disfluency, count_words, disfluent, first_words, sentences_within
from rlaudio.dialogue.player import DialoguePlayer, PlaySpec
from rlaudio.dialogue.served import ServedText
from rlaudio.dialogue.simulated import SimulatedUser
from rlaudio.dialogue.template import ChatTemplate, Context
from rlaudio.dialogue.users import ScriptedUser, UserServices, as_said, heard_replies
from rlaudio.engines.base import Sampling
from rlaudio.errors import AudioError, ConfigError, DataError, EngineError, RolloutError, TurnTimeoutError
from rlaudio.experience.builder import played_batch, read_dialogues
from rlaudio.rewards.generative import said_before
from rlaudio.rewards.references import SiblingReferences
from rlaudio.types import Dialogue, FloatArray, Message, Persona, PromptRecord, TextPart
from tests.fakes import IDS, FakeEngine, FakeFamily, SpellingTokenizer
from tests.scripted_endpoint import ScriptedEndpoint, said

VOICES = ["tests.unit.test_simulated_user:ToneVoice"]
PLAIN = {"hesitations": 0.0, "repairs": 0.0, "revisions": 0.0, "interruptions": 0.0}
REPLY = "there are two tables free by the window"
SPEC = PlaySpec(group=5, num_siblings=2, sampling=Sampling(max_new_tokens=8, stop_token_ids=IDS.stop), seed="run0")


class ToneVoice:
    """A tenth of a second per word, of a loudness made of the words: other words are another sound."""

    def __init__(self, failing: str = "") -> None:
        self._failing = failing

    def speak(self, text: str) -> FloatArray:
        if self._failing and self._failing in text:
            raise AudioError("the voice is hoarse")
        level = int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big") / 65536
        return np.full(1_600 * len(text.split()), 0.1 + 0.8 * level, np.float32)


class Model:
    """Says the brief of the last message back, so that what was asked can be read off; keeps all questions."""

    def __init__(self, answer: str | Exception | None = None) -> None:
        self._answer = answer
        self.asked: list[tuple[Any, ...]] = []

    async def complete(
        self, messages: Sequence[dict[str, Any]], *, max_new_tokens: int, temperature: float, seed: int | None
    ) -> Any:
        self.asked.append((list(messages), seed))
        if isinstance(self._answer, Exception):
            raise self._answer
        told = re.findall(r"\[Now: (.*)\]", messages[-1]["content"])[-1]
        return _Said(f"please {told}" if self._answer is None else self._answer)


@dataclasses.dataclass
class _Said:
    text: str


def booking(*briefs: str) -> PromptRecord:
    messages = tuple(Message("user", (TextPart(brief),), answer="yes", improvise=True) for brief in briefs)
    return PromptRecord("p", "t", messages, user=Persona("an old sailor", "a table on Friday"))


THREE = booking("ask for a table for two on Friday", "ask for another day", "say goodbye")


def user_of(folder: Path, model: object, **options: Any) -> SimulatedUser:
    return SimulatedUser(
        UserServices(model, ClipStore(str(folder))),  # type: ignore[arg-type]
        **{"voices": VOICES, **PLAIN, **options},
    )


def player(folder: Path, user: object, *, reply: str = REPLY, **settings: Any) -> tuple[DialoguePlayer, FakeEngine]:
    family = FakeFamily()
    response = ChatTemplate(family.tokenizer, style=family.style).response("secret", reply)
    engine = FakeEngine(lambda request: response)
    made = DialoguePlayer(
        engine=engine,
        family=family,  # type: ignore[arg-type]
        clips=ClipStore(str(folder)),
        user=user,  # type: ignore[arg-type]
        settings=dataclasses.replace(DialogueSettings(), **settings),
    )
    return made, engine


async def played(folder: Path, model: object, *, spec: PlaySpec = SPEC, **options: Any) -> tuple[Dialogue, ...]:
    return await player(folder, user_of(folder, model, **options))[0].play_group(THREE, spec)


def spoken(dialogue: Dialogue) -> list[Any]:
    return [turn.spoken for turn in dialogue.turns]


LIVELY = {"hesitations": 0.3, "repairs": 1.0, "revisions": 1.0, "interruptions": 0.5}


async def test_the_same_seed_gives_the_same_dialogue_and_another_one_another(tmp_path: Path) -> None:
    first = await played(tmp_path / "a", Model(), **LIVELY)
    again = await played(tmp_path / "b", Model(), **LIVELY)
    other = await played(tmp_path / "a", Model(), spec=dataclasses.replace(SPEC, seed="run1"), **LIVELY)
    assert [spoken(dialogue) for dialogue in first] == [spoken(dialogue) for dialogue in again]
    for one, two in zip(first[0].turns, again[0].turns, strict=True):
        assert np.array_equal(one.prompt_ids, two.prompt_ids)
        assert one.clips == two.clips
    assert spoken(first[0]) != spoken(other[0])


async def test_siblings_meet_one_user_who_is_asked_once_per_history(tmp_path: Path) -> None:
    model = Model()
    one, two = await played(tmp_path, model, **LIVELY)
    assert spoken(one) == spoken(two)
    assert len(model.asked) == 3, "equal histories of two siblings were asked twice"
    assert len({seed for _, seed in model.asked}) == 3


async def test_evaluations_before_and_after_meet_the_same_user(tmp_path: Path) -> None:
    greedy = dataclasses.replace(SPEC.sampling, temperature=0.0)
    before, after = [
        await played(tmp_path, Model(), spec=dataclasses.replace(SPEC, sampling=greedy, seed=name), **LIVELY)
        for name in ("heldout-before", "heldout-after")
    ]
    assert spoken(before[0]) == spoken(after[0])


async def test_sounds_are_in_the_store_by_content_and_rows_say_what_was_said(tmp_path: Path) -> None:
    dialogues = await played(tmp_path, Model(), **LIVELY)
    store = ClipStore(str(tmp_path))
    for turn in dialogues[0].turns:
        assert turn.spoken is not None
        assert turn.clips[-1].sha256 == turn.spoken.sha256
        assert np.abs(store.get(turn.spoken.sha256).samples - ToneVoice().speak(turn.spoken.text)).max() < 1e-4
    read = read_dialogues(played_batch(THREE, dialogues))
    assert [spoken(dialogue) for dialogue in read] == [spoken(dialogue) for dialogue in dialogues]


async def test_the_model_knows_persona_goal_brief_and_what_was_said(tmp_path: Path) -> None:
    model = Model()
    await played(tmp_path, model)
    messages, _ = model.asked[-1]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert "an old sailor" in messages[0]["content"] and "a table on Friday" in messages[0]["content"]
    assert messages[2]["content"] == "please ask for a table for two on Friday"
    assert messages[3]["content"] == REPLY
    assert messages[-1]["content"] == f"{REPLY}\n[Now: say goodbye]"
    assert not any("secret" in message["content"] for message in messages), "users do not hear reasoning"


async def test_a_broken_off_reply_ends_at_a_word_for_policy_user_and_judge_and_is_trained_whole(tmp_path: Path) -> None:
    model = Model()
    dialogue, _ = await played(tmp_path, model, **{**PLAIN, "interruptions": 1.0})
    first, second, _ = dialogue.turns
    assert first.spoken is not None and first.spoken.heard is None, "there was nothing to break into"
    assert second.spoken is not None and second.spoken.heard
    heard = second.spoken.heard
    words = REPLY.split()
    assert heard.split() == words[: len(heard.split())]
    assert len(heard.split()) < len(words)
    assert first.reply == REPLY and len(first.response_ids) > len(words)
    assert model.asked[1][0][-1]["content"] == f"{heard} [You break in here.]\n[Now: ask for another day]"
    lost = len(words) - len(heard.split())
    whole, _ = await played(tmp_path, Model())
    assert len(whole.turns[1].prompt_ids) - len(second.prompt_ids) == lost
    history = [(one.role, one.text) for one in said_before(THREE, dialogue, turn=1)]
    assert history[:2] == [("user", first.spoken.text), ("assistant", heard)]
    assert heard_replies(dialogue.turns)[0] == heard


@pytest.mark.parametrize("keep_thinking", [False, True])
def test_a_reply_is_cut_in_ids_and_never_inside_a_word(keep_thinking: bool) -> None:
    tokenizer = SpellingTokenizer(runs=["</", "think", ">\n", "><", "\n\n", " red", "d an"])
    family = FakeFamily(tokenizer=tokenizer)
    template = ChatTemplate(tokenizer, style=family.style)

    def history(heard: str | None) -> tuple[str, str]:
        context = Context(template, keep_thinking=keep_thinking)
        context.open("user")
        context.close()
        context.add_response(template.response("hm", "a bed and a red ship"))
        left = "" if heard is None else context.break_in(heard)
        context.open("user")
        return left, tokenizer.decode(context.prompt().ids.tolist())

    _, whole = history(None)
    left, cut = history("a bed and a red")
    assert left == "a bed and a red"
    assert cut == whole.replace("a bed and a red ship", "a bed and a red")
    # "d an" is one id: the word "bed" has no end of its own in ids, so it goes as well.
    left, cut = history("a bed")
    assert left == "a"
    assert cut == whole.replace("a bed and a red ship", "a")


@given(
    st.lists(st.sampled_from(["a", "Friday,", "two", "I'd", "like", "tables", "um", "left."]), min_size=1), st.text()
)
def test_every_word_is_said_in_its_order_and_the_last_word_on_a_matter_is_its_own(words: list[str], seed: str) -> None:
    text = disfluent(" ".join(words), Disfluency(0.3, 1.0, 1.0), seed=seed)
    rest = iter(text.split())
    assert all(word in rest for word in words), text
    assert text.split()[-1] == words[-1]
    assert text == disfluent(" ".join(words), Disfluency(0.3, 1.0, 1.0), seed=seed)
    assert disfluent(" ".join(words), Disfluency(0.0, 0.0, 0.0), seed=seed) == " ".join(words)


def test_each_kind_is_heard() -> None:
    text = "a table for two on Friday"
    revised = disfluent(text, Disfluency(0.0, 0.0, 1.0), seed="s")
    assert re.search(r"(for \w+, (no|I mean).* two)|(on \w+, (no|I mean).* Friday)", revised), revised
    repaired = disfluent(text, Disfluency(0.0, 1.0, 0.0), seed="s")
    assert count_words(repaired) > 6 and len(set(repaired.replace(",", "").split())) <= 7
    hesitant = disfluent(text, Disfluency(1.0, 0.0, 0.0), seed="s")
    assert count_words(hesitant) == 12


def test_words_and_sentences_are_counted_and_cut_whole() -> None:
    assert first_words("one two, three", 2) == "one two,"
    assert first_words("我想订桌", 2) == "我想"
    assert first_words("one", 9) == "one"
    assert sentences_within("Hi there. I want a table. Thanks.", 6) == "Hi there. I want a table."
    assert sentences_within("I want a table", 2) == "I want"


async def test_answers_lose_what_is_not_said_and_what_is_too_long(tmp_path: Path) -> None:
    raw = '<think>plan</think>User: "*sighs* I want (softly) a table. And then a very long story."'
    dialogue, _ = await played(tmp_path, Model(raw), max_words=5)
    assert dialogue.turns[0].spoken is not None and dialogue.turns[0].spoken.text == "I want a table."


@pytest.mark.parametrize(
    ("answer", "options", "told"),
    [
        ("...", {}, "turn 0: the user's model said '...'"),
        (EngineError("busy"), {}, "turn 0: the user's model gave no words: busy"),
        ("hi hi", {"max_sound_s": 0.1}, "turn 0: the user's 'hi hi' cannot be spoken: it lasts 0.2 s"),
        ("boo", {"voices": [f"{VOICES[0]} {{failing: boo}}"]}, "turn 0: .*the voice is hoarse"),
    ],
)
async def test_what_cannot_be_said_is_a_rollout_error_that_names_record_and_turn(
    tmp_path: Path, answer: str | Exception, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(RolloutError, match=f"record 'p', {told}"):
        await played(tmp_path, Model(answer), **options)


async def test_a_user_who_says_nothing_is_a_timeout_that_names_the_turn(tmp_path: Path) -> None:
    async def silent(number: int, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError("it was not cancelled")

    async with ScriptedEndpoint(silent).running() as server:
        mute = user_of(tmp_path, server.client(timeout_s=30.0))
        with pytest.raises(
            TurnTimeoutError, match="record 'p', sibling 0, turn 0: the user said nothing within 0.05 s"
        ):
            await player(tmp_path, mute, seconds_per_turn=0.05)[0].play_group(THREE, SPEC)


async def test_an_endpoint_is_asked_over_http_with_a_seed(tmp_path: Path) -> None:
    async def polite(number: int, body: dict[str, Any], request: web.Request) -> web.StreamResponse:
        return said(f"turn with {len(body['messages'])} messages")

    async with ScriptedEndpoint(polite).running() as server:
        made, _ = player(tmp_path, user_of(tmp_path, server.client()))
        dialogue, _ = await made.play_group(THREE, SPEC)
        assert [turn.spoken and turn.spoken.text for turn in dialogue.turns] == [
            f"turn with {2 * number + 2} messages" for number in range(3)
        ]
        assert all(0 <= body["seed"] < 2**31 for body in server.bodies)


async def test_an_engine_of_ours_answers_messages_without_its_reasoning() -> None:
    family = FakeFamily()
    template = ChatTemplate(family.tokenizer, style=family.style)
    engine = FakeEngine(lambda request: template.response("hm", "a table please"))
    model = ServedText(engine, family, max_model_len=64)  # type: ignore[arg-type]
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
    answer = await model.complete(asked, max_new_tokens=8, temperature=0.7, seed=3)
    assert answer.text == "a table please"
    request = engine.requests[0]
    assert request.sampling.seed == 3 and request.sampling.stop_token_ids == IDS.stop
    assert "be brief" in family.tokenizer.decode(request.prompt_ids.tolist())
    with pytest.raises(RolloutError, match="window of 64"):
        await model.complete(asked, max_new_tokens=64, temperature=0.7, seed=3)
    babbling = ServedText(FakeEngine(lambda request: [9, 10]), family)  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match="did not end within 8 ids"):
        await babbling.complete(asked, max_new_tokens=8, temperature=0.0, seed=None)


async def test_siblings_who_were_told_different_things_are_not_compared(tmp_path: Path) -> None:
    one, two = await played(tmp_path, Model())
    assert SiblingReferences().has(THREE, (one, two), 1)
    other = dataclasses.replace(one.turns[1], spoken=dataclasses.replace(one.turns[1].spoken, text="else"))  # type: ignore[type-var]
    changed = dataclasses.replace(two, turns=(two.turns[0], other, two.turns[2]))
    assert not SiblingReferences().has(THREE, (one, changed), 1)
    assert SiblingReferences().has(THREE, (one, changed), 2)


async def test_a_record_as_it_was_said_keeps_its_checks_and_a_scripted_user_refuses_it(tmp_path: Path) -> None:
    dialogue, _ = await played(tmp_path, Model())
    record = as_said(THREE, dialogue.turns[:1])
    assert [message.improvise for message in record.messages] == [False, True, True]
    assert record.messages[0].answer == "yes" and record.messages[0].text == "please ask for a table for two on Friday"
    with pytest.raises(DataError, match="record 'p', turn 0: .*dialogue.user"):
        await ScriptedUser().move(THREE, [], seed="")


def test_options_that_cannot_be_meant_are_named_before_a_run() -> None:
    settings = DialogueSettings(
        user_model=JudgeModelSettings(endpoint=EndpointSettings(url="http://host/v1", model="m"))
    )
    check = SimulatedUser.setting_problems
    assert not list(check({"voices": VOICES}, settings))
    assert "needs a model" in next(check({"voices": VOICES}, DialogueSettings()))
    for options, named in (
        ({"hesitations": 2}, "hesitations is 2"),
        ({"interruptions": -0.1}, "interruptions is -0.1"),
        ({"max_words": 0}, "max_words is 0"),
        ({"voices": []}, "voices is"),
        ({"voices": ["nobody.home:Voice"]}, "nobody"),
        ({"instructions": "you are {nobody}"}, "instructions"),
    ):
        (told,) = check({"voices": VOICES, **options}, settings)
        assert named in told
    with pytest.raises(ConfigError, match="no model"):
        SimulatedUser(UserServices(), voices=VOICES)


def line(**changes: Any) -> dict[str, Any]:
    message = {"role": "user", "content": [{"text": "ask for a table"}], "improvise": True}
    return {"id": "p", "task": "t", "user": {"persona": "a", "goal": "b"}, "messages": [{**message, **changes}]}


def test_records_of_simulated_users_read_back_and_bad_ones_are_told() -> None:
    read = parse_record(line(), complete=False)
    assert isinstance(read, PromptRecord)
    assert record_to_json(read) == line()
    sound = {"audio": "clips/aa/a.wav", "sha256": "a" * 64, "sample_rate": 16_000}
    for bad, field in (
        (line(content=[sound]), "messages[0].content"),
        (line(reference_response="ok"), "messages[0].reference_response"),
        (line(improvise=False), "user"),
        ({**line(), "user": None}, "user"),
        ({**line(), "user": {"persona": "a"}}, "user.goal"),
        ({**line(), "user": {"persona": "a", "goal": "b", "mood": "c"}}, "user.mood"),
        ({**line(), "messages": [*line()["messages"], {"role": "assistant", "content": [{"text": "no"}]}]}, None),
    ):
        problems = parse_record(bad, complete=None)
        assert isinstance(problems, list), bad
        assert field is None or field in [problem.field for problem in problems], problems
