"""What a run had the teacher do, counted from the segments themselves."""

from collections import Counter

from raystill.datasets.store.store import Catalogue, RowCounts


def rows_requested_by(catalogue: Catalogue, run: str) -> dict[str, RowCounts]:
    """Rows in the store that ``run`` requested, by purpose (training, evaluation)."""
    rows: Counter[tuple[str, bool]] = Counter()
    for entry in catalogue.entries:
        for group in entry.footer.groups:
            if group.run == run:
                rows[group.purpose, group.scored] += group.rows
    return {p: RowCounts(rows[p, False], rows[p, True]) for p in ("training", "evaluation")}
