"""What a service sends is read to a bound, however it is sent, and no further."""

import asyncio
import gzip
import itertools
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raystill.serve.api.parsed import LEAST_BYTES
from raystill.serve.api.service import MAX_UNUSABLE, Request
from tests.support.json_service import in_flight
from tests.support.scripted_service import SAMPLING, TEXT, Asked, Service, scripted_service

MIB = 1 << 20
PRICES = {"input": 1e6, "output": 2e6}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with scripted_service(monkeypatch) as server:
        yield server


def zeros(mebibytes: int | None = None) -> Iterator[bytes]:
    """Gzip of zeros: a thousandth of its size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for _ in itertools.count() if mebibytes is None else range(mebibytes):
        yield packer.compress(bytes(MIB))
    yield packer.flush()


def empty_blocks() -> Iterator[bytes]:
    """Gzip that goes on and says nothing."""
    yield gzip.compress(b"")[:10]
    yield from itertools.repeat(b"\x00\x00\x00\xff\xff" * 50_000)


def empty_members() -> Iterator[bytes]:
    return itertools.repeat(gzip.compress(b"") * 10_000)


def spaces() -> Iterator[bytes]:
    return itertools.repeat(b" " * 65_536)


GZIP = {"Content-Encoding": "gzip"}
ENDLESS: dict[str, dict[str, Any]] = {
    "no length": {"parts": spaces, "headers": {}},
    "a long one": {"parts": spaces, "headers": {"Content-Length": str(10**12)}},
    "packed": {"parts": zeros, "headers": GZIP},
    "a bomb": {"parts": lambda: zeros(300), "headers": GZIP},
    "empty blocks": {"parts": empty_blocks, "headers": GZIP},
    "empty members": {"parts": empty_members, "headers": GZIP},
    "an error": {"parts": spaces, "headers": {}, "status": 500},
    "a refusal": {"parts": spaces, "headers": {}, "status": 400},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_answer_is_read_to_the_bound_and_the_others_go_on(
    tmp_path: Path, service: Service, name: str
) -> None:
    service.scripts["endless"] = [ENDLESS[name]]
    asked = Asked(tmp_path, service, ["endless", "q"], prices=PRICES, request_timeout_s=60.0)
    tracemalloc.start()
    endless, other = asked.sample()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert other.error is None and endless.error == "oversized_answer"
    assert asked.counters["api_oversized_answer"] == service.asked["endless"] == MAX_UNUSABLE
    assert peak < 3 * LEAST_BYTES
    assert max(service.poured) < LEAST_BYTES + in_flight()
    most = 2 * 1 + 2 * SAMPLING.max_tokens  # Two prompt tokens: it may be charged for.
    assert asked.counters["api_lost_cost"] == MAX_UNUSABLE * most


def test_an_answer_may_come_packed_in_several_members(tmp_path: Path, service: Service) -> None:
    service.scripts["q"] = [{}]
    (plain,) = Asked(tmp_path / "plain", service, ["q"]).sample()
    whole = (
        b'{"choices": [{"finish_reason": "stop", "message": {"content": "An answer to q"}}],'
        b'"usage": {"prompt_tokens": 10, "completion_tokens": 5}}'
    )
    packed = b"".join(gzip.compress(part) for part in (whole[:40], b"", whole[40:]))
    # Cut at each byte: a member's end may come with the next one's beginning.
    cut = [packed[i : i + 1] for i in range(len(packed))]
    service.scripts["q"] = [{"parts": lambda: iter(cut), "headers": GZIP}]
    (answer,) = Asked(tmp_path / "packed", service, ["q"]).sample()
    assert answer.error is None
    assert answer.response_ids.tolist() == plain.response_ids.tolist()
    assert service.encodings == {"gzip"}


BROKEN: dict[str, dict[str, Any]] = {
    "of another kind": {"raw": b"()", "headers": {"Content-Encoding": "br"}},
    "twice": {
        "raw": gzip.compress(gzip.compress(b"{}")),
        "headers": {"Content-Encoding": "gzip, gzip"},
    },
    "not at all": {"raw": b'{"choices": []}', "headers": GZIP},
    "without its end": {"raw": gzip.compress(b'{"choices": []}')[:-5], "headers": GZIP},
    "with more behind": {"raw": gzip.compress(b'{"choices": []}') + b"more", "headers": GZIP},
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_packed_otherwise_is_broken_and_asked_for_again(
    tmp_path: Path, service: Service, name: str
) -> None:
    service.scripts["q"] = [BROKEN[name], {}]
    asked = Asked(tmp_path, service, ["q"])
    (answer,) = asked.sample()
    assert answer.error is None and asked.counters["api_broken_answer"] == 1


def test_an_answer_always_packed_otherwise_ends_the_run_and_says_so(
    tmp_path: Path, service: Service
) -> None:
    service.scripts["q"] = [BROKEN["of another kind"]]
    (answer,) = Asked(tmp_path, service, ["q"]).sample()
    assert answer.error is not None and "encoded as 'br', not asked for" in answer.error


def test_the_bound_has_room_for_all_that_may_be_used() -> None:
    """Twenty names beside each of 4,096 tokens, each as long as most are; and the longest text."""

    def bound(**sizes: int) -> int:
        async def send(_: Any) -> None:
            return None

        request: Request[Any] = Request(send, lambda _: "", lambda _: 0, 100, 4096, **sizes)
        return request.most_bytes

    named = len('{"token":" word","logprob":-12.345678901234567,"bytes":[32,119,111,114,100]},')
    assert bound(named=21) > 4 * 4096 * 21 * named
    assert bound() > 4096 * 256 * 2


def test_proxies_of_the_environment_are_kept(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", service.url.removesuffix("/v1"))
    asked = Asked(tmp_path, service, ["q"])
    asked.engine.service._api = asked.engine.service._api.model_copy(
        update={"base_url": "http://service.invalid/v1"}
    )

    async def ask() -> Any:
        await asked.engine.start()
        return await asked.engine.sample(asked.prompts, TEXT)

    (answer,) = asyncio.run(ask())
    assert answer.error is None
