"""The gate: may this teacher teach this student, for this purpose, and what does that bring along.

Terms are data: ``terms.toml`` has dated readings of licences and services, with their words. A
verdict is a join over the sources of a run (the teacher's licence, the service it is reached by,
the student's own first weights, the data of its prompts): the worst verdict counts, duties add up.
So the order of the sources does not matter, and naming one twice changes nothing.

Readings are not advice.
"""

import hashlib
import ipaddress
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache, reduce
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raystill.base.errors import Problem
from raystill.base.records import read_bounded
from raystill.cluster.lineage.graph import BrokenLineage, read_lineage
from raystill.cluster.lineage.sources import licence_of, sources, wrong_name
from raystill.config.run import RunConfig
from raystill.config.student import TermsConfig
from raystill.model.files import ModelFolder

VERDICTS = ("allowed", "conditional", "unclear", "forbidden")
TABLE = Path(__file__).with_name("terms.toml")
OWN_ENDINGS = (".local", ".internal", ".svc")
"""Of names that only a private network knows, as one without any dot is."""
Duty = tuple[str, str]


@dataclass(frozen=True)
class Rule:
    """One reading; see the head of ``terms.toml``."""

    id: str
    kind: str
    match: tuple[str, ...]
    verdict: str
    duties: frozenset[Duty]
    quote: str
    version: str
    read: str
    source: str
    checked: date

    def clause(self) -> str:
        """The words that count, their version and the day they were read."""
        said = f"{self.quote!r}, " if self.quote else ""
        how = "" if self.read == "primary" else "; as others report it"
        return f"{said}{self.version}, read {self.checked}{how}"


@dataclass(frozen=True)
class Finding:
    """What is known of some sources together; ``join`` makes one of two.

    rules: ids of the readings that it rests on. base_rules: those of first weights, whose readings
    on outputs do not count. unknown: sources that no reading is of, as pairs of
    the kind (``licence``, ``service``) and a sentence that begins with the source's name.
    """

    verdict: str = "allowed"
    duties: frozenset[Duty] = frozenset()
    rules: frozenset[str] = frozenset()
    base_rules: frozenset[str] = frozenset()
    unknown: frozenset[tuple[str, str]] = frozenset()

    def join(self, other: "Finding") -> "Finding":
        """The worse verdict and all duties of both."""
        worse = max(self.verdict, other.verdict, key=VERDICTS.index)
        return Finding(
            worse,
            self.duties | other.duties,
            self.rules | other.rules,
            self.base_rules | other.base_rules,
            self.unknown | other.unknown,
        )

    def conflicts(self) -> list[str]:
        """Duties that nobody can meet together."""
        found = []
        for kind, what in (("name_prefix", "begin its name with"), ("same_terms", "carry")):
            values = sorted(value for name, value in self.duties if name == kind)
            if len(values) > 1:
                found.append(f"the student would have to {what} both {' and '.join(values)}")
        return found


@cache
def rules() -> tuple[Rule, ...]:
    """All readings of ``terms.toml``."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(_rule(entry, table["checked"]) for entry in table["rule"])


def _rule(entry: dict[str, Any], checked: date) -> Rule:
    duties = entry.get("duties", {})
    plain = {name: "yes" if value is True else str(value) for name, value in duties.items()}
    texts = {name: entry[name] for name in ("id", "kind", "verdict", "quote", "version", "read")}
    return Rule(
        **texts,
        match=tuple(entry["match"]),
        duties=frozenset(plain.items()),
        source=entry["source"],
        checked=checked,
    )


def of_licence(licence: str | None, what: str) -> Finding:
    """The finding on outputs of a model under a licence id; ``what`` names the model."""
    if licence is None:
        return Finding("unclear", unknown=frozenset({("licence", f"{what} states no licence")}))
    return _matching("licence", licence.strip().lower(), f"{what} is under {licence!r}")


def of_weights(licence: str | None, what: str) -> Finding:
    """The finding on first weights: what binds their outputs does not bind their fine-tuning."""
    found = of_licence(licence, what)
    if not found.rules:
        return found
    verdict = "allowed" if found.verdict == "allowed" else "conditional"
    return Finding(verdict, found.duties, base_rules=found.rules)


def of_service(base_url: str | None) -> Finding:
    """The finding on a service; one of this machine or a private network adds nothing."""
    host = (urlsplit(base_url or "").hostname or "").lower()
    if _is_own(host):
        return Finding()
    return _matching("service", host, f"{host} is a service")


def of_lineage(model: ModelFolder | None) -> Finding:
    """The finding on all that a model comes from, by the lineage file in its folder.

    The model's own licence is not in it, since it is looked at by itself.
    """
    try:
        lineage = None if model is None else read_lineage(model.path)
    except BrokenLineage as error:
        said = f"{model.name if model else ''} has a lineage.json that {error}"
        return Finding("unclear", unknown=frozenset({("licence", said)}))
    if model is None or lineage is None:
        return Finding()
    parts = []
    for one in lineage.models.values():
        what = f"the data of {one.name} (in the lineage of {model.name})"
        parts += [of_licence(licence, what) for licence in one.data_licences]
    for one in lineage.ancestors():
        if one.route is not None:
            parts.append(of_service(f"https://{one.route}"))
        if one.route is None or one.licence is not None:
            of = of_licence if lineage.teaches(one.id) else of_weights
            parts.append(of(one.licence, f"{one.name} (in the lineage of {model.name})"))
    return join(parts)


def _matching(kind: str, name: str, what: str) -> Finding:
    for rule in rules():
        if rule.kind == kind and name in rule.match:
            return Finding(rule.verdict, rule.duties, frozenset({rule.id}))
    said = f"{what}, of which terms.toml has no reading"
    return Finding("unclear", unknown=frozenset({(kind, said)}))


def _route(config: RunConfig) -> str | None:
    """The host of the teacher's service; None for weights, and for a server of one's own."""
    host = (urlsplit(config.teacher.api.base_url or "").hostname or "").lower()
    return host if config.teacher.engine == "api" and not _is_own(host) else None


def _is_own(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(OWN_ENDINGS)
    return address.is_loopback or address.is_private


def refusals(found: Finding, terms: TermsConfig) -> list[str]:
    """Why a student of such sources must not be made for this purpose, in words.

    A service that is not listed is refused, and a licence that is not listed or not stated.
    """
    reasons = []
    for rule in _named(found):
        if rule.id in found.rules and rule.verdict in ("forbidden", "unclear"):
            reasons.append(f"{rule.id} is read as {rule.verdict}: {rule.clause()}")
        elif ("non_commercial", "yes") in rule.duties and terms.purpose != "research":
            reasons.append(f"{rule.id} allows research only: {rule.clause()}")
    reasons += sorted(said for _, said in found.unknown)
    if terms.distributed:
        reasons += found.conflicts()
        carried = sorted(value for name, value in found.duties if name == "same_terms")
        given = terms.student_licence
        if given is not None and carried and given not in carried:
            reasons.append(f"the student must carry {carried[0]}, which {given!r} would drop")
    return reasons


def _named(found: Finding) -> list[Rule]:
    return [rule for rule in rules() if rule.id in found.rules | found.base_rules]


def check_terms(
    config: RunConfig,
    teacher: ModelFolder | None,
    student: ModelFolder | None,
    teachers: Mapping[str, ModelFolder] | None = None,
) -> tuple[list[Problem], list[str]]:
    """Problems and notices of the teacher's and the student's terms; ``teachers``: of several."""
    terms, found = config.terms, finding_of_all(config, teacher, student, teachers or {})
    notices = describe(found)
    problems = []
    permission = terms.permission
    stated = "terms.teacher_licence" if config.teachers is None else "terms.teacher_licences"
    reasons = list(refusals(found, terms))
    for reason in reasons:
        if permission is not None and reason.startswith(f"{permission.rule} "):
            notices.append(
                f"terms: {reason}; permitted by {permission.file} "
                f"(sha256 {hash_of(permission.file)}): {permission.reason}"
            )
            continue
        problems.append(
            Problem(
                "terms",
                f"{reason}; choose another teacher, state the licence with {stated}, "
                "terms.base_licence or prompts.licence, or name the owner's letter with "
                f"terms.permission: {{file, rule, reason}} (purpose: {terms.purpose}, distributed: "
                f"{str(terms.distributed).lower()})",
            )
        )
    hub = config.output.hub
    if hub is not None and terms.distributed and (why := wrong_name(found.duties, hub.repo)):
        problems.append(Problem("output.hub.repo", why))
    if permission is not None:
        if not any(reason.startswith(f"{permission.rule} ") for reason in reasons):
            notices.append(f"terms.permission changes nothing: no {permission.rule!r} forbids this")
        if not hash_of(permission.file):
            message = f"{permission.file!r} is no file that can be read and has something in it; "
            message += "name the letter that gives the permission"
            problems.append(Problem("terms.permission.file", message))
    return problems, notices


def finding_of(
    config: RunConfig, teacher: ModelFolder | None, student: ModelFolder | None
) -> Finding:
    """The join over the teacher's licence, its service, the student's first weights, all that these
    models come from, and the prompts' licences.
    """
    terms, parts = config.terms, []
    if config.teacher.engine == "api":
        service = of_service(config.teacher.api.base_url)
        parts.append(service)
        # A hosted model's weights may be nobody's to see: then the service's terms are all.
        if terms.teacher_licence is not None or service == Finding():
            parts.append(of_licence(terms.teacher_licence, f"{config.teacher.api.model}"))
    elif config.teacher.engine == "vllm":
        licence = terms.teacher_licence or licence_of(teacher)
        if licence is not None or teacher is not None:  # What is not found is told elsewhere.
            parts += [of_licence(licence, config.teacher.model), of_lineage(teacher)]
    if config.student.model is not None:
        licence = terms.base_licence or licence_of(student)
        if licence is not None or student is not None:
            parts += [of_weights(licence, config.student.model), of_lineage(student)]
    parts += [of_licence(licence, what) for what, licence in config.prompts.licences()]
    return join(parts)


def finding_of_all(
    config: RunConfig,
    teacher: ModelFolder | None,
    student: ModelFolder | None,
    teachers: Mapping[str, ModelFolder],
) -> Finding:
    """`finding_of` over all teachers of the run."""
    views = config.by_teacher
    return join(finding_of(one, teachers.get(n, teacher), student) for n, one in views.items())


def join(parts: Iterable[Finding]) -> Finding:
    """The finding on all sources together."""
    return reduce(Finding.join, parts, Finding())


def describe(found: Finding) -> list[str]:
    """The verdict, the duties and the clauses, a line each; nothing where nothing is owed."""
    lines = []
    for rule in _named(found):
        if rule.id in found.rules and rule.verdict != "allowed":
            lines.append(f"terms: {rule.id} is read as {rule.verdict}: {rule.clause()}")
        elif rule.verdict != "allowed":
            lines.append(f"terms: student.model is under {rule.id}, whose terms the student keeps")
    duties = sorted(f"{name} {value}".removesuffix(" yes") for name, value in found.duties)
    if duties:
        lines.append(f"terms: duties that reach the student: {'; '.join(duties)}")
    lines += sorted(f"terms: {said}" for _, said in found.unknown)
    return lines


def _sources(
    config: RunConfig, teacher: ModelFolder | None, student: ModelFolder | None
) -> dict[str, Any]:
    """`sources` of a run of one teacher."""
    stated = config.terms.teacher_licence
    if config.teacher.engine != "api":
        stated = stated or licence_of(teacher)
    licences = {"teacher": stated, "base": config.terms.base_licence or licence_of(student)}
    return sources(config, teacher, student, licences, _route(config))


def hash_of(file: str) -> str:
    """sha256 of a letter; empty where there is none, nothing in it, or no end of it."""
    try:
        content = read_bounded(Path(file))
    except OSError:
        return ""
    return hashlib.sha256(content).hexdigest() if content else ""


def record(
    config: RunConfig,
    teacher: ModelFolder | None,
    student: ModelFolder | None,
    teachers: Mapping[str, ModelFolder] | None = None,
) -> dict[str, Any]:
    """What the manifest keeps of the terms: verdict, duties, readings, permission."""
    found = finding_of_all(config, teacher, student, teachers or {})
    permission = config.terms.permission
    kept: dict[str, Any] = {
        "purpose": config.terms.purpose,
        "distributed": config.terms.distributed,
        "verdict": found.verdict,
        "duties": sorted(map(list, found.duties)),
        "readings": [{"id": rule.id, "clause": rule.clause()} for rule in _named(found)],
        "unknown": sorted(said for _, said in found.unknown),
        "student_licence": config.terms.student_licence,
        "sources": _sources(next(iter(config.by_teacher.values())), teacher, student),
    }
    if teachers:
        kept["sources"]["teachers"] = {
            name: _sources(one, teachers[name], student) for name, one in config.by_teacher.items()
        }
    if permission is not None:
        kept["permission"] = {
            "rule": permission.rule,
            "reason": permission.reason,
            "sha256": hash_of(permission.file),
        }
    return kept
