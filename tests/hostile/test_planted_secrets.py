"""Secrets planted in every field, variable, file name and error: none of them is told.

Each case calls the command in this process. The values are those that a text rewrites: with quotes,
backslashes, line ends, an @, of several lines, longer than what a message shows.
"""

import json
import pickle
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import driver
from raystill.base import formatting
from raystill.base.redact import SHORTEST_SECRET, Secrets, redact, redacted, shown_value
from raystill.config import base
from raystill.config.describe import fields
from raystill.config.load import config_text, load_config, load_leniently
from tests.support.sound_run import SOUND

PEM = (
    "-----BEGIN PRIVATE KEY-----\nMIIEvQPlantedLineOne\nPlantedLineTwo==\n-----END PRIVATE KEY-----"
)
VALUES = {
    "plain": "planted-secret-1",
    "at": "pla@nted@secret-2",
    "backslash": "planted\\secret\\3\\n",
    "both quotes": "pla'nted\"secret'4",
    "line end": "planted-5a\nsecond-line-5b",
    "PEM": PEM,
    "long": "planted6" * 60,
    "letters": "plänted-sécret-7",
    "signs": "planted/secret+8=&?#",
}
VARIABLES = (
    *("DB_PASSWORD", "PGPASSWORD", "TLS_PRIVATE_KEY", "MYSQL_PWD", "MY_API_KEY", "HF_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "REDISCLI_AUTH", "AZURE_CLIENT_SECRET", "KEY_PASSPHRASE"),
)
HARMLESS = {"RAY_AUTH_MODE": "disabled", "PWD": "/root/work", "TOKENIZERS_PARALLELISM": "disabled"}
FIELDS = sorted({field.name for field in fields() if "[]" not in field.name})


def parts_of(secret: str) -> set[str]:
    """Runs of a secret's characters that no text may hold: eight long, of letters and the like."""
    runs = {secret[i : i + SHORTEST_SECRET] for i in range(len(secret) - SHORTEST_SECRET + 1)}
    return {
        run for run in runs if "PRIVATE" not in run and "KEY---" not in run and "---" not in run
    }


def assert_untold(text: str, secret: str) -> None:
    told = [part for part in parts_of(secret) if part in text]
    assert not told, f"{told[:3]} of {secret!r} in {text[:600]!r}"


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("kind", VALUES)
def test_a_variable_is_hidden_however_a_text_spells_it(variable: str, kind: str) -> None:
    secret, environment = VALUES[kind], {variable: VALUES[kind]}
    for text in (
        f"refused: {secret}",
        f"refused: {secret!r}",
        repr(f"refused {secret!r}"),
        json.dumps({"x": secret}),
        quote(secret, safe=""),
        formatting.one_line(redact(secret, environment)),
        " ".join(secret.split()),
    ):
        shown = redact(text, environment)
        assert_untold(shown, secret)
        assert redact(shown, environment) == shown


def test_of_a_value_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration has four hundred texts, and a check compares two of them."""
    read, secrets = [], Secrets()
    of_all = secrets.spelt
    monkeypatch.setattr(secrets, "spelt", lambda found: (read.append(1), of_all(found))[1])
    monkeypatch.setattr("raystill.base.redact.SECRETS", secrets)
    monkeypatch.setenv("DB_PASSWORD", VALUES["at"])
    value = {f"key {i}": [f"text {i}", {"inner": VALUES["at"]}] for i in range(50)}
    assert redacted(value) == {
        f"key {i}": [f"text {i}", {"inner": "$DB_PASSWORD"}] for i in range(50)
    }
    assert len(read) == 1


def test_ordinary_variables_are_no_secrets() -> None:
    text = "disabled at /root/work"
    assert redact(text, HARMLESS) == text


@pytest.mark.parametrize("field", FIELDS)
def test_a_variable_is_hidden_in_every_field(
    place: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """By the loader, and what it says; also where a message shortens the value."""
    for kind in ("PEM", "long"):
        secret = VALUES[kind]
        monkeypatch.setenv("DB_PASSWORD", secret)
        loaded = load_leniently("sound.yaml", [f"{field}={json.dumps('x' * 40 + secret)}"])
        for problem in loaded.problems:
            assert_untold(redact(str(problem)), secret)
        if loaded.config is not None:
            assert_untold(config_text(loaded.config), secret)


URIS = (
    "s3://ID:{}@bucket/x",
    "s3://bucket/x?secret_key={}&region=a",
    "abfs://box@account/x?account_key={}",
    "https://host/x?sig={}&n=3",
    "s3://bucket/x?a=1&session_token={}",
    "hdfs://{}@host/x",
)


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("password", ["planted-1", "pla@nted@2", "planted%40three", "pl'anted4"])
def test_what_a_uri_carries_is_hidden(uri: str, password: str) -> None:
    whole = uri.format(password)
    for text in (
        whole,
        f"{whole} cannot be written",
        repr(whole),
        json.dumps([whole]),
        f"'{whole}'",
    ):
        shown = redact(text, {})
        assert not any(part in shown for part in (password, password[-6:], "nted")), shown
        assert redact(shown, {}) == shown


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, lambda s: s) for kind in VALUES),
        ("both quotes", lambda s: [s]),
        ("plain", lambda s: f"--hf-token {s}"),
        ("PEM", lambda s: [{"hf_token": s}]),
    ],
)
def test_engine_arguments_of_a_wrong_type_are_not_shown(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str, shape: Any
) -> None:
    config = SOUND | {"teacher": SOUND["teacher"] | {"engine_args": shape(VALUES[kind])}}
    (place / "bad.yaml").write_text(yaml.safe_dump(config))
    start = time.process_time()
    assert driver.main(["check", "--static", "bad.yaml"]) == driver.EXIT_REFUSED
    assert time.process_time() - start < 5
    told = capsys.readouterr()
    assert "teacher.engine_args" in told.err
    assert_untold(told.out + told.err, VALUES[kind])


@pytest.mark.parametrize("kind", VALUES)
def test_a_setting_that_is_a_secret_is_learnt_as_it_is_read(place: Path, kind: str) -> None:
    secret = VALUES[kind]
    config = SOUND | {
        "teacher": SOUND["teacher"] | {"engine_args": {"deep": [{"auth_token": secret}]}}
    }
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    loaded = load_config(place / "run.yaml")
    assert_untold(config_text(loaded), secret)
    assert loaded.teacher.engine_args["deep"][0]["auth_token"] == secret
    assert_untold(redact(f"an engine says {secret!r}", {}), secret)


def test_a_process_that_is_given_the_configuration_knows_its_secrets(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker gets a section alone, unpickled, and what it logs of it is redacted too."""
    config = SOUND | {"teacher": SOUND["teacher"] | {"engine_args": {"hf_token": VALUES["at"]}}}
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    sent = pickle.dumps(load_config(place / "run.yaml").teacher)
    there = Secrets()
    monkeypatch.setattr(base, "SECRETS", there)
    assert pickle.loads(sent).engine_args == {"hf_token": VALUES["at"]}
    assert_untold(there.hide(f"an engine says {VALUES['at']!r}", {}), VALUES["at"])


TEXT = "Zq7xPlanted9ValueOfNobody"
LINES = (
    *("hf_token: {}: x", "hf_token: [{}", "hf_token: '{}", "hf_token: !!int {}", "hf_token: *{}"),
    *("hf_token: !{} x", "hf_token: !a!{}", "hf_token: @{}", 'hf_token: "\\{}"', "x: !!float {}"),
    *("x: !!timestamp {}", "x: !!bool {}", "x: !!binary {}~", "x: !!python/{} 1", "x: &{} [*{}x]"),
    *("%{}", "hf_token: 2020-99-99T{}", "hf_token: `{}", "x: !!null {}", "x: !!omap {}"),
    *("apiKey: '{}", "db_password: ${}x: [", "db_password: *{}"),
)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("by", ["file", "--set"])
def test_yaml_that_cannot_be_read_is_not_quoted(
    place: Path, capsys: pytest.CaptureFixture[str], line: str, by: str
) -> None:
    """A password may begin with a sign that YAML has a use for."""
    text = line.replace("{}", TEXT)
    (place / "bad.yaml").write_text(f"teacher:\n  engine_args:\n    {text}\n")
    words = ["bad.yaml"] if by == "file" else ["sound.yaml", "--set", f"teacher={{{text}}}"]
    assert driver.main(["check", "--static", *words]) == driver.EXIT_REFUSED
    told = capsys.readouterr()
    assert "unexpected:" not in told.err
    assert_untold(told.out + told.err, TEXT)


NAMES = (
    "apiKey",
    "accessKey",
    "hfToken",
    "refreshToken",
    "clientSecret",
    "X-Api-Key",
    "access key",
)
NAMES += ("Authorization", "cookie", "connectionString", "bearer", "api.key", "github_pat")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [TEXT, 90125551234567])
def test_a_name_in_any_spelling_is_one_of_a_secret(place: Path, name: str, value: Any) -> None:
    """Also of a password of digits alone, which YAML reads as a number."""
    config = SOUND | {"teacher": SOUND["teacher"] | {"engine_args": {"deep": {name: value}}}}
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    kept = config_text(load_config(place / "run.yaml"))
    assert str(value) not in kept or (name == "github_pat" and value != TEXT)
    assert str(value) not in redact(f"an engine says {value}", {}) or value != TEXT


def test_ids_and_sizes_are_no_secrets() -> None:
    value = {"stop_token_ids": [151645, 151643], "pad_token": 3, "num_tokens": 10**9, "key": 12}
    assert redacted(value) == value


FORMS = (
    *("npm_" + "aB3d" * 9, "pypi-AgEIcHlwaS5vcmc" + "aB3d" * 10, "dop_v1_" + "ab12" * 16),
    *("SG." + "aB3dE6gH9jK2mN5pQ8sT22" + "." + "aB3d" * 10 + "abc", "ya29." + "aB3dE6g" * 8),
    *("glpat-" + "aB3dE6gH9jK2mN5pQ8sT", "hvs." + "aB3dE6g" * 6, "gsk_" + "aB3dE6gH" * 6),
    *("xai-" + "aB3dE6gH" * 8, "nvapi-" + "aB3dE6gH" * 6, "tskey-auth-" + "aB3dE6gH" * 4),
    *("shpat_" + "0a1b" * 8, "dckr_pat_" + "aB3dE6gH" * 4, "r8_" + "aB3dE6gH" * 4 + "abcde"),
    *(
        "AGE-SECRET-KEY-1" + "QPZRY9X8" * 7,
        "AKIA" + "ABCD1234" * 2,
        "AIzaSy" + "aB3dE6gH" * 4 + "a",
    ),
    *(
        "github_pat_11" + "A1b2C3d4E5" * 8,
        "xoxb-123456789012-" + "aB3d" * 6,
        "hf_" + "AbCd1234" * 5,
    ),
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[:8])
def test_a_key_that_is_known_by_its_form(form: str) -> None:
    for text in (form, f"is {form!r}; expected", json.dumps({"x": [form]}), f"?a={form}&b=1"):
        assert form[8:] not in redact(text, {})
    assert redact(f"Authorization: Bearer {TEXT}", {}) == "Authorization: Bearer ***"


GIVEN = (
    *("Authorization: Basic {}", "proxy-authorization: basic {}==", "Set-Cookie: a=1; b={}"),
    *("--password {}", "--token '{}'", "--hf-token {}", "MYSQL_PWD={}", "Server=a;Pwd={};B=c"),
    *("aws_session_token = {}", "sas_token={}", "https://h/x?a=1;token={}", "https://h/#auth={}"),
    *("https://h/?key={}&x=1", "https://h/?subscription-key={}", "https://h/?jwt={}&pass={}"),
    *("https://h/%3Fpassword%3D{}%26x", "s3:/ID:{}@bucket/x", "//user:{}@host/x"),
)


@pytest.mark.parametrize("form", GIVEN)
def test_what_a_text_gives_as_a_secret_is_hidden(form: str) -> None:
    """Headers, options, connection strings, and URIs with a slash or the scheme forgotten."""
    text = form.replace("{}", TEXT)
    for around in (text, f"cannot open {text!r}; correct it", json.dumps([text])):
        shown = redact(around, {})
        assert_untold(shown, TEXT)
        assert redact(shown, {}) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("basic understanding of cookies: none", "PWD=/root/work", "C:/me@home/x", "a // b: c@d"),
        *("max_tokens=512 --stop-token-ids 1 2", "prompts.jsonl?x=1#part", "a password is missing"),
    ],
)
def test_what_looks_like_a_secret_and_is_none_stays(text: str) -> None:
    assert redact(text, {}) == text


MORE_NAMES = ("SECRETS", "DB_PASSWORDS", "PASSWORD2", "HF_TOKEN1", "API_TOKENS", "ACCESSTOKEN")
MORE_NAMES += ("MY_JWT", "DB_CREDS", "PGPASS", "GOOGLE_APPLICATION_CREDENTIALS_JSON", "MNEMONIC")


@pytest.mark.parametrize("name", MORE_NAMES)
def test_more_names_of_secrets(name: str) -> None:
    assert_untold(redact(f"refused: {TEXT}", {name: TEXT}), TEXT)
    untaught = TEXT[::-1]  # What a process has once learned to be a secret stays one.
    for other in ("NUM_TOKENS", "STOP_TOKENS", "KEYS", "MAX_TOKENS2", "COMPASS", "PATH"):
        assert redact(untaught, {other: untaught}) == untaught


@pytest.mark.parametrize("words", [["report", "{}"], ["store", "list", "{}"], ["check", "{}.yaml"]])
def test_a_file_name_that_is_a_secret_is_not_told(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    secret = VALUES["plain"]
    monkeypatch.setenv("DB_PASSWORD", secret)
    assert driver.main([word.format(secret) for word in words]) in (1, 2)
    told = capsys.readouterr()
    assert "$DB_PASSWORD" in told.err
    assert_untold(told.out + told.err, secret)


def test_a_section_that_is_named_like_a_secret_stays() -> None:
    value = {"token_weights": {"by": "importance"}, "hf_token": {"x": ["planted-secret-9"]}}
    assert redacted(value) == {"token_weights": {"by": "importance"}, "hf_token": "***"}
    secrets = Secrets()
    secrets.learn(value)
    assert secrets.hide("importance of planted-secret-9", {}) == "importance of ***"


@pytest.mark.parametrize(
    "part",
    [
        *("a-", "-", "a", "x://a:b", "://a:b@", "x://a@", "?token", "&sig='", "hf_token '", "a=b"),
        *("%3F", "%3Ftoken", "--token ", "--a", "cookie: ", "//a:", "/a:b", "basic ", ";#", "pwd="),
    ],
)
def test_the_time_for_a_text_grows_with_its_length_alone(part: str) -> None:
    start = time.process_time()
    redact(part * (100_000 // len(part)), {})
    assert time.process_time() - start < 5


SECRET = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\0"),
    min_size=12,
    max_size=40,
).filter(lambda s: len(set(s)) > 6 and s.split() == [s])


@given(SECRET, st.text(max_size=30), st.integers(20, 300))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_text_that_is_made_of_a_value_holds_a_secret(
    secret: str, around: str, longest: int
) -> None:
    secrets = Secrets()
    value = {"a": [around, {"my_password": secret}], "password": {"x": [secret]}}
    secrets.learn(value)
    assert secret not in secrets.hide(around + secret + around, {}).replace(around, "")
    clean = redacted(value)
    assert secret not in json.dumps(clean, ensure_ascii=False).replace(around, "")
    assert len(shown_value(value, longest)) <= longest
