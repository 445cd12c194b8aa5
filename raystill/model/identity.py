"""The teacher's identity: one sha256 over its weights, configuration, tokenizer and own code.

It is part of every answer's key and of the manifest. Models that differ in one number have
different identities; a copy in another folder has the same one. Imports no torch.

Weights from the Hub are not read again: the Hub's cache names each such file by the sha256 of its
content. Local files are read once; their hashes are cached by path, size and modification time.
"""

import hashlib
import json
import os
import platform
import re
import tempfile
from contextlib import suppress
from os import PathLike
from pathlib import Path

from raystill.base.records import read_bounded
from raystill.config.teacher import TeacherConfig
from raystill.model.files import LARGEST_FILE, read_object

WEIGHT_ENDINGS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
OTHER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
QUANT_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""How the weights are quantised, where config.json does not say (or in part: the first)."""
LFS_BLOB = re.compile(r"[0-9a-f]{64}")


def teacher_identity(folder: str | PathLike[str], *, own_code: bool = False) -> str:
    """Return the identity of the model in ``folder``, a hexadecimal sha256.

    It covers the names of the files and their contents, not the folder's own name. ``own_code``:
    the engine runs Python files of the folder, so they are covered too. Raises ValueError if the
    folder has no weights or no config.json.
    """
    files = identity_files(Path(folder), own_code=own_code)
    cache = _HashCache()
    listing = [[path.name, _content_sha256(path, cache)] for path in files]
    cache.save()
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def identity_of_teacher(teacher: TeacherConfig, folder: str | PathLike[str]) -> str:
    """Return `teacher_identity`; for the engines without a model a hash of what answers by.

    That is the settings of the synthetic engine, or service, model and tokenizer of an API.
    """
    if teacher.engine == "synthetic":
        answers_by = teacher.synthetic.model_dump(exclude={"delay_s", "poison_token"})
        return hashlib.sha256(json.dumps(["synthetic", answers_by]).encode()).hexdigest()
    if teacher.engine == "api":
        api = teacher.api
        asked = ["api", api.base_url, api.model, api.extra_body]
        # The same text has other ids with another tokenizer.
        if api.ids:  # Asked by ids, no chat template of the service is between.
            asked.append("ids")
        if api.top_logprobs is not None:  # Answers without a signal cannot be given one later.
            asked.append("top_logprobs")
        vocabulary = read_bounded(Path(folder) / "tokenizer.json", LARGEST_FILE)
        asked.append(hashlib.sha256(vocabulary).hexdigest())
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return teacher_identity(folder, own_code=teacher.trust_remote_code)


def keyed_dtype(teacher: TeacherConfig, folder: str | PathLike[str]) -> str:
    """Return the precision that stands in the keys of the answers of the model in ``folder``.

    ``auto`` is the checkpoint's own precision: as vLLM reads it from ``config.json``, where that of
    a multimodal model's ``text_config`` comes second. It stays ``auto`` where that is not known,
    and where it is float32: vLLM then runs bfloat16 or float16, whichever the device has, and the
    key of a stated float32 would be wrong.
    """
    if teacher.engine == "api":
        return "unknown"
    if teacher.dtype != "auto":
        return teacher.dtype
    whole = read_object(Path(folder) / "config.json")
    parts = (whole, whole.get("text_config") or {})
    stated = (part.get(name) for part in parts for name in ("dtype", "torch_dtype"))
    dtype = str(next((name for name in stated if name), "auto"))
    is_full = dtype.removeprefix("torch.") in ("float32", "float")
    return "auto" if is_full and teacher.engine == "vllm" else dtype


def identity_problem(
    teacher: TeacherConfig, folder: str | PathLike[str], expected: str
) -> str | None:
    """Return why the model in ``folder`` is not the one with the identity ``expected``, or None."""
    try:
        found = identity_of_teacher(teacher, folder)
    except (OSError, ValueError) as error:
        return f"the teacher's files in {folder} cannot be compared with the driver's: {error}"
    if found == expected:
        return None
    return (
        f"the teacher's files in {folder} on the node {platform.node()} have the identity {found}, "
        f"but those of {teacher.model} that the driver found have {expected}; give both the same "
        "files, or name the model by its Hugging Face id and a revision"
    )


def dtype_problem(
    teacher: TeacherConfig, folder: str | PathLike[str], engine_dtype: str
) -> str | None:
    """Return why the engine's precision is not the one in the keys of its answers, or None."""
    keyed = keyed_dtype(teacher, folder)
    if keyed not in ("bfloat16", "float16", "float32") or keyed == engine_dtype:
        return None
    return (
        f"vLLM runs {teacher.model} in {engine_dtype} here, but its answers would be stored as "
        f"those of {keyed} (teacher.dtype: {teacher.dtype}); set teacher.dtype: {engine_dtype}"
    )


def identity_files(folder: Path, *, own_code: bool = False) -> list[Path]:
    """Return the files that the identity covers: the weights in one format, and OTHER_FILES.

    If there are weights in several formats, the first of WEIGHT_ENDINGS counts, which is the one
    that vLLM loads. Files that say how the weights are quantised and, with ``own_code``, the
    model's Python files come last, so that models without any keep their identity.
    """
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
    # vLLM reads only the first of them where config.json says how the weights are quantised.
    is_said = bool(read_object(folder / "config.json").get("quantization_config"))
    quantised = QUANT_FILES[: 1 if is_said else None]
    others = [name for name in (*OTHER_FILES, *quantised) if name in names]
    code = [name for name in names if name.endswith(".py")] if own_code else []
    return [folder / name for name in (*weights, *others, *code)]


def _content_sha256(path: Path, cache: "_HashCache") -> str:
    real = path.resolve()
    # The Hub's cache: snapshots/<commit>/<name> is a link to blobs/<sha256> for files in LFS.
    if path.is_symlink() and real.parent.name == "blobs" and LFS_BLOB.fullmatch(real.name):
        return real.name
    sha256 = cache.get(real)
    if sha256 is None:
        with open(real, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        cache.put(real, sha256)
    return sha256


class _HashCache:
    """Hashes of files by path, size and modification time, kept in the user's cache folder.

    Hashing 140 GB takes minutes, and every start of a run needs the identity.
    """

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
        """Write the cache if it has changed. A cache that cannot be written only costs time."""
        if not self._changed:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Written beside its place and renamed: several replicas may hash at the same time.
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, delete=False, encoding="utf-8"
            ) as file:
                json.dump(self._entries, file)
            os.replace(file.name, self._path)
