"""What the papers of a student say, from the manifest and the summary in its run folder."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raystill import __version__
from raystill.base.run_folder import MANIFEST, STUDENT, SUMMARY, RunFolder, split_query
from raystill.cluster.lineage.graph import LINEAGE, Lineage, Model, clean, lineage_of
from raystill.model.identity import teacher_identity

CARD, NOTICE, BOM = "README.md", "NOTICE", "bom.cdx.json"
PAPERS = (CARD, NOTICE, BOM, LINEAGE)
ROLES = ("teacher", "base")


@dataclass(frozen=True)
class Facts:
    """What the papers say.

    name: of the student. terms: the manifest's record of them. hashes: sha256 of the student's
    files by name; empty for a folder in an object store.
    """

    name: str
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    lineage: Lineage
    hashes: Mapping[str, str]
    made_on: str

    @property
    def terms(self) -> Mapping[str, Any]:
        """The manifest's record of terms."""
        return dict(self.manifest.get("terms") or {})

    @property
    def sources(self) -> Mapping[str, Any]:
        """The manifest's record of sources; empty in a run of an earlier version."""
        return dict(self.terms.get("sources") or {})

    @property
    def duties(self) -> list[tuple[str, str]]:
        """What the student owes, as pairs of a kind and a text."""
        return [(str(kind), str(value)) for kind, value in self.terms.get("duties") or ()]

    @property
    def unknown(self) -> list[str]:
        """Sources of which no reading is, in sentences; of a path in them the last part."""
        said = map(str, self.terms.get("unknown") or ())
        return [re.sub(r"(?:/[^\s/]+)+/([^\s/]+)", r"\1", one) for one in said]

    def teachers(self) -> list[Model]:
        """The models that the student learned from."""
        models = self.lineage.models
        return [models[name] for name in models[self.lineage.student].learned_from]

    def figures(self) -> dict[str, float]:
        """The figures of the finished student on held-out prompts that are numbers."""
        after = (self.summary.get("evaluation") or {}).get("after") or {}
        return {
            name: value
            for name, value in after.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }


def facts_of(folder: RunFolder) -> Facts:
    """What the run folder says of its finished student."""
    manifest = json.loads(folder.read_text(MANIFEST))
    summary = json.loads(folder.read_text(SUMMARY))
    name = split_query(folder.path)[0].rstrip("/").rpartition("/")[2] or "student"
    local = None if folder.local is None else folder.local / STUDENT
    hashes = {} if local is None else _hashes(local)
    identity = f"run {manifest.get('run_id')}" if local is None else teacher_identity(local)
    made_on = datetime.now(UTC).isoformat(timespec="seconds")
    return Facts(
        name=name,
        manifest=manifest,
        summary=summary,
        lineage=_lineage(identity, name, manifest, made_on),
        hashes=hashes,
        made_on=made_on,
    )


def _lineage(identity: str, name: str, manifest: Mapping[str, Any], made_on: str) -> Lineage:
    """The student's lineage; its identity is its id, which is what a run calls its teacher."""
    terms = manifest.get("terms") or {}
    found = terms.get("sources") or {}
    models = {id_: _stored(id_, entry) for id_, entry in (found.get("ancestors") or {}).items()}
    teacher, base = (_stored("", found[role]) if found.get(role) else None for role in ROLES)
    if teacher is None:  # The synthetic engine, or a run of an earlier version.
        teacher = Model("", clean(Path(str(manifest.get("teacher") or "unknown")).name) or "")
    teacher = replace(teacher, id=str(manifest.get("teacher_identity") or teacher.name))
    if teacher.started_from == teacher.id:  # Its own lineage file is of these very weights.
        teacher = replace(models[teacher.id], licence=teacher.licence)
    started = teacher.id if found.get("starts_from_teacher") else None
    models[teacher.id] = teacher
    if base is not None:
        known = models.get(base.started_from or "", base)
        name_of_base = known.id or f"weights of {base.name}"
        base = replace(known, id=name_of_base, licence=base.licence or known.licence)
        models[base.id] = base
        started = base.id
    made = {
        "run": str(manifest.get("run_id") or ""),
        "on": made_on,
        "raystill": __version__,
        "verdict": str(terms.get("verdict") or "unknown"),
        "purpose": str(terms.get("purpose") or ""),
        "duties": clean("; ".join(f"{k} {v}" for k, v in terms.get("duties") or ())) or "",
    }
    data = tuple(clean(one) or "" for one in found.get("prompts") or ())
    models[identity] = Model(
        id=identity,
        name=clean(name) or "student",
        licence=clean(terms.get("student_licence")),
        learned_from=(teacher.id,),
        started_from=started,
        data=data,
        made=made,
    )
    return lineage_of(json.loads(Lineage(identity, models).to_json()))


def _stored(name: str, entry: Mapping[str, Any]) -> Model:
    """A model as the manifest keeps it."""
    values = {**entry, "id": name}
    for field in ("name", "licence", "revision", "route"):
        values[field] = clean(values.get(field))
    for field in ("learned_from", "data"):
        values[field] = tuple(values.get(field) or ())
    return Model(**values)


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file of the student but its papers, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in PAPERS:
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
