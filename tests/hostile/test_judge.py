"""The judge of the hostile cases: what it looks for in what a command told."""

import pytest

from tests.hostile.judge import PARTS, SECRET, Case, Told, faults, parts_of_secret

SPOILT = SECRET.replace("l", " ", 1)


@pytest.mark.parametrize("word", [SECRET, repr(SECRET), SECRET.replace('"', '\\"'), "x", ""])
def test_all_parts_of_a_secret_that_was_given_whole_are_looked_for(word: str) -> None:
    assert parts_of_secret(Case((word,), {"a": f"key: {word}\n".encode()})) == PARTS


def test_parts_that_were_given_in_a_spoilt_secret_are_not() -> None:
    looked_for = parts_of_secret(Case(("check", SECRET), {"a": SPOILT.encode(), "b": "pipe"}))
    assert looked_for == {SECRET[:8], SECRET[1:9]}


def test_a_part_of_the_secret_that_is_told_is_found() -> None:
    told = Told(1, f"unknown key {SPOILT}\n", "", 0.1)
    statuses = frozenset({1})
    assert list(faults(told, statuses, False)) == ["the secret is told"]
    assert not list(faults(told, statuses, False, parts_of_secret(Case((SPOILT,)))))
