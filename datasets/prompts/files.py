"""Find the files of each source of prompts: paths, folders, globs and URIs.

Globs of URIs are matched here and not by fsspec (over pyarrow's ``ArrowFSWrapper``): there ``*``
stops at a ``/``, while run files rely on ``s3://bucket/prompts/*.jsonl`` to find what is in folders
below, too; and it lists an object store folder by folder, where pyarrow lists all at once.
"""

import csv
import difflib
import fnmatch
import glob
import io
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raystill.base.errors import Problem
from raystill.base.object_store import in_time
from raystill.base.run_folder import resolve_input, split_query
from raystill.config.prompts import PromptsConfig, SourceConfig
from raystill.datasets.rows.unpacked import unpacked_bytes

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
LONGEST_LINE, LONGEST_TEXT = 32 << 20, 512 << 20
"""Characters of one line, and of a file that is one JSON list."""
LEAST_BOMB, BOMB_RATIO = 256 << 20, 300
BOMB = f"it unpacks to more than {BOMB_RATIO} times its size"
"""Why a file that is made to fill a memory or a disk is not read."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
GLOB_SIGNS = frozenset("*?[")
URI_SIGNS = "/%:@!$&'()*+,;=~[]"
"""Characters of a URI's path that pyarrow takes as they are; others are percent-encoded for it."""


@dataclass(frozen=True)
class PromptSource:
    """Some files of prompts, and which fields of their rows are read.

    ``where``: dotted key of its settings. ``name``: None where ``prompts.path`` is set; each row
    then names its source in ``source_field``. ``columns``: further fields that are kept.
    ``teacher`` answers its rows, unless they name another in ``teacher_field``.
    """

    where: str
    name: str | None
    paths: tuple[str, ...]
    format: str
    prompt_field: str
    messages_field: str
    response_field: str | None
    source_field: str
    limit: int | None
    columns: tuple[str, ...] = ()
    teacher_messages_field: str | None = None
    teacher: str | None = None
    teacher_field: str | None = None
    replace_answers: bool = False

    def problem(self, message: str) -> Problem:
        """A problem of its ``path``."""
        return Problem(f"{self.where}.path", self.labelled(message))

    def labelled(self, text: str) -> str:
        """The text with the source's name before it, if it has one."""
        return text if self.name is None else f"source {self.name!r}: {text}"


def prompt_sources(prompts: PromptsConfig, columns: Sequence[str] = ()) -> list[PromptSource]:
    """The sources in reading order; for ``prompts.path`` a single one without a name."""

    def source(where: str, name: str | None, own: PromptsConfig | SourceConfig) -> PromptSource:
        assert own.path is not None, f"{where} has no path"
        return PromptSource(
            where=where,
            name=name,
            paths=(own.path,) if isinstance(own.path, str) else own.path,
            format=own.format or prompts.format,
            prompt_field=own.prompt_field or prompts.prompt_field,
            messages_field=own.messages_field or prompts.messages_field,
            response_field=own.response_field or prompts.response_field,
            source_field=prompts.source_field,
            limit=own.limit,
            columns=tuple(columns),
            teacher_messages_field=own.teacher_messages_field or prompts.teacher_messages_field,
            teacher=own.teacher if isinstance(own, SourceConfig) else None,
            teacher_field=prompts.teacher_field,
            replace_answers=prompts.replace_answers,
        )

    if prompts.sources is None:
        return [source("prompts", None, prompts)]
    return [
        source(f"prompts.sources.{number}", own.name, own)
        for number, own in enumerate(prompts.sources)
    ]


class BoundedLines(io.TextIOWrapper):
    """A text by lines, or whole; OSError for one without end, or in the place of what is meant."""

    _number, _read, most = 0, 0, math.inf

    def __next__(self) -> str:  # type: ignore[override]
        line = self.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self._number += 1
        if len(line) > LONGEST_LINE:
            raise OSError(f"line {self._number} has more than {LONGEST_LINE:,} characters")
        if self._number == 1:
            _require_itself(line)
        return line

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        """A line, or so many characters of it."""
        line = super().readline(size)
        self._read += len(line)
        if self._read > self.most:
            raise OSError(BOMB)
        return line

    def read(self, size: int | None = -1, /) -> str:
        """The whole text, or so many characters of it."""
        if size is not None and size >= 0:
            return super().read(size)
        text = super().read(LONGEST_TEXT + 1)
        if len(text) > self.most:
            raise OSError(BOMB)
        if len(text) > LONGEST_TEXT:
            raise OSError(f"it has more than {LONGEST_TEXT:,} characters; write it as JSONL")
        _require_itself(text[:100])
        return text


OTHER_KINDS = {
    "\x1f\x8b": ("it is compressed by gzip", "let its name end in .gz"),
    "\x28\xb5\x2f\xfd": ("it is compressed by zstd", "let its name end in .zst"),
    "BZh91AY&SY": ("it is compressed by bzip2", "let its name end in .bz2"),
    "\xfd7zXZ": ("it is compressed by xz", "decompress it"),
    "PK\x03\x04": ("it is a ZIP archive or a spreadsheet", "unpack it, or save it as CSV"),
    "PAR1": ("it is a Parquet file", "let its name end in .parquet"),
    "%PDF-": ("it is a PDF document", "save its text"),
    "\xff\xfe": ("it is UTF-16 text", "save it as UTF-8"),
    "\xfe\xff": ("it is UTF-16 text", "save it as UTF-8"),
}
"""What a file is that begins so, and what to do with it; bytes as Latin-1."""
LONGEST_SIGN = 1000
UNREADABLE = (OSError, UnicodeDecodeError, pa.ArrowException, csv.Error)
"""What a file raises that is not what its name says."""


def why_unreadable(format: str, error: Exception, remedy: str = "repair the file") -> str:
    """That a file cannot be read as this format, why by one of UNREADABLE, and what to do."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        begin = error.object[:16].decode("latin-1")
        kinds = (kind for sign, kind in OTHER_KINDS.items() if begin.startswith(sign))
        reason, remedy = next(kinds, (f"it is not UTF-8: {reason}", "save it as UTF-8"))
    return f"cannot be read as {format} ({reason}); {remedy}"


def _require_itself(begin: str) -> None:
    """OSError for the beginning of a text that is another file than its name says."""
    _refuse_kind(begin)
    if "\0" in begin[:LONGEST_SIGN]:
        raise OSError("it has NUL characters, as UTF-16 and binary files have; save it as UTF-8")


def _refuse_kind(begin: str) -> None:
    """OSError for the beginning of a file of `OTHER_KINDS`, or of one that was not fetched."""
    if begin.startswith("version https://git-lfs.github.com/spec/"):
        raise OSError("it is a Git LFS pointer and not the file; run `git lfs pull` in its folder")
    if begin.lstrip().lower().startswith("<!doctype html"):
        raise OSError("it is a web page, an error or a log-in; fetch the file again")
    for sign, (kind, remedy) in OTHER_KINDS.items():
        if begin.startswith(sign):
            raise OSError(f"{kind}; {remedy}")


@dataclass(frozen=True)
class PromptFile:
    """One file of prompts: its name for messages, its source, its format, and where it is.

    ``globbed``: it was found by a glob or in a folder, so that it may be empty.
    """

    name: str
    source: PromptSource
    format: str
    filesystem: pafs.FileSystem
    path: str
    globbed: bool

    def open_bytes(self) -> pa.NativeFile:
        """Open it as a seekable file."""
        return self.filesystem.open_input_file(self.path)

    def batches(
        self, stream: pa.NativeFile, rows: int, columns: Collection[str | None] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Rows of a Parquet file. OSError for another kind, or a bomb; ArrowException."""
        try:
            parquet = pq.ParquetFile(stream)
        except pa.ArrowException:
            stream.seek(0)
            begin = stream.read(LONGEST_SIGN).decode("latin-1")
            if not begin.startswith("PAR1"):
                _refuse_kind(begin)
            raise
        names = columns and [name for name in parquet.schema_arrow.names if name in columns]
        left = max(LEAST_BOMB, BOMB_RATIO * stream.size())
        for batch in parquet.iter_batches(rows, columns=names):
            left -= sum(map(unpacked_bytes, batch.columns))
            if left < 0:
                raise OSError(BOMB)
            yield batch

    def open_text(self, newline: str | None = None, errors: str = "strict") -> io.TextIOWrapper:
        """Open it as UTF-8 text, decompressed if its name ends in .gz, .zst or .bz2."""
        compression = COMPRESSIONS.get(os.path.splitext(self.path)[1])
        stream = self.filesystem.open_input_stream(self.path, compression=compression)
        lines = BoundedLines(stream, "utf-8-sig", errors, newline)
        if compression is not None:
            size = self.filesystem.get_file_info(self.path).size or 0
            lines.most = max(LEAST_BOMB, BOMB_RATIO * size)
        return lines


def find_files(source: PromptSource) -> tuple[list[PromptFile], list[Problem]]:
    """The files that the source's ``path`` names, in order, and the problems with the others."""
    files: list[PromptFile] = []
    problems: list[Problem] = []
    if not source.paths:
        problems.append(source.problem("is empty; name at least one file"))
    for pattern in source.paths:
        try:
            filesystem, paths, globbed = _expand(pattern)
        except TimeoutError as error:
            told = "see to the address, the connection and the credentials"
            problems.append(source.problem(f"{pattern!r} cannot be opened: {error}; {told}"))
            break  # Each of the others would be waited for as long.
        except (OSError, pa.ArrowException, ImportError, ValueError) as error:
            problems.append(source.problem(f"{pattern!r} cannot be opened: {error}"))
            continue
        if not paths:
            problems.append(source.problem(_not_found(pattern, globbed)))
        for path in paths:
            format = source.format if source.format != "auto" else format_of(path)
            name = path if "://" not in pattern else f"{pattern.split('://')[0]}://{path}"
            if format is None:
                endings = ", ".join(FORMATS)
                problems.append(
                    source.problem(f"{name!r} ends in none of {endings}; set {source.where}.format")
                )
                continue
            files.append(
                PromptFile(source.labelled(name), source, format, filesystem, path, globbed)
            )
    return files, problems


def would_read(source: PromptSource, written: str) -> bool:
    """Whether the source would read this file too, once it is there: an absolute path or URI."""
    for pattern in source.paths:
        plain, uri = split_query(pattern)[0], "://" in pattern
        globbed = bool(GLOB_SIGNS & set(plain))
        if uri != ("://" in written):
            continue
        if uri:
            below = written.startswith(f"{plain.rstrip('/')}/") and format_of(written) is not None
            if fnmatch.fnmatchcase(written, plain) if globbed else below:
                return True
        elif not globbed:
            here = os.path.abspath(resolve_input(plain)) == os.path.dirname(written)
            if here and format_of(written) is not None:
                return True
        elif _glob_matches(written.split("/"), os.path.abspath(_glob_base(plain)).split("/")):
            return True
    return False


def _glob_matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether ``glob`` finds a path by a recursive pattern, both cut at each "/"."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rests = (parts[number:] for number in range(len(parts) + 1))
        return any(_glob_matches(rest, pattern[1:]) for rest in rests)
    if not parts or not fnmatch.fnmatchcase(parts[0], pattern[0]):
        return False
    return _glob_matches(parts[1:], pattern[1:])


def format_of(path: str) -> str | None:
    """The format by the ending of a file's name, None for an unknown one."""
    stem, ending = os.path.splitext(path)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    return FORMATS.get(ending.lower())


def _expand(pattern: str) -> tuple[pafs.FileSystem, list[str], bool]:
    """The file system, the files that a path, folder, glob or URI names, and whether it may name
    several.
    """
    if "://" in pattern:
        return _expand_uri(pattern)
    globbed = bool(GLOB_SIGNS & set(pattern))
    local = pafs.LocalFileSystem()
    path = resolve_input(pattern) if not globbed else _glob_base(pattern)
    if globbed:
        return local, sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p)), True
    if os.path.isdir(path):
        inside = (os.path.join(path, name) for name in sorted(os.listdir(path)))
        return local, [p for p in inside if os.path.isfile(p) and format_of(p)], True
    return local, [path] if os.path.isfile(path) else [], False


def _glob_base(pattern: str) -> str:
    """The glob with ~ expanded; a relative one below $RAYSTILL_HOME if that has matching files."""
    pattern = os.path.expanduser(pattern)
    home = os.environ.get("RAYSTILL_HOME")
    if home and not os.path.isabs(pattern):
        below_home = os.path.join(home, pattern)
        if glob.glob(below_home, recursive=True):
            return below_home
    return pattern


def _expand_uri(uri: str) -> tuple[pafs.FileSystem, list[str], bool]:
    """:func:`_expand` for a URI. Raises pyarrow's errors, and ValueError for a glob of buckets."""
    is_hub = uri.startswith("hf://")
    plain, query = (uri, "") if is_hub else split_query(uri)
    scheme, _, whole = plain.partition("://")
    bucket, *parts = whole.split("/")
    if GLOB_SIGNS & set(bucket.rpartition("@")[2]):
        raise ValueError("a glob sign is in the bucket's name; name one bucket")
    signs = [number for number, part in enumerate(parts) if GLOB_SIGNS & set(part)]
    base = whole if not signs else "/".join([bucket, *parts[: signs[0]], ""])
    if is_hub:
        from huggingface_hub import HfFileSystem  # Late: half a second, seldom needed.

    def look() -> tuple[pafs.FileSystem, str, pafs.FileInfo]:
        if is_hub:
            filesystem, path = pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem())), base
        else:
            name = f"{scheme}://{quote(base, safe=URI_SIGNS)}{query}"
            filesystem, path = pafs.FileSystem.from_uri(name)
        return filesystem, path, filesystem.get_file_info(path.rstrip("/") or "/")

    # One thing is asked first: a list of many files may take longer than a store has to answer.
    filesystem, path, info = in_time(look)
    if signs:
        base = path.rstrip("/")
        rest = parts[signs[0] :] if is_hub else map(_unquoted, parts[signs[0] :])
        pattern = "/".join([glob.escape(base), *rest])
        paths = _files_below(filesystem, base or "/")
        return filesystem, [p for p in paths if fnmatch.fnmatchcase(p, pattern)], True
    if info.type == pafs.FileType.Directory:
        return filesystem, [p for p in _files_below(filesystem, path) if format_of(p)], True
    return filesystem, [path] if info.type == pafs.FileType.File else [], False


def _unquoted(part: str) -> str:
    """A part of a URI's glob with percent-encoded characters decoded, and escaped for the glob."""
    return re.sub(r"(?:%[0-9A-Fa-f]{2})+", lambda signs: glob.escape(unquote(signs[0])), part)


def _files_below(filesystem: pafs.FileSystem, base: str) -> list[str]:
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    return sorted(info.path for info in infos if info.type == pafs.FileType.File)


def _not_found(pattern: str, globbed: bool) -> str:
    if globbed:
        return f"nothing matches {pattern!r}; name files or a glob that matches some"
    folder, name = os.path.split(resolve_input(pattern))
    if "://" not in pattern and os.path.exists(os.path.join(folder, name)):
        return f"{pattern!r} is a device or pipe; name a file with the prompts"
    if "://" not in pattern and os.path.isdir(folder or "."):
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
        if near:
            return f"no such file: {pattern!r}; did you mean {os.path.join(folder, near[0])!r}?"
    return f"no such file: {pattern!r} (looked in {os.getcwd()}); name the prompts' file"
