"""Which files hold the prompts: sources, and their paths, globs, folders and URIs."""

import difflib
import fnmatch
import glob
import io
import os
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs

from raystill.base.errors import Problem
from raystill.base.run_folder import resolve_input, split_query
from raystill.config.prompts import PromptsConfig, SourceConfig

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
GLOB_SIGNS = frozenset("*?[")
URI_SIGNS = "/%:@!$&'()*+,;=~[]"  # what of a URI's path is not percent-encoded for pyarrow


@dataclass(frozen=True)
class PromptSource:
    """What is read in one go: some files, and how their rows are to be understood.

    ``where`` is the dotted key of its settings. ``name`` is None where ``prompts.path`` is set:
    each row then says in ``source_field`` what source it is of.
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

    def problem(self, message: str) -> Problem:
        """Something wrong with ``path``."""
        return Problem(f"{self.where}.path", self.of(message))

    def of(self, text: str) -> str:
        """The text with the source's name before it, if it has one."""
        return text if self.name is None else f"source {self.name!r}: {text}"


def prompt_sources(prompts: PromptsConfig) -> list[PromptSource]:
    """The sources in the order they are read in; one without a name for ``prompts.path``."""

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
        )

    if prompts.sources is None:
        return [source("prompts", None, prompts)]
    return [
        source(f"prompts.sources.{number}", own.name, own)
        for number, own in enumerate(prompts.sources)
    ]


@dataclass(frozen=True)
class PromptFile:
    """One file: its name as shown, its source, its format, and where to open it."""

    name: str
    source: PromptSource
    format: str
    filesystem: pafs.FileSystem
    path: str
    globbed: bool

    def open_bytes(self) -> pa.NativeFile:
        """A seekable input."""
        return self.filesystem.open_input_file(self.path)

    def open_text(self, newline: str | None = None) -> io.TextIOWrapper:
        """UTF-8 text, unpacked if the name ends in .gz, .zst or .bz2."""
        compression = COMPRESSIONS.get(os.path.splitext(self.path)[1])
        stream = self.filesystem.open_input_stream(self.path, compression=compression)
        return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def find_files(source: PromptSource) -> tuple[list[PromptFile], list[Problem]]:
    """Every file that the source's ``path`` names, in order, and what of it was not found."""
    files: list[PromptFile] = []
    problems: list[Problem] = []
    if not source.paths:
        problems.append(source.problem("is empty; name at least one file"))
    for pattern in source.paths:
        try:
            filesystem, found, globbed = _expand(pattern)
        except (OSError, pa.ArrowException, ImportError, ValueError) as error:
            problems.append(source.problem(f"{pattern!r} cannot be opened: {error}"))
            continue
        if not found:
            problems.append(source.problem(_not_found(pattern, globbed)))
        for path in found:
            kind = source.format if source.format != "auto" else format_of(path)
            name = path if "://" not in pattern else f"{pattern.split('://')[0]}://{path}"
            if kind is None:
                endings = ", ".join(FORMATS)
                problems.append(
                    source.problem(f"{name!r} ends in none of {endings}; set {source.where}.format")
                )
                continue
            files.append(PromptFile(source.of(name), source, kind, filesystem, path, globbed))
    return files, problems


def format_of(path: str) -> str | None:
    """The format a file name's ending stands for."""
    stem, ending = os.path.splitext(path)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1]
    return FORMATS.get(ending.lower())


def _expand(pattern: str) -> tuple[pafs.FileSystem, list[str], bool]:
    """The file system, the files a path, folder or glob stands for, and whether it was no file."""
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
    """A relative glob looks in $RAYSTILL_HOME first, if it finds anything there, then here."""
    pattern = os.path.expanduser(pattern)
    home = os.environ.get("RAYSTILL_HOME")
    if home and not os.path.isabs(pattern):
        there = os.path.join(home, pattern)
        if glob.glob(there, recursive=True):
            return there
    return pattern


def _expand_uri(uri: str) -> tuple[pafs.FileSystem, list[str], bool]:
    """The same for a URI. Raises what pyarrow does, and ValueError for a glob of buckets."""
    is_hub = uri.startswith("hf://")
    plain, query = (uri, "") if is_hub else split_query(uri)
    scheme, _, whole = plain.partition("://")
    bucket, *parts = whole.split("/")
    if GLOB_SIGNS & set(bucket.rpartition("@")[2]):
        raise ValueError("a glob sign stands in the bucket's name; name one bucket")
    signs = [number for number, part in enumerate(parts) if GLOB_SIGNS & set(part)]
    base = whole if not signs else "/".join([bucket, *parts[: signs[0]], ""])
    if is_hub:
        from huggingface_hub import HfFileSystem  # imported late: half a second, seldom needed

        filesystem, path = pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem())), base
    else:
        filesystem, path = pafs.FileSystem.from_uri(
            f"{scheme}://{quote(base, safe=URI_SIGNS)}{query}"
        )
    if signs:
        base = path.rstrip("/")
        rest = parts[signs[0] :] if is_hub else map(_unquoted, parts[signs[0] :])
        pattern = "/".join([glob.escape(base), *rest])
        found = _files_below(filesystem, base or "/")
        return filesystem, [p for p in found if fnmatch.fnmatchcase(p, pattern)], True
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        return filesystem, [p for p in _files_below(filesystem, path) if format_of(p)], True
    return filesystem, [path] if info.type == pafs.FileType.File else [], False


def _unquoted(part: str) -> str:
    """A part of a URI's glob with its percent-encoded signs as they are, meaning themselves."""
    return re.sub(r"(?:%[0-9A-Fa-f]{2})+", lambda signs: glob.escape(unquote(signs[0])), part)


def _files_below(filesystem: pafs.FileSystem, base: str) -> list[str]:
    selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    return sorted(info.path for info in infos if info.type == pafs.FileType.File)


def _not_found(pattern: str, globbed: bool) -> str:
    if globbed:
        return f"nothing matches {pattern!r}; name files or a glob that matches some"
    folder, name = os.path.split(resolve_input(pattern))
    if "://" not in pattern and os.path.isdir(folder or "."):
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
        if near:
            return f"no such file: {pattern!r}; did you mean {os.path.join(folder, near[0])!r}?"
    return f"no such file: {pattern!r} (looked in {os.getcwd()}); name the prompts' file"
