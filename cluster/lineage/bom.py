"""The bill of materials of a student, as CycloneDX 1.7 (ECMA-424).

No relation of CycloneDX means "learned from its outputs". So the teacher's answers are a component
of data: the student depends on them, and they depend on the teacher and the prompts. The weights
that a student began with are its dependency and its pedigree's ancestor.

Imports nothing but the standard library: the document is a plain mapping.
"""

from typing import Any
from uuid import NAMESPACE_URL, uuid5

from raystill import __version__
from raystill.cluster.lineage.card import licence_of, title
from raystill.cluster.lineage.facts import Facts
from raystill.cluster.lineage.graph import Model

SPDX = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc0-1.0": "CC0-1.0",
    "openmdw-1.0": "OpenMDW-1.0",
}
"""Licences that the SPDX list has, by the Hub's id; the others are named."""

Json = dict[str, Any]


def bill_of_materials(facts: Facts) -> Json:
    """The document; the same facts give the same one."""
    models = facts.lineage.models
    student = models[facts.lineage.student]
    components = [_component(model) for model in facts.lineage.ancestors()]
    depends: dict[str, list[str]] = {}
    for name in sorted(models):
        data = _data(models[name])
        components += data
        refs = [part["bom-ref"] for part in data]
        started = models[name].started_from
        depends[_ref(name)] = refs[:1] + ([_ref(started)] if started else [])
        if refs:
            depends[refs[0]] = [*map(_ref, models[name].learned_from), *refs[1:]]
            depends |= {ref: [] for ref in refs[1:]}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, student.id)}",
        "version": 1,
        "metadata": {
            "timestamp": facts.made_on,
            "tools": {
                "components": [{"type": "application", "name": "raystill", "version": __version__}]
            },
            "component": _student(facts, student),
        },
        "components": components,
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(set(on))} for ref, on in sorted(depends.items())
        ],
    }


def _student(facts: Facts, student: Model) -> Json:
    """The student: its files, its figures, its ancestor, and what it owes."""
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": value}],
        }
        for name, value in facts.hashes.items()
    ]
    licence, terms = licence_of(facts), facts.terms
    found: Json = {
        "type": "machine-learning-model",
        "bom-ref": _ref(student.id),
        "name": title(facts),
        "modelCard": _card(facts, student),
        "properties": _properties(
            {
                "identity": student.id,
                **{f"made:{name}": value for name, value in student.made.items()},
                "commit": facts.manifest.get("commit"),
                "rows_trained": facts.summary.get("rows_trained"),
                "terms:distributed": terms.get("distributed"),
            },
            [(f"duty:{kind}", value) for kind, value in facts.duties]
            + [(f"reading:{r['id']}", r["clause"]) for r in terms.get("readings") or ()]
            + [("terms:unknown", said) for said in facts.unknown],
        ),
    }
    if files:
        found["components"] = files
    if licence is not None:
        found["licenses"] = _licences(licence)
    if student.started_from is not None:
        base = _component(facts.lineage.models[student.started_from])
        found["pedigree"] = {"ancestors": [{**base, "bom-ref": f"ancestor:{base['bom-ref']}"}]}
    return found


def _card(facts: Facts, student: Model) -> Json:
    metrics = [
        {"type": name, "value": str(value), "slice": "held-out prompts"}
        for name, value in sorted(facts.figures().items())
    ]
    purpose = facts.terms.get("purpose") or "not stated"
    card: Json = {
        "modelParameters": {
            "task": "text-generation",
            "datasets": [{"ref": part["bom-ref"]} for part in _data(student)[:1]],
        },
        "considerations": {
            "useCases": [f"declared purpose: {purpose}"],
            "technicalLimitations": [
                "measured against its teacher on held-out prompts of the run only",
                "may have learned its teachers' mistakes and biases",
            ],
        },
    }
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _component(model: Model) -> Json:
    """A model or service that the student comes from."""
    found: Json = {
        "type": "machine-learning-model",
        "bom-ref": _ref(model.id),
        "name": model.name or model.id,
        "properties": _properties(
            {
                "identity": model.id,
                "route": model.route or "weights",
                "licence_sha256": model.licence_sha256,
                **{f"made:{name}": value for name, value in model.made.items()},
            }
        ),
    }
    if model.revision:
        found["version"] = model.revision
    if model.licence:
        found["licenses"] = _licences(model.licence)
    return found


def _data(student: Model) -> list[Json]:
    """The answers that a model learned from, then the prompts; nothing where it had no teacher."""
    if not student.learned_from:
        return []
    answers = {
        "type": "data",
        "bom-ref": f"answers:{student.id}",
        "name": f"answers of the teachers of {student.name}",
        "data": [{"type": "dataset", "name": "synthetic text", "classification": "synthetic"}],
    }
    prompts = [
        {
            "type": "data",
            "bom-ref": f"prompts:{student.id}:{number}",
            "name": name,
            "data": [{"type": "dataset", "name": name}],
        }
        for number, name in enumerate(student.data)
    ]
    return [answers, *prompts]


def _licences(licence: str) -> list[Json]:
    known = SPDX.get(licence.lower())
    named = {"id": known} if known else {"name": licence}
    return [{"license": {**named, "acknowledgement": "declared"}}]


def _properties(values: Json, more: list[tuple[str, str]] | None = None) -> list[Json]:
    """Values under names of this program; those that are None or empty are left out."""
    pairs = [*((n, v) for n, v in values.items() if v not in (None, "")), *(more or [])]
    return [{"name": f"raystill:{name}", "value": str(value)} for name, value in pairs]


def _ref(name: str) -> str:
    return f"model:{name}"
