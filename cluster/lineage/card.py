"""The model card and the NOTICE of a student, in the metadata of the Hugging Face Hub.

Names come from run files and folders, so they are shown as code, in one line: nothing of them is
markup. ``base_model`` names the weights that the student began with and never its teacher, which
the Hub would take for them; the teacher has a key of its own.
"""

from typing import Any

import yaml

from raystill.base.personal import told
from raystill.cluster.lineage.facts import Facts, adapter_text

HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail"),
    *("bigscience-openrail-m", "bigscience-bloom-rail-1.0", "openmdw-1.0", "openmdw-1.1"),
)
"""Licence ids of the Hub that need no ``license_name``."""
FIGURES = {
    "kl_nats_per_token": "KL(teacher, student), nats a token",
    "top1_agreement": "top-1 agreement with the teacher",
    "acceptance": "acceptance, the sum of min(p teacher, p student)",
    "perplexity": "perplexity of the teacher's answers",
    "num_tokens": "tokens measured",
}
DUTIES = {
    "name_prefix": "its name begins with {}",
    "display": "its documentation displays {}",
    "notice": "this notice travels with it: {}",
    "same_terms": "it is handed on under the same terms: {}",
    "copy_licence": "a copy of the licence travels with it",
    "credit": "credit is given to {}",
    "non_commercial": "it is not used commercially",
    "label_ai_generated": "what it writes is labelled as AI-generated where it is published",
}


def model_card(facts: Facts) -> str:
    """``README.md`` of the student."""
    front = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n\n# {title(facts)}",
        f"A student that {_teachers(facts)} taught, made with Raystill.",
        _knowledge(facts),
        _figures(facts),
        _use(facts),
        "## Limits\n\n"
        "- The figures compare the student with its teacher on held-out prompts of the run. They "
        "do not say how good the teacher is, nor what the student does elsewhere.\n"
        "- What the teacher gets wrong, and how it is biased, the student may have learned.\n"
        f"- {_personal(facts)}\n"
        "- No test of safety or of memorised text is part of the run.",
    ]
    return "\n\n".join(parts) + "\n"


def _personal(facts: Facts) -> str:
    """What is known of personal data in the prompts, in a sentence; counts alone."""
    found = facts.manifest.get("personal_data")
    if not isinstance(found, dict) or not isinstance(found.get("kinds"), dict):
        return "Prompts and answers were not searched for personal data."
    kinds = {_line(str(kind)): n for kind, n in found["kinds"].items() if isinstance(n, int)}
    held, read = found.get("prompts"), found.get("prompts_read")
    done = {"mask": "masked", "drop": "left out"}.get(str(found.get("action")), "left as they are")
    said = f"No personal data or keys of known forms were found in {read} prompts."
    if held:
        said = f"{held} of {read} prompts held personal data or keys ({told(kinds)}), {done}."
    answers = facts.summary.get("personal_data")
    if not isinstance(answers, dict) or not isinstance(answers.get("any"), int):
        return said
    of, rejected = answers["any"], facts.summary.get("filtered") or {}
    return f"{said} So did {of} of {answers.get('looked')} answers" + (
        ", of which filters rejected some." if of and rejected else "."
    )


def title(facts: Facts) -> str:
    """The student's name, with the prefix that a licence asks for."""
    prefixes = [value for kind, value in facts.duties if kind == "name_prefix"]
    if len(prefixes) == 1 and not facts.name.lower().startswith(prefixes[0].lower()):
        return f"{prefixes[0]}-{_line(facts.name)}"
    return _line(facts.name)


def metadata(facts: Facts) -> dict[str, Any]:
    """The YAML block of the card."""
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    licence = licence_of(facts)
    if licence in HUB_LICENCES:
        found["license"] = licence
    elif licence is not None:
        found |= {"license": "other", "license_name": licence}
    hub_id = facts.sources.get("base_hub_id") or (
        facts.sources.get("teacher_hub_id") if facts.sources.get("starts_from_teacher") else None
    )
    if facts.alone:
        found["library_name"] = "peft"
        hub_id = hub_id if facts.adapter.get("whole_base") else None
    if hub_id:
        relation = "adapter" if facts.alone else "finetune"
        found |= {"base_model": [hub_id], "base_model_relation": relation}
    data = [d.split("/", 3)[3] for d in facts.sources.get("prompts") or () if d.startswith("hf://")]
    if data:
        found["datasets"] = data
    found["tags"] = ["distillation", "synthetic", "raystill"]
    found["teacher_models"] = [teacher.name for teacher in facts.teachers()]
    return found


def licence_of(facts: Facts) -> str | None:
    """The student's licence: as stated, else the one terms that it must carry; None: not known."""
    stated = facts.terms.get("student_licence")
    carried = [value for kind, value in facts.duties if kind == "same_terms"]
    return stated or (carried[0] if len(carried) == 1 else None)


def notice(facts: Facts) -> str:
    """``NOTICE``: the lines that licences ask for, and who taught."""
    lines = [f"{title(facts)} was trained on text that these models wrote:", ""]
    for teacher in facts.teachers():
        route = f", reached through {teacher.route}" if teacher.route else ""
        lines.append(f"- {_line(teacher.name)} ({teacher.licence or 'licence not stated'}{route})")
    others = [m for m in facts.lineage.ancestors() if m not in facts.teachers()]
    if others:
        lines += ["", "These come from, or its weights began with:", ""]
        lines += [f"- {_line(m.name)} ({m.licence or 'licence not stated'})" for m in others]
    owed = [value for kind, value in facts.duties if kind in ("notice", "display")]
    if owed:
        lines += ["", *owed]
    credit = [f"Credit for its prompts: {value}." for k, value in facts.duties if k == "credit"]
    if credit:
        lines += ["", *credit]
    return "\n".join(lines) + "\n"


def _knowledge(facts: Facts) -> str:
    """Where the knowledge comes from: teachers, data, duties, and the readings behind them."""
    models = facts.lineage.models
    rows = facts.summary.get("rows_trained")
    lines = ["## Where this model's knowledge comes from", ""]
    for teacher in facts.teachers():
        lines.append(
            f"- Teacher: {_code(teacher.name)}, {_of(teacher.licence)}"
            + (f", reached through {_code(teacher.route)}" if teacher.route else "")
            + (f", revision {_code(teacher.revision)}" if teacher.revision else "")
        )
    base = models[facts.lineage.student].started_from
    if base is not None:
        lines.append(f"- First weights: {_code(models[base].name)}, {_of(models[base].licence)}")
    if facts.adapter:
        lines.append(_adapter(facts))
    prompts = ", ".join(map(_code, facts.sources.get("prompts") or ())) or "not recorded"
    under = ", ".join(map(_code, facts.sources.get("prompts_licences") or ()))
    stated = f" (under {under})" if under else ""
    lines.append(f"- Prompts: {prompts}{stated}; {rows} rows were trained on")
    others = [m for m in facts.lineage.ancestors() if m not in facts.teachers() and m.id != base]
    lines += [f"- Further back: {_code(m.name)}, {_of(m.licence)}" for m in others]
    lines += [
        "",
        "All answers that it was trained on are synthetic: AI models wrote them, namely "
        f"{_teachers(facts)}. The whole lineage is in `lineage.json`, a bill of materials "
        "(CycloneDX) in `bom.cdx.json`.",
    ]
    owed = [DUTIES.get(kind, kind + " {}").format(_code(value)) for kind, value in facts.duties]
    if owed:
        lines += ["", "As its sources' terms are read, this is owed by whoever hands it on:", ""]
        lines += [f"- {text}" for text in owed]
    readings = facts.terms.get("readings") or ()
    lines += ["", *(f"- {_code(r['id'])}: {_line(r['clause'])}" for r in readings)]
    lines += [f"- {_line(said)}" for said in facts.unknown]
    permission = facts.terms.get("permission")
    if permission:
        lines.append(
            f"- A letter permits {_code(permission['rule'])}: {_line(permission['reason'])} "
            f"(sha256 {_code(permission['sha256'])})"
        )
    return "\n".join(lines).rstrip()


def _adapter(facts: Facts) -> str:
    """What was trained beside the first weights, and where it is."""
    where = "this folder has it alone" if facts.alone else "this folder has it in the weights"
    part = "" if facts.adapter.get("whole_base") else ", of which a part was kept"
    identity = _code(str(facts.adapter.get("base_identity")))
    return (
        f"- Trained: {_line(adapter_text(facts.adapter))}; {where}. All other weights are those of "
        f"the model with the identity {identity}{part}"
    )


def _figures(facts: Facts) -> str:
    """A table of the last evaluation."""
    figures = facts.figures()
    rows = [f"| {words} | {figures[n]:.4g} |" for n, words in FIGURES.items() if n in figures]
    if not rows:
        return "## Figures\n\nThe run held out no prompts, so nothing was measured."
    bound = ((facts.summary.get("evaluation") or {}).get("after") or {}).get("bound")
    note = f"\n\nOver a {_line(str(bound))}." if bound else ""
    return (
        "\n".join(["## Figures", "", "On held-out prompts:", "", "| | |", "|---|---|", *rows])
        + note
    )


def _use(facts: Facts) -> str:
    purpose = facts.terms.get("purpose") or "not stated"
    handed = "to be handed on" if facts.terms.get("distributed") else "not to be handed on"
    verdict = facts.terms.get("verdict") or "not known"
    return (
        f"## Intended use\n\nDeclared for: {purpose}, {handed}. For this the terms of its sources "
        f"were read as: {verdict}. Readings are not legal advice, and are of their day."
    )


def _teachers(facts: Facts) -> str:
    return " and ".join(_code(teacher.name) for teacher in facts.teachers())


def _of(licence: str | None) -> str:
    return f"under {_code(licence)}" if licence else "licence not stated"


def _code(text: str | None) -> str:
    """A name as code, which Markdown does not read."""
    return f"`{_line(text or '').replace('`', chr(39))}`"


def _line(text: str) -> str:
    """A text in one line that begins no tag."""
    return " ".join(text.split()).replace("<", "‹").replace("|", "/")[:500]
