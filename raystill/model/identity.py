"""The teacher's identity: one sha256 over its weights, configuration and tokenizer.

Where it sits: part of every answer's key and of the manifest. Two models that differ in one
number have different identities; a copy in another folder has the same one. Imports no torch.

Weights fetched from the Hub are not read: the hub cache names each file by its content's sha256.
Local files are read once; their hashes are cached by path, size and modification time.
"""

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from os import PathLike
from pathlib import Path

from raystill.config.teacher import TeacherConfig

WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
OTHER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
LFS_BLOB = re.compile(r"[0-9a-f]{64}")
CHUNK_BYTES = 4 * 1024 * 1024


def teacher_identity(folder: str | PathLike[str]) -> str:
    """Hexadecimal sha256 that names the model in ``folder``; the folder's own name has no part.

    Raises:
        ValueError: the folder holds no weights or no config.json.
    """
    files = identity_files(Path(folder))
    cache = _HashCache()
    listing = [[path.name, _content_sha256(path, cache)] for path in files]
    cache.save()
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def identity_of_teacher(teacher: TeacherConfig, folder: str | PathLike[str]) -> str:
    """``teacher_identity`` for a model; of the synthetic engine, a hash of what it answers by."""
    if teacher.engine == "synthetic":
        answers_by = teacher.synthetic.model_dump(exclude={"delay_s", "poison_token"})
        return hashlib.sha256(json.dumps(["synthetic", answers_by]).encode()).hexdigest()
    return teacher_identity(folder)


def identity_files(folder: Path) -> list[Path]:
    """The files the identity covers, by name; safetensors alone where there are any."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    weights: list[str] = []
    for ending in WEIGHT_ENDINGS:
        weights = [name for name in names if name.endswith(ending)]
        if weights:
            break
    if not weights or "config.json" not in names:
        missing = "config.json" if weights else "weights (*.safetensors)"
        raise ValueError(
            f"{folder} holds no {missing}, expected a Hugging Face model folder; "
            "set teacher.model to one, or to a Hub id"
        )
    return [folder / name for name in [*weights, *(n for n in OTHER_FILES if n in names)]]


def _content_sha256(path: Path, cache: "_HashCache") -> str:
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and LFS_BLOB.fullmatch(real.name):
        return real.name
    known = cache.get(real)
    if known is None:
        digest = hashlib.sha256()
        with open(real, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        known = digest.hexdigest()
        cache.put(real, known)
    return known


class _HashCache:
    """Hashes of files by path, size and modification time, kept under the user's cache folder."""

    def __init__(self) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = root / "raystill" / "file_hashes.json"
        self._changed = False
        self._entries: dict[str, str] = {}
        with suppress(OSError, ValueError):
            self._entries = dict(json.loads(self._path.read_text(encoding="utf-8")))

    @staticmethod
    def _key(path: Path) -> str:
        status = path.stat()
        return f"{path}|{status.st_size}|{status.st_mtime_ns}"

    def get(self, path: Path) -> str | None:
        return self._entries.get(self._key(path))

    def put(self, path: Path, sha256: str) -> None:
        self._entries[self._key(path)] = sha256
        self._changed = True

    def save(self) -> None:
        """Write what is new; a cache that cannot be written only costs time."""
        if not self._changed:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, delete=False, encoding="utf-8"
            ) as file:
                json.dump(self._entries, file)
            os.replace(file.name, self._path)
