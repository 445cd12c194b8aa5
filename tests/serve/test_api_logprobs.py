"""What a service tells of its tokens in words, as the student's ids: cases, and whole requests."""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from raystill.base.errors import RunError
from raystill.datasets.rows.answers import Answer, answers_table, derive_answers
from raystill.datasets.rows.signal import Signal
from raystill.datasets.rows.token_bytes import NoBytes
from raystill.model.identity import identity_of_teacher
from raystill.model.sampling import ResolvedSampling
from raystill.model.tokenizer import PlainText
from raystill.serve.api import failures
from raystill.serve.api.engine import ApiEngine
from raystill.serve.api.parsed import Drawn, chat_completion, content_of
from raystill.serve.api.service import UNREADABLE
from raystill.serve.api.told import OTHER_TOKENS, Reader, Told
from raystill.serve.api.vocabulary import Vocabulary
from raystill.serve.batch.engine import BatchEngine
from raystill.serve.batch.journal import Line
from tests.support.end_to_end import TEACHER
from tests.support.json_service import completion_of
from tests.support.scripted_service import (
    SAMPLING,
    STOP,
    Asked,
    Service,
    scripted_service,
    teacher_of,
)
from tests.support.told_slowly import best_and_tail, distribution
from tests.support.vllm_like import tokenizer

CONTROL = frozenset(range(17))
K = 3
TOPK = Signal("topk", K)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with scripted_service(monkeypatch) as server:
        yield server


@cache
def reader() -> Reader:
    """Of the tiny teacher's tokenizer, which is byte-level."""
    found = tokenizer()
    return Reader(Vocabulary(found, CONTROL), PlainText(found, CONTROL), (STOP,))


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def one(token: str, p: float, raw: bytes | None = b"?", **tops: float) -> dict[str, Any]:
    """An entry of ``content``: the drawn token with its probability, and others named beside it."""
    meant = token.encode() if raw == b"?" else raw
    named = [
        {"token": t, "bytes": list(t.encode()), "logprob": math.log(q)} for t, q in tops.items()
    ]
    told = {"token": token, "bytes": None if meant is None else list(meant)}
    told["logprob"] = math.log(p) if p > 0 else -9999.0
    return {**told, "top_logprobs": [dict(told), *named]}


def told_of(content: list[dict[str, Any]]) -> list[Drawn]:
    return content_of({"logprobs": {"content": content}})


def read(content: list[dict[str, Any]], text: str, complete: bool = False) -> Told:
    found = reader().read(told_of(content), text, complete, TOPK)
    assert isinstance(found, Told), found
    return found


def probabilities(told: Told, t: int) -> dict[int, float]:
    """Of the K ids and, under -1, of the tail."""
    answer = told.answer
    assert answer.topk_ids is not None and answer.topk_logprobs is not None
    assert answer.tail_logprob is not None
    assert len(set(answer.topk_ids[t].tolist())) == K
    pairs = zip(answer.topk_ids[t].tolist(), answer.topk_logprobs[t].tolist(), strict=True)
    found = {i: math.exp(p) for i, p in pairs if p > -math.inf}
    return found | {-1: math.exp(float(answer.tail_logprob[t]))}


def single(text: str) -> int:
    (index,) = ids_of(text)
    return index


RED, BLUE, GREEN = "Red", "Blue", "Green"
MAPPED = {
    "three of three": (one(RED, 0.5, Blue=0.3, Green=0.1), {RED: 0.5, BLUE: 0.3, GREEN: 0.1}, 0.1),
    "the best of four": (
        one(RED, 0.5, Blue=0.3, Green=0.1, Yes=0.02),
        {RED: 0.5, BLUE: 0.3, GREEN: 0.1},
        0.1,
    ),
    "the drawn one is not among the best": (
        {**one(RED, 0.01), "top_logprobs": one(BLUE, 0.6, Green=0.2, Yes=0.1)["top_logprobs"]},
        {BLUE: 0.6, GREEN: 0.2, "Yes": 0.1},
        0.1,
    ),
    "bytes are not told": (one(RED, 0.5, None, Blue=0.3), {RED: 0.5, BLUE: 0.3}, 0.2),
    "too few are told": (one(RED, 0.9), {RED: 0.9}, 0.1),
    "a part of a character": (
        one(RED, 0.5, **{"\ufffd": 0.3, "Blue": 0.1}),
        {RED: 0.5, BLUE: 0.1},
        0.4,
    ),
    "no id of this tokenizer": (one(RED, 0.5, Bluegreenish=0.4), {RED: 0.5}, 0.5),
    "no text": (one(RED, 0.5, **{"": 0.4}), {RED: 0.5}, 0.5),
    "the end": (one(RED, 0.5, **{"<|im_end|>": 0.4}), {RED: 0.5, "<|im_end|>": 0.4}, 0.1),
}


@pytest.mark.parametrize("name", MAPPED)
def test_named_tokens_are_ids_and_all_other_mass_is_in_the_tail(name: str) -> None:
    content, expected, tail = MAPPED[name]
    told = read([content], RED)
    assert told.answer.response_ids.tolist() == [single(RED)]
    found = probabilities(told, 0)
    assert found == pytest.approx(
        {single(t): p for t, p in expected.items()} | {-1: tail}, abs=1e-6
    )
    named = {one["token"]: math.exp(one["logprob"]) for one in content["top_logprobs"]}
    lost = sum(
        p for token, p in named.items() if reader()._vocabulary.id_of(token.encode()) is None
    )
    assert told.unmapped == pytest.approx(lost, abs=1e-6)


def test_two_tokens_with_the_same_bytes_are_neither(tmp_path: Path) -> None:
    content = one(RED, 0.5)
    twice = {"token": BLUE, "bytes": list(BLUE.encode())}
    content["top_logprobs"] += [{**twice, "logprob": math.log(p)} for p in (0.2, 0.1)]
    told = read([content], RED)
    assert probabilities(told, 0) == pytest.approx({single(RED): 0.5, -1: 0.5}, abs=1e-6)
    assert told.unmapped == pytest.approx(0.3)


def test_places_without_a_token_are_of_no_word_and_no_end() -> None:
    told = read([one(RED, 0.9)], RED)
    assert told.answer.topk_ids is not None
    (fillers,) = told.answer.topk_ids[:, 1:].tolist()
    assert set(fillers) <= CONTROL - {STOP}
    empty = one(RED, 0.5, **{"<|im_start|>": 0.2})
    assert len(set(read([empty], RED).answer.topk_ids[0].tolist())) == K  # type: ignore[index]


def test_the_whole_mass_is_kept_where_the_tail_is_bounded() -> None:
    """Of the best id of many: log(1 - p) has no digits left, and the bound is what was named."""
    told = read([one(RED, 1 - 1e-9, Blue=1e-10, Green=1e-11, Yes=1e-12)], RED)
    assert probabilities(told, 0)[-1] <= 1e-12 * (1 + 49152)
    told = read([one(RED, 0.6, **{"\ufffd": 0.4 - 1e-9, "Blue": 1e-12, "Green": 1e-12})], RED)
    assert probabilities(told, 0)[-1] == pytest.approx(0.4, abs=1e-6), "more than V times the least"


ENDS = {
    "told": ([one(RED, 0.5), one("<|im_end|>", 0.8, Blue=0.2)], True, {STOP: 0.8, "Blue": 0.2}),
    "told as nothing": ([one(RED, 0.5), one("", 0.8, Blue=0.2)], True, {STOP: 0.8, "Blue": 0.2}),
    "not told": ([one(RED, 0.5)], True, {STOP: 1.0}),
    "cut": ([one(RED, 0.5)], False, None),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_that_is_complete_ends_with_the_stop_token(name: str) -> None:
    content, complete, expected = ENDS[name]
    told = read(content, RED, complete)
    ids = told.answer.response_ids.tolist()
    assert ids == [single(RED), *([STOP] if complete else [])]
    assert told.answer.finish_reason == ("stop" if complete else "length")
    if expected is not None:
        wanted = {i if isinstance(i, int) else single(i): p for i, p in expected.items()}
        found = probabilities(told, 1)
        assert found.pop(-1) == pytest.approx(1 - sum(wanted.values()), abs=1e-6)
        assert found == pytest.approx(wanted, abs=1e-6)
        assert told.answer.sampled_logprobs is not None
        assert math.exp(told.answer.sampled_logprobs[1]) == pytest.approx(wanted[STOP])


def in_tokens(text: str, raw: bool = True) -> list[dict[str, Any]]:
    """The entries of a service with this tokenizer. raw: it tells the bytes of parts."""
    found = []
    for index in ids_of(text):
        meant = reader()._vocabulary.bytes_of(index)
        token = meant.decode(errors="replace")
        found.append(one(token, 0.9, meant if raw else token.encode()))
    return found


@pytest.mark.parametrize("raw", [True, False], ids=["bytes are told", "bytes of the text"])
@pytest.mark.parametrize("text", ["Hello 🙂 漢字!", "é\n\n  x", "a\ufffdb", " 🏴\u200d☠️"])
def test_parts_of_characters_are_the_tokenizers_own(text: str, raw: bool) -> None:
    told = read(in_tokens(text, raw), text)
    assert told.answer.response_ids.tolist() == ids_of(text)
    assert tokenizer().decode(told.answer.response_ids.tolist(), skip_special_tokens=False) == text


def as_vllm_says(texts: list[str], tops: dict[str, float]) -> list[dict[str, Any]]:
    """Entries with ``tops`` beside the last: no text for a part of a character, and the whole
    character for the token that ends it.
    """
    found = [one(text, 0.5) for text in texts]
    return [*found[:-1], one(texts[-1], 0.5, **tops)]


def test_the_end_of_a_character_is_not_the_token_of_the_whole_character() -> None:
    """Of U+2030 two tokens: the first is that of U+2019 too, which is also one token by itself."""
    first, last = ids_of("\u2030")
    other = single("\u2019")
    told = read(as_vllm_says(["", "\u2030"], {"\u2019": 0.3, "Red": 0.1}), "\u2030")
    assert told.answer.response_ids.tolist() == [first, last]
    found = probabilities(told, 1)
    assert other not in found
    assert found == pytest.approx({last: 0.5, single(RED): 0.1, -1: 0.4}, abs=1e-6)
    assert told.unmapped == pytest.approx(0.3 / 2)
    at_a_beginning = read(as_vllm_says(["Red"], {"\u2019": 0.3}), RED)
    assert probabilities(at_a_beginning, 0)[other] == pytest.approx(0.3)


LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind it in the least."


def split(content: list[dict[str, Any]], times: int) -> list[dict[str, Any]]:
    """The same text, with the first so many tokens that can be in two tokens of the vocabulary."""
    found, known = [], reader()._vocabulary.id_of
    for entry in content:
        token = entry["token"]
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in cuts if all(known(part.encode()) is not None for part in pair)]
        found += [one(part, 0.9) for part in pairs[0]] if pairs and times > 0 else [entry]
        times -= bool(pairs)
    return found


REFUSED = {
    "a control token": ([one("<|im_start|>", 0.9), *in_tokens(" Red")], "<|im_start|> Red"),
    "an end in the middle": ([one("<|im_end|>", 0.9), *in_tokens(" Red")], " Red"),
    "another text": (in_tokens("Red"), "Blue"),
    "more text": (in_tokens("Red"), "Red Blue"),
    "a token that is no id": ([one("Bluegreenish", 0.9)], "Bluegreenish"),
    "letters": ([one(letter, 0.9) for letter in "Hello"], "Hello"),
    "parts of characters of another tokenizer": (
        [one("H", 0.9), *[one("\ufffd", 0.9) for _ in range(3)]],
        "H🙂",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_in_other_tokens_is_not_used(name: str) -> None:
    content, text = REFUSED[name]
    assert reader().read(told_of(content), text, False, TOPK) == "other_tokens"
    assert reader().read(told_of(content), text, True, TOPK) == "other_tokens"


def test_a_token_that_is_cut_elsewhere_now_and_then_is_what_was_drawn() -> None:
    told = read(split(in_tokens(LONG), 2), LONG)
    assert told.answer.response_ids.tolist() != ids_of(LONG)
    assert tokenizer().decode(told.answer.response_ids.tolist()) == LONG
    assert reader().read(told_of(split(in_tokens(LONG), 3)), LONG, False, TOPK) == "other_tokens"


BROKEN = {
    "not a number": {"logprob": math.nan},
    "above 0": {"logprob": 0.5},
    "a text": {"logprob": "much"},
    "nothing": {"logprob": None},
    "no token": {"token": None, "bytes": None},
    "a lone surrogate": {"token": "\ud800", "bytes": None},
    "bytes beyond a byte": {"bytes": [300]},
    "bytes that are none": {"bytes": ["a"]},
    "a number in place of bytes": {"bytes": 10**12},
    "a number beyond all": {"logprob": -(10**400)},
    "more than all": {
        "top_logprobs": [{"token": t, "bytes": None, "logprob": -0.1} for t in ("Blue", "Green")]
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_distribution_is_asked_again(name: str) -> None:
    with pytest.raises(UNREADABLE):
        reader().read(told_of([one(RED, 0.9) | BROKEN[name]]), RED, False, TOPK)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=20),
    st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_what_is_told_is_a_partition_of_the_teachers_distribution(
    weights: list[float], mapped: list[bool]
) -> None:
    words = [" red", " blue", " green", " one", " two", " three", " four", " five", " six", " ten"]
    words += [" day", " night", " sun", " moon", " sea", " land", " dog", " cat", " man", " tree"]
    p = np.array(weights) / (sum(weights) * 1.1)
    names = [w if m else f"{w}no-such-token" for w, m in zip(words, mapped, strict=True)]
    named = {name: float(q) for name, q in zip(names, p, strict=False)}
    drawn = one(RED, 0.01)
    content = {**drawn, "top_logprobs": one("", 0.0, **named)["top_logprobs"][1:]}
    found = probabilities(read([content], RED), 0)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)
    truth = {single(n): q for n, q in named.items() if n in words} | {single(RED): 0.01}
    best = sorted(truth.values(), reverse=True)[:K]
    assert sorted((q for i, q in found.items() if i >= 0), reverse=True) == pytest.approx(best)
    assert all(truth[i] == pytest.approx(q) for i, q in found.items() if i >= 0)


NAMES = [" red", " blue", " dog", "no-such-token", "\ufffd", "", "\u2019", "\u2030", "<|im_end|>"]
LOGPROBS = [-0.7, -1.5, -1.5, -3.0, -9999.0, -20.0, 0]
ANY_NAMED = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(LOGPROBS)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([" red", " sun", "\u2030"]), st.booleans(), ANY_NAMED),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 6),
)
def test_all_tokens_at_once_are_what_each_is_by_itself(
    drawn: list[tuple[str, bool, list[tuple[str, float]]]], k: int
) -> None:
    content: list[dict[str, Any]] = []
    for word, again, named in drawn:
        parts = ["", word] if word == "\u2030" else [word]  # As vLLM names its two tokens.
        for token in parts:
            own = {"token": token, "logprob": -1.0}
            tops = [{"token": name, "logprob": p} for name, p in named]
            content.append({**own, "top_logprobs": [*tops, own] if again else tops})
    text = "".join(word for word, _, _ in drawn)
    sums = [
        math.exp(-1) + sum(math.exp(p) for p in numbers)
        for numbers in (
            [
                one["logprob"]
                for one in e["top_logprobs"]
                if (one["token"], one["logprob"]) != (e["token"], -1.0)
            ]
            for e in content
        )
    ]
    if max(sums) > 1:
        with pytest.raises(ValueError, match=r"sum to \d"):
            reader().read(told_of(content), text, False, Signal("topk", k))
        return
    told = reader().read(told_of(content), text, False, Signal("topk", k))
    assert isinstance(told, Told)
    answer, vocabulary = told.answer, reader()._vocabulary
    ids = answer.response_ids.tolist()
    inside = reader()._inside_characters(ids)
    unmapped = 0.0
    for t, entry in enumerate(content):
        found, lost, least = distribution(vocabulary, ids[t], entry, inside[t])
        best, tail = best_and_tail(vocabulary, found, lost, least, k)
        unmapped += sum(map(math.exp, lost))
        pairs = zip(answer.topk_ids[t].tolist(), answer.topk_logprobs[t].tolist(), strict=True)
        shown = dict(pairs)
        assert len(shown) == k and list(shown.values()) == sorted(shown.values(), reverse=True)
        likely = {i: math.exp(p) for i, p in shown.items() if math.exp(p) > 0}
        assert likely == pytest.approx({i: p for i, p in best.items() if p > 0}, rel=1e-6)
        assert math.exp(answer.tail_logprob[t]) == pytest.approx(tail, abs=1e-6)
    assert told.unmapped == pytest.approx(unmapped / len(content))


SHAPES = {
    "as expected": (b'{"choices": [{"logprobs": {"content": [%s]}}], "usage": {"n": 1}}', 1),
    "numbers as texts": (
        b'{"choices": [{"logprobs": {"content": [%s]}}]}'.replace(b"%s", b"%t"),
        1,
    ),
    "nothing": (b'{"choices": [{"logprobs": null}]}', 0),
    "left out": (b'{"choices": [{}]}', 0),
    "half a pair beside it": (
        b'{"choices": [{"message": {"content": "\\ud800"}, "logprobs": {"content": [%s]}}]}',
        1,
    ),
    "nothing in it": (b'{"choices": [{"logprobs": {"content": null}}]}', 0),
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_answer_is_read_in_whatever_way_it_can_be(name: str) -> None:
    raw, number = SHAPES[name]
    entry = b'{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [], "more": 1}'
    data = raw.replace(b"%s", entry).replace(b"%t", entry.replace(b"-0.5", b'"-0.5"'))
    content = content_of(chat_completion(data)["choices"][0])
    assert [(one.token, one.logprob, one.bytes) for one in content] == [("a", -0.5, [97])] * number


def pieces(vocabulary: list[str], decoder: Any, added: tuple[str, ...] = ()) -> Tokenizer:
    table = {piece: index for index, piece in enumerate(vocabulary)}
    built = Tokenizer(models.BPE(vocab=table, merges=[], unk_token=None))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoder
    built.add_tokens([AddedToken(text) for text in added])
    return built


def test_an_id_is_meant_only_where_no_other_has_its_bytes() -> None:
    built = pieces(["a", "ab", "Ġab", "ï¿½", "é"], decoders.ByteLevel(), ("<end>", " ab"))
    found = Vocabulary(built, {5})
    assert [found.id_of(meant) for meant in (b"a", b"ab", b"<end>")] == [0, 1, 5]
    assert found.id_of(b" ab") is None, "a piece and an added token"
    assert found.id_of("\ufffd".encode()) is None, "any part of a character"
    assert found.id_of(b"\xe9") == 4 and found.id_of("é".encode()) is None, "a byte, no character"
    assert found.id_of(b"") is None and found.id_of(b"zz") is None


def test_pieces_of_sentencepiece_are_read_and_others_refused() -> None:
    """In these vocabularies a byte has a piece of its own, which is also written as a character."""
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    for decoder in (decoders.Sequence(parts), decoders.Metaspace()):
        words = ["<0x0A>", "\u2581the", "the", "\u2581", "\n"]
        found = Vocabulary(pieces(words, decoder, ("</s>",)), {5})
        assert [found.id_of(meant) for meant in (b" the", b"the", b" ")] == [1, 2, 3]
        both = None if isinstance(decoder, decoders.Sequence) else 4
        assert found.id_of(b"\n") == both
    for decoder in (decoders.WordPiece(), None):
        with pytest.raises(NoBytes):
            Vocabulary(pieces(["a", "##b"], decoder), ())


def test_a_narrower_signal_keeps_what_the_wider_one_could_not_name() -> None:
    told = read([one(RED, 0.6, **{"\ufffd": 0.39, "Blue": 1e-9})], RED)
    table = answers_table([told.answer], TOPK)
    narrow = derive_answers(table, TOPK, Signal("topk", 2), 49152)
    (tail,) = narrow["tail_logprob"].to_pylist()[0]
    assert math.exp(tail) == pytest.approx(0.4, abs=1e-6)


WIDE = {"top_logprobs": 20}


def logprobs(*content: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": {"content": list(content), "refusal": None}}


def asked(folder: Path, service: Service, **more: Any) -> Asked:
    """One question, whose start is sampled as it is, so that a service is probed once."""
    found = Asked(folder, service, ["q"], **{**WIDE, **more})
    found.engine._sampling = replace(SAMPLING, temperature=1.0, top_p=1.0)  # type: ignore[union-attr]
    service.scripts["Say a word."] = [{"text": RED, **logprobs(one(RED, 0.9, Blue=0.05))}]
    return found


def sample(found: Asked, signal: Signal = TOPK) -> Any:
    async def run() -> Any:
        await found.engine.start()
        return await found.engine.sample(found.prompts, signal)

    return asyncio.run(run())[0]


def test_a_service_is_asked_for_logprobs_and_its_answer_has_them(
    tmp_path: Path, service: Service
) -> None:
    found = asked(tmp_path, service)
    content = logprobs(one(RED, 0.5, Blue=0.3, Green=0.1, **{"\ufffd": 0.04}), one("<|im_end|>", 1))
    service.scripts["q"] = [{"text": RED, **content}]
    answer = sample(found)
    assert answer.error is None and answer.response_ids.tolist() == [single(RED), STOP]
    assert probabilities(Told(answer, 0.0), 0)[-1] == pytest.approx(0.1, abs=1e-6)
    assert [(b["logprobs"], b["top_logprobs"]) for b in service.bodies] == [(True, 20)] * 2
    assert found.counters["api_told_tokens"] == 2
    assert found.counters["api_unmapped_mass"] == pytest.approx(0.04)
    answer = sample(found, Signal("sampled"))
    assert np.exp(answer.sampled_logprobs) == pytest.approx([0.5, 1.0])


DROPPED = {
    "no logprobs": ({}, "no_logprobs"),
    "other tokens": (logprobs(*[one(letter, 0.9) for letter in RED]), "other_tokens"),
    "too much that is no id": (logprobs(one(RED, 0.5, **{"\ufffd": 0.3})), "unmapped_tokens"),
    "no distribution": (logprobs(one(RED, 0.9, Blue=0.9)), "broken_answer"),
    "no content": ({"logprobs": {"content": None}}, "no_logprobs"),
    "of another shape": ({"logprobs": [1, 2]}, "broken_answer"),
    "null entries": ({"logprobs": {"content": [None]}}, "broken_answer"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_an_answer_whose_signal_cannot_be_used_is_dropped_and_named(
    tmp_path: Path, service: Service, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, reason = DROPPED[name]
    monkeypatch.setattr(failures, "pause_s", lambda attempt: 0.0)
    service.scripts["q"] = [{"text": RED, "finish": "length", **reply}]
    found = asked(tmp_path, service)
    assert sample(found).error == reason
    assert found.counters[f"api_{reason}"] > 0
    if name == "too much that is no id":
        milder = asked(tmp_path / "milder", service, max_unmapped_mass=0.5)
        assert sample(milder).error is None


def test_a_service_that_tells_no_logprobs_is_refused_before_the_first_row(
    tmp_path: Path, service: Service
) -> None:
    found = asked(tmp_path, service)
    service.scripts["Say a word."] = [{"text": RED}]
    with pytest.raises(RunError, match="tells no log probabilities"):
        sample(found)
    assert service.asked["q"] == 0


def test_logprobs_that_change_with_the_sampling_are_refused(
    tmp_path: Path, service: Service
) -> None:
    found = asked(tmp_path, service)
    plain, warm = (logprobs(one(RED, p, Blue=0.9 - p)) for p in (0.6, 0.7))
    service.scripts["Say a word."] = [{"text": RED, **plain}, {"text": RED, **warm}]
    found.engine._sampling = SAMPLING  # type: ignore[union-attr]
    with pytest.raises(RunError, match=r"change with teacher\.sampling, by 0\.41 nats"):
        sample(found)
    service.asked.clear()
    service.scripts["Say a word."] = [{"text": RED, **plain}]
    service.scripts["q"] = [{"text": RED, **plain}]
    assert sample(found).error is None
    assert service.asked["Say a word."] == 2


@pytest.mark.parametrize("name", ["", "\ufffd"])
def test_parts_of_characters_are_not_compared_between_two_answers(
    tmp_path: Path, service: Service, name: str
) -> None:
    found = asked(tmp_path, service)
    plain, warm = (logprobs(one(RED, 0.6, **{name: p})) for p in (0.3, 0.1))
    service.scripts["Say a word."] = [{"text": RED, **plain}, {"text": RED, **warm}]
    service.scripts["q"] = [{"text": RED, **logprobs(one(RED, 0.6))}]
    found.engine._sampling = SAMPLING  # type: ignore[union-attr]
    assert sample(found).error is None


def test_an_answer_of_before_cannot_be_given_another_signal(
    tmp_path: Path, service: Service
) -> None:
    found = asked(tmp_path, service)
    (answer,) = asyncio.run(found.engine.score(found.prompts, found.prompts, TOPK))
    assert answer.error is not None and answer.error.startswith("stop: ")
    assert "another store.path" in answer.error


def test_a_longer_answer_than_was_asked_for_is_cut_with_its_signal(
    tmp_path: Path, service: Service
) -> None:
    found = asked(tmp_path, service)
    found.engine._sampling = ResolvedSampling(  # type: ignore[union-attr]
        1.0, 1.0, 0, 0.0, max_tokens=2, stop_token_ids=(STOP,)
    )
    service.scripts["q"] = [{"text": "Red blue green", **logprobs(*in_tokens("Red blue green"))}]
    answer = sample(found)
    assert answer.response_ids.tolist() == ids_of("Red blue") and answer.finish_reason == "length"
    assert len(answers_table([answer], TOPK)) == 1, "all arrays are as long"


def test_keys_are_others_with_logprobs_and_as_before_without() -> None:
    text, told = teacher_of("http://127.0.0.1:9/v1"), teacher_of("http://127.0.0.1:9/v1", **WIDE)
    assert identity_of_teacher(text, TEACHER) != identity_of_teacher(told, TEACHER)
    fewer = teacher_of("http://127.0.0.1:9/v1", top_logprobs=5)
    assert identity_of_teacher(told, TEACHER) == identity_of_teacher(fewer, TEACHER)
    assert told.gives_text_only is False and told.scores is False and text.gives_text_only


REASONED = [one("<think>", 1), one(BLUE, 0.9), one("</think>", 1), one("\n\n", 1)]
ANSWERED = [one(RED, 0.5, Blue=0.3)]
ENDED = [one("<|im_end|>", 1)]


@pytest.mark.parametrize("before", [[], REASONED, [*REASONED, *ANSWERED]])
@pytest.mark.parametrize("end", [[], ENDED])
def test_tokens_of_reasoning_are_left_out_where_a_service_tells_them_too(
    tmp_path: Path, service: Service, before: list[Any], end: list[Any]
) -> None:
    content = {"logprobs": {"content": [*before, *ANSWERED, *end]}}
    asked = Asked(tmp_path, service, ["q"], **WIDE)
    assert isinstance(asked.engine, ApiEngine)
    message = {"role": "assistant", "content": RED, "reasoning_content": BLUE}
    completion = {"choices": [{"finish_reason": "stop", "message": message, **content}]}
    answer = asked.engine._read(completion, TOPK, np.array([7], np.int32))
    assert isinstance(answer, Answer), answer
    assert answer.response_ids.tolist() == [single(RED), STOP]
    assert probabilities(Told(answer, 0.0), 0)[single(BLUE)] == pytest.approx(0.3, abs=1e-6)
    message.pop("reasoning_content")
    if before:
        assert asked.engine._read(completion, TOPK, np.array([7], np.int32)) == OTHER_TOKENS


def test_a_line_of_a_batch_is_read_like_an_answer(tmp_path: Path, service: Service) -> None:
    found = Asked(tmp_path, service, ["q"], batch={}, **WIDE)
    assert isinstance(found.engine, BatchEngine)
    content = logprobs(one(RED, 0.5, Blue=0.3), one("<|im_end|>", 1))
    line = Line(200, completion_of(RED, **content))
    answer = found.engine._of_line(line, TOPK)
    assert not isinstance(answer, str)
    assert probabilities(Told(answer, 0.0), 0)[single(BLUE)] == pytest.approx(0.3, abs=1e-6)
