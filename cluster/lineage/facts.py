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
from raystill.base.records import read_object
from raystill.base.run_folder import (
    ADAPTER,
    MANIFEST,
    STUDENT,
    SUMMARY,
    RunFolder,
    split_query,
)
from raystill.cluster.lineage.graph import LINEAGE, Lineage, Model, clean, lineage_of
from raystill.model.identity import teacher_identity

CARD, NOTICE, BOM = "README.md", "NOTICE", "bom.cdx.json"
PAPERS = (CARD, NOTICE, BOM, LINEAGE)
ROLES = ("teacher", "base")


@dataclass(frozen=True)
class Facts:
    """What the papers say.

    name: of the student. terms: the manifest's record of them. hashes: sha256 of the student's
    files by name; empty for a folder in an object store. alone: whether they are about the adapter
    alone, and not about the weights with the adapter in them.
    """

    name: str
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    lineage: Lineage
    hashes: Mapping[str, str]
    made_on: str
    alone: bool = False

    @property
    def adapter(self) -> Mapping[str, Any]:
        """The manifest's record of the adapter that was trained; empty where all weights were."""
        return dict(self.manifest.get("adapter") or {})

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


def facts_of(folder: RunFolder, part: str = STUDENT) -> Facts:
    """What the run folder says of its finished student. part: ``student``, or ``adapter``.

    Raises BrokenFile.
    """
    manifest, summary = read_object(folder, MANIFEST), read_object(folder, SUMMARY)
    name = split_query(folder.path)[0].rstrip("/").rpartition("/")[2] or "student"
    local = None if folder.local is None else folder.local / part
    hashes = {} if local is None else _hashes(local)
    identity = f"run {manifest.get('run_id')}"
    if part == ADAPTER:
        identity = f"adapter {_sha256_of(hashes)}" if hashes else f"adapter of {identity}"
    elif local is not None:
        identity = teacher_identity(local)
    made_on = datetime.now(UTC).isoformat(timespec="seconds")
    return Facts(
        name=name,
        manifest=manifest,
        summary=summary,
        lineage=_lineage(identity, name, manifest, made_on),
        hashes=hashes,
        made_on=made_on,
        alone=part == ADAPTER,
    )


def _sha256_of(hashes: Mapping[str, str]) -> str:
    """One identity over the hashes of some files."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def adapter_text(adapter: Mapping[str, Any]) -> str:
    """An adapter of the manifest in a few words; '' of none."""
    if not adapter:
        return ""
    targets = adapter.get("target_modules")
    modules = targets if isinstance(targets, str) else ", ".join(map(str, targets or ()))
    return f"LoRA of rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, on {modules}"


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
    learned_from = [teacher.id]
    for role, one in (manifest.get("teachers") or {}).items():
        its = (found.get("teachers") or {}).get(role) or {}
        models |= {id_: _stored(id_, e) for id_, e in (its.get("ancestors") or {}).items()}
        model = _stored("", its["teacher"]) if its.get("teacher") else Model("", role)
        model = replace(model, id=str(one["identity"]))
        models.setdefault(model.id, model)
        learned_from += [model.id] * (model.id not in learned_from)
    if base is not None:
        known = models.get(base.started_from or "", base)
        identified = (manifest.get("adapter") or {}).get("base_identity")
        name_of_base = known.id or identified or f"weights of {base.name}"
        base = replace(known, id=name_of_base, licence=base.licence or known.licence)
        models[base.id] = base
        started = base.id
    made = {
        "run": str(manifest.get("run_id") or ""),
        "on": made_on,
        "raystill": __version__,
        "verdict": str(terms.get("verdict") or "unknown"),
        "purpose": str(terms.get("purpose") or ""),
        "adapter": clean(adapter_text(manifest.get("adapter") or {})) or "",
        "duties": clean("; ".join(f"{k} {v}" for k, v in terms.get("duties") or ())) or "",
    }
    data = tuple(clean(one) or "" for one in found.get("prompts") or ())
    licences = tuple(clean(one) or "" for one in found.get("prompts_licences") or ())
    models[identity] = Model(
        id=identity,
        name=clean(name) or "student",
        licence=clean(terms.get("student_licence")),
        learned_from=tuple(learned_from),
        started_from=started,
        data=data,
        data_licences=licences,
        made=made,
    )
    return lineage_of(json.loads(Lineage(identity, models).to_json()))


def _stored(name: str, entry: Mapping[str, Any]) -> Model:
    """A model as the manifest keeps it."""
    values = {**entry, "id": name}
    for field in ("name", "licence", "revision", "route"):
        values[field] = clean(values.get(field))
    for field in ("learned_from", "data", "data_licences"):
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
