"""The command ``report``: the closing table on the terminal, and the page of one run or several.

Reads run folders; needs no cluster.
"""

from collections.abc import Callable, Sequence

from raystill.base import formatting
from raystill.base.console import open_named
from raystill.base.errors import RunError
from raystill.base.run_folder import SUMMARY, require_path
from raystill.cluster.commands.as_json import print_totals
from raystill.cluster.report import tables
from raystill.cluster.report.page.page import write_page


def report_command(
    paths: Sequence[str], as_json: bool, html: str | None, say: Callable[[str], None]
) -> int:
    """Write the page and print the tables; the exit status.

    html: where to write the page; None: into the (first) run folder. With ``as_json`` only the
    totals are printed, and the page is written only where ``html`` names its place. A run that has
    not ended has a page and no table.

    Raises RunError for a folder that holds no run, and where the page cannot be written and
    ``html`` had named its place.
    """
    folders = [open_named(path) for path in paths]
    html = None if html is None else require_path(html)
    if as_json:
        print_totals(folders)
        if html is not None:
            write_page(folders, html)
        return 0
    without_end = [folder for folder in folders if not folder.exists(SUMMARY)]
    try:
        page = f"The page: {formatting.path(write_page(folders, html))}"
        named_by_table = html is None and len(folders) == 1 and not without_end
    except OSError as error:  # Of somebody else's run the table can still be read.
        page = f"the page cannot be written ({error}); name a place with --html FILE"
        named_by_table = False
        if html is not None:
            raise RunError(page) from error
    for folder in without_end:
        say(f"{formatting.path(folder.path)} has no {SUMMARY}: no start of this run has ended yet")
    ended = [folder for folder in folders if folder not in without_end]
    if len(ended) == 1:
        tables.print_report(ended[0])
    elif ended:
        tables.print_comparison(ended)
    if not named_by_table:
        say(page)
    return 0
