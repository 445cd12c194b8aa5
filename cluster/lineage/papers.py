"""The papers of a finished student: model card, NOTICE, bill of materials, lineage.

They are made of the run folder's manifest and summary alone, after the last step, and lie beside
the weights: ``README.md``, ``NOTICE``, ``bom.cdx.json``, ``lineage.json``. An adapter gets its own.
"""

import json
from collections.abc import Callable

from raystill.base.run_folder import ADAPTER, STUDENT, RunFolder
from raystill.cluster.lineage.bom import bill_of_materials
from raystill.cluster.lineage.card import model_card, notice
from raystill.cluster.lineage.facts import BOM, CARD, NOTICE, facts_of
from raystill.cluster.lineage.graph import LINEAGE


def leave_papers(folder: RunFolder, tell: Callable[[str], None]) -> None:
    """Write the papers of a run's student, if it has one; tell why that was not possible.

    The student is there and whole by then, so a failure here is no failure of the run.
    """
    if not folder.exists(STUDENT):
        return
    try:
        write_papers(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        tell(f"note: the student's papers (model card, lineage) could not be written ({reason})")


def write_papers(folder: RunFolder) -> None:
    """Write the papers into the student's folder, and into its adapter's. Raises OSError."""
    for part in (STUDENT, ADAPTER):
        if part == ADAPTER and not folder.exists(ADAPTER):
            continue
        facts = facts_of(folder, part)
        folder.write_text(f"{part}/{LINEAGE}", facts.lineage.to_json())
        folder.write_text(f"{part}/{BOM}", json.dumps(bill_of_materials(facts), indent=2) + "\n")
        folder.write_text(f"{part}/{NOTICE}", notice(facts))
        folder.write_text(f"{part}/{CARD}", model_card(facts))
