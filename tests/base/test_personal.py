"""Personal data and keys by a table of cases, and what hostile texts do to the search."""

import re
import time

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystill.base.personal import KINDS, SUSPICIOUS, find, find_many, kinds_in, mask, told
from raystill.base.redact import redact

PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n"
    "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n-----END RSA PRIVATE KEY-----"
)
FOUND = [
    ("email", "bob.smith+news@mail.example.co.uk", "write to {} today"),
    ("email", "a@b.io", "<{}>"),
    ("phone", "+49 30 1234567", "call {}."),
    ("phone", "+14155550123", "{}"),
    ("phone", "(212) 555-0123", "call {}, please"),
    ("phone", "212-555-0123", "x {}"),
    ("phone", "030/1234567", "Tel.: {}"),
    ("phone", "5551234567", "my phone number is {}"),
    ("ip_address", "8.8.8.8", "from {}:53"),
    ("ip_address", "2606:4700:4700::1111", "at {} now"),
    ("iban", "DE89 3704 0044 0532 0130 00", "to {} THIS week"),
    ("iban", "GB29NWBK60161331926819", "to {}."),
    ("iban", "ES91 2100 0418 4502 0005 1332", "{} AND MORE"),
    ("credit_card", "4111 1111 1111 1111", "5 {}"),
    ("credit_card", "378282246310005", "amex {}"),
    ("credit_card", "3782-822463-10005", "amex {}"),
    ("credit_card", "5555555555554444", "{},"),
    ("private_key", PEM, "here: {} ok"),
    ("aws_key", "AKIAIOSFODNN7EXAMPLE", "id={}"),
    ("anthropic_key", "sk-ant-api03-abcdefghijklmnopqrst", "{}"),
    ("openai_key", "sk-proj-abcDEF123ghiJKL456mnoPQR", "use {}"),
    ("github_token", "ghp_0123456789abcdefghijABCDEFGHIJ012345", "{}!"),
    ("github_token", "github_pat_11ABCDEFG0abcdefghijkl_mnopqrst", "{}"),
    ("slack_token", "xoxb-1234567890-abcdefghij", "{}"),
    ("slack_token", "hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXX1", "{}"),
    ("huggingface_token", "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "{}"),
    ("google_key", "AIzaSyA-1234567890abcdefghijklmnopqrstu", "key={}"),
    ("stripe_key", "sk_live_4eC39HqLyjWDarjtT1zdp7dc", "{}"),
    ("gitlab_token", "glpat-abcdefghij1234567890", "{}"),
    ("jwt", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P", "Bearer {}"),
    ("url_password", "me:hunter2", "postgres://{}@db.example/x"),
    ("assigned_secret", "q8Zr3kLm9xTv2WnB", "api_key = '{}'"),
    ("assigned_secret", "9f86d081884c7d659a2feaa0c55ad015", 'SECRET: "{}"'),
    ("assigned_secret", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key={}"),
]
NOT_FOUND = [
    "",
    "user@localhost, @name, a @ b.com, foo@bar",
    "4111 1111 1111 1112",
    "1234567890123456",
    "3.14159265358979, 1,234,567,890 and 12345678",
    "10.0.0.1, 192.168.1.1, 127.0.0.1, 192.0.2.7, 999.1.1.1",
    "version v1.2.3.4 or 1.2.3.4.5",
    "12:30:45, std::vector, a::b, 2001:db8::1, fe80::1",
    "DE89 3704 0044 0532 0130 01, GB29 NWBK",
    "What does -----BEGIN PRIVATE KEY----- mean, and is it the same in every file?",
    "token = tokenizer.encode_text_12345(prompt)",
    "secret = 'correct-horse-battery-staple'",
    "password: ****************",
    "sk-learn-is-a-library-for-machine-learning",
    "AKIA and hf_model, xoxb-",
    "eyJ.eyJ.x, https://example.com:8080/a@b",
    "7 + 4915112345 = 12, 2024-01-31, 555-0123",
]


@pytest.mark.parametrize(("kind", "value", "around"), FOUND)
def test_each_kind_is_found_where_it_stands_and_masked(kind: str, value: str, around: str) -> None:
    text = around.format(value)
    (place,) = find(text)
    assert (place.kind, text[place.start : place.end]) == (kind, value)
    assert mask(text) == around.format(f"[{kind.upper()}]")
    assert kinds_in([text]) == [frozenset({kind})]
    others = [one for one in KINDS if one != kind]
    assert mask(text, others) == text


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert find(text) == []
    assert mask(text) == text


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, *_ in FOUND} == set(KINDS)


def test_of_two_that_overlap_the_first_counts() -> None:
    text = "ftp://bob:pass@word.example.com and +14155550123@mail.example.com"
    assert [place.kind for place in find(text)] == ["url_password", "email"]


def test_counts_are_told_most_frequent_first() -> None:
    assert told({"phone": 1, "email": 1200, "jwt": 1}) == "email 1,200, jwt 1, phone 1"


PIECES = [value for _, value, _ in FOUND]
PIECES += ["@", "+", " ", "-", ":", "://", "token=", "tel ", "0", "12", ".", "x", "é", "\n", "'"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=60, deadline=None)
def test_masking_leaves_nothing_and_masks_once(text: str) -> None:
    masked = mask(text)
    assert find(masked) == []
    assert mask(masked) == masked


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
@settings(max_examples=60, deadline=None)
def test_the_first_look_passes_on_all_that_would_be_found(text: str) -> None:
    seen = pc.match_substring_regex(pa.array([text]), SUSPICIOUS)[0].as_py()
    assert seen or not find(text)
    assert list(find_many([text, "", text])) == [find(text), [], find(text)]


def test_the_first_look_is_cheap() -> None:
    """Ordinary texts pass it by: 100,000 need far less than the tokenizer does."""
    texts = [
        "A farmer has 12 eggs and sells 5 of them; how many are left on the 3rd day?"
    ] * 100_000
    start = time.process_time()
    assert not any(kinds_in(texts))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "part",
    [
        *("a@", "a-", "eyJaaaaaaaaaa-", "eyJaaaaaaaa.", "1 ", "1-", "+1 ", "://a:", "token=", "1."),
        *("-----BEGIN PRIVATE KEY-----", "2001:", "DE89 3704 ", "a.", "key:'", "sk-", "xoxb-"),
        *("hf_", "tel ", "(212) 555-", "AKIA", "[EMAIL]@", "4111 ", "a@b.", "AA00 ", "tel: ("),
    ],
)
def test_the_time_for_a_text_grows_with_its_length_alone(part: str) -> None:
    start = time.process_time()
    mask(part * (20_000 // len(part)))
    redact(part * (20_000 // len(part)), {})
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("kind", "value"), [(k, v) for k, v, _ in FOUND if re.search("_key|_token|jwt", k)]
)
def test_keys_of_services_are_redacted_from_all_that_is_said(kind: str, value: str) -> None:
    shown = redact(f"the server said: {value} is wrong", {})
    assert not any(value[i : i + 8] in shown for i in range(0, len(value) - 12, 4)), shown
    assert redact(shown, {}) == shown
