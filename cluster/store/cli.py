"""``driver.py store ...``: the commands on a teacher store, as typer reads them.

Imports nothing but typer; a command imports what it needs when it is called.
"""

import typer

from raystill.cluster.commands import options

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.command("list")
def list_store(path: options.StorePath, as_json: options.AsJson = False) -> int:
    """Show teachers, signals, rows and sizes."""
    return on_store("list", path, as_json)


@app.command("verify")
def verify_store(path: options.StorePath, as_json: options.AsJson = False) -> int:
    """Read all and compare it with its checksums.

    Exit status: 1 some of it is damaged, 3 cannot be read at the moment, 4 is of a newer version.
    """
    return on_store("verify", path, as_json)


@app.command("compact")
def compact_store(path: options.StorePath, as_json: options.AsJson = False) -> int:
    """Merge small segments and leave duplicates out.

    Runs may read and write the store meanwhile.
    """
    return on_store("compact", path, as_json)


@app.command("prune")
def prune_store(
    path: options.StorePath,
    teacher: options.Teacher = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> int:
    """Remove what is damaged.

    What cannot be read at the moment or is of a newer version stays. Runs may read and write the
    store meanwhile. The exit status is that of 'verify' afterwards.
    """
    return on_store("prune", path, as_json, teacher, dry_run)


@app.command("export")
def export_store(
    path: options.StorePath,
    out: options.ExportFolder,
    form: options.ExportFormat = "trl",
    teacher: options.OfTeacher = None,
    model: options.TokenizerFolder = None,
    as_json: options.AsJson = False,
) -> int:
    """Write the answers as a Hugging Face data set.

    Parquet files and a card in a new folder, which appears whole or not at all.
    """
    from raystill.cluster.store.exchange import Export, export_command

    return export_command(Export(path, out, form, teacher, model), as_json)


@app.command("import")
def import_store(
    path: options.StorePath,
    files: options.ImportFiles,
    teacher: options.TeacherRun,
    overrides: options.Overrides,
    name: options.NamedOfRun = None,
    as_json: options.AsJson = False,
) -> int:
    """Take answers from files into the store.

    A run of that teacher, with these sampling settings, finds them as if it had paid for them.
    """
    from raystill.cluster.store.exchange import import_command

    return import_command(path, files, (teacher, name), overrides, as_json)


def on_store(
    action: str, path: str, as_json: bool, teacher: str | None = None, dry_run: bool = False
) -> int:
    from raystill.cluster.commands.store import store_command

    return store_command(action, path, teacher, dry_run, as_json)
