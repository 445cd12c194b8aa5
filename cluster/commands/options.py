"""The arguments and options of the driver's commands, as types that typer reads.

``driver.py`` is made of these. Imports nothing but typer, so that help comes at once.
"""

from typing import Annotated

import typer


def between_0_and_1(number: float) -> float:
    if not 0 < number < 1:
        raise typer.BadParameter(f"{number:g} is not between 0 and 1")
    return number


# Of several commands.
RunFile = Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="A.B=C",
        default_factory=list,
        show_default=False,
        help="Override a setting, e.g. training.rows_per_step=64 (read as YAML). Repeatable.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")
]

# run
SkipProbe = Annotated[
    bool,
    typer.Option(
        "--skip-probe",
        help="Do not compare the served teacher with the plain model.",
    ),
]

# check
Static = Annotated[bool, typer.Option("--static", help="Only what needs no cluster.")]

# calibrate
Positions = Annotated[
    int, typer.Option(min=1, metavar="N", help="Response positions compared, 16 an answer.")
]
Cosine = Annotated[
    float,
    typer.Option(
        metavar="C",
        callback=between_0_and_1,
        help="Cosine that a signal's gradient must have with the whole vocabulary's.",
    ),
]
TrainedStudent = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        show_default="the run's own, if it has finished",
        help="A trained student to compare beside the untrained one.",
    ),
]
AllObjectives = Annotated[
    bool,
    typer.Option("--all-objectives", help="Every divergence, not only those of the run file."),
]
Output = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", show_default="RUN_FOLDER/calibration", help="Where to write."),
]

# submit
Address = Annotated[
    str, typer.Option(metavar="URL", help="The cluster's dashboard, e.g. http://127.0.0.1:8265.")
]
WorkingDir = Annotated[str, typer.Option(metavar="FOLDER", help="The code that is shipped.")]
StopWait = Annotated[
    int,
    typer.Option(
        metavar="N", help="Seconds a stopped job has for its checkpoint before Ray kills it."
    ),
]
Variables = Annotated[
    list[str],
    typer.Option(
        "--env",
        metavar="NAME[=VALUE]",
        default_factory=list,
        show_default=False,
        help="A variable of the job; without a value this shell's, e.g. HF_TOKEN. Repeatable.",
    ),
]
Python = Annotated[
    str, typer.Option(metavar="COMMAND", help="The cluster's Python with the pinned packages.")
]

# report
RunFolders = Annotated[
    list[str], typer.Argument(metavar="RUN_FOLDER", help="One or more, e.g. runs/quickstart.")
]
ReportPage = Annotated[
    str | None,
    typer.Option(
        "--html",
        metavar="FILE",
        show_default="RUN_FOLDER/report.html, of several comparison.html",
        help="Where to write the page.",
    ),
]

# draft
RunFolder = Annotated[
    str, typer.Argument(metavar="RUN_FOLDER", help="A finished run, e.g. runs/quickstart.")
]
DraftTokens = Annotated[
    list[int],
    typer.Option(
        "--k",
        min=1,
        max=8,
        metavar="K",
        default_factory=lambda: [1, 2, 4, 8],
        show_default="1, 2, 4 and 8",
        help="Drafted tokens at a time, 1 to 8; an engine is started for each. Repeatable.",
    ),
]
DraftRows = Annotated[
    int, typer.Option(min=1, metavar="N", help="Held-out prompts, at most so many.")
]
Concurrency = Annotated[
    int, typer.Option(min=1, metavar="N", help="Answers that are written at once.")
]

# store
StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder or URI, e.g. runs/teacher_store.")
]
Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="IDENTITY",
        help="Remove also all answers of this teacher (the first digits of its identity).",
    ),
]
OfTeacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="IDENTITY",
        help="Only this teacher's answers (the first digits of its identity).",
    ),
]
ImportFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES", help="JSONL or Parquet files, folders, globs or URIs, with responses."
    ),
]
TeacherRun = Annotated[
    str,
    typer.Option(
        "--teacher",
        metavar="RUN.yaml",
        help="The run file whose teacher has written the answers: model, sampling, prompts.system.",
    ),
]
ExportFolder = Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")]
ExportFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="trl|distillkit",
        help="trl: messages, ids and logprobs. distillkit: ids and top-K for its trainer.",
    ),
]
TokenizerFolder = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        show_default="the teacher's name in the store",
        help="Folder or Hub id whose tokenizer and chat template read the prompts.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]

NamedTeacher = Annotated[
    str | None,
    typer.Option("--teacher", metavar="NAME", help="Which of the run's several teachers."),
]
NamedOfRun = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Which of the run file's several teachers."),
]

# lineage
StudentFolder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="A student's folder, or that of a finished run.")
]

# push
Repository = Annotated[
    str | None,
    typer.Option("--to", metavar="OWNER/NAME", help="Repository. Default: output.hub.repo."),
]
Public = Annotated[bool, typer.Option("--public", help="Let everybody read a new repository.")]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace the files of a repository that has others.")
]

# revoke
RevokedTeacher = Annotated[
    str,
    typer.Option(
        "--teacher",
        metavar="TEACHER",
        help="Its name in the store, or the first digits of its identity.",
    ),
]
RunsFolders = Annotated[
    list[str],
    typer.Option(
        "--runs",
        metavar="FOLDER",
        default_factory=list,
        show_default="the folder that the store is in",
        help="Where run folders are. Repeatable.",
    ),
]

# fields
Section = Annotated[
    str | None,
    typer.Argument(metavar="SECTION", help="Only these, e.g. teacher or teacher.sampling."),
]
Schema = Annotated[
    bool, typer.Option("--schema", help="Print the JSON schema by which editors complete a file.")
]
