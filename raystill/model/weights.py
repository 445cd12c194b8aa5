"""Reads the headers of safetensors files, and says what is wrong with a file, without its weights.

Imports no torch and not the safetensors package, whose reader refuses a whole file for one dtype
that it does not know (new quantisations), and does not say what the file is instead.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from raystill.base.records import natural
from raystill.model.files import HALF, read_object

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of one number, by dtype; of a dtype that is not here the size is not checked."""
MOST_SIZES = 64
"""Of one tensor: torch has no more. The product of a million takes minutes."""
PLAIN = ("F64", "F32", "F16", "BF16")
FETCH = "fetch it again"
INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"(.*?(?:^|(?<=\.))(?:layers|h|blocks)\.)(\d{1,6})(\..+)", re.ASCII)
"""The name of a tensor of a layer: what comes before its number, the number, and the rest."""


def header_of(file: Path) -> dict[str, dict[str, Any]]:
    """Return ``{name: {dtype, shape, data_offsets}}`` of a safetensors file that is whole.

    The format is 8 bytes with the header's length, little-endian, the header as JSON, and the
    tensors' bytes without gaps. Raises ValueError with what is wrong and the remedy.
    """
    if not file.is_file():  # A pipe would wait for ever.
        raise ValueError(f"is no file; {FETCH}")
    try:
        size = os.stat(file).st_size
        with file.open("rb") as stream:
            start = stream.read(512)
            length = int.from_bytes(start[:8], "little")
            stream.seek(8)
            text = stream.read(length) if 8 + length <= size and length <= LONGEST_HEADER else None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); {FETCH}") from None
    if (other := _what_else(start)) is not None:
        raise ValueError(other)
    if text is None:
        raise ValueError(
            f"has {size:,} bytes, but its first eight say that a header of {length:,} follows; it "
            f"is cut off or no safetensors file; {FETCH}"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"has a header that is no JSON object; {FETCH}")
    header.pop("__metadata__", None)
    ends = [_end_of(name, entry) for name, entry in header.items()]
    described = 8 + length + max(ends, default=0)
    if described != size:
        missing = f"{described - size:,} are missing: the file is cut off"
        told = missing if described > size else f"{size - described:,} are too many"
        raise ValueError(f"has {size:,} bytes, its header tells {described:,}; {told}; {FETCH}")
    return header


def weight_problems(folder: Path, *, fetched: bool = True) -> Iterator[tuple[Path, str]]:
    """Each file of weights that cannot be read, and why.

    ``fetched``: a file that the index names and the folder does not have is a problem too.
    """
    files = sorted(folder.glob("*.safetensors"))
    names: dict[str, set[str]] = {}
    for file in files:
        try:
            names[file.name] = set(header_of(file))
        except ValueError as error:
            yield file, str(error)
    index = folder / INDEX
    if not index.is_file() or (folder / "model.safetensors").exists():
        return
    weight_map = _weight_map(folder)
    if weight_map is None:
        yield index, f"has no weight_map from tensors to files; {FETCH}"
        return
    if outside := sorted(name for name in set(weight_map.values()) if not _is_shard(name)):
        yield index, f"names {outside[0][:80]!r}, which is no *.safetensors beside it; {FETCH}"
        return
    for name in sorted(set(weight_map.values())):
        if fetched and not (folder / name).exists():
            yield index, f"names {name!r}, which the folder does not have; fetch that file"
    for tensor, name in weight_map.items():
        if name in names and tensor not in names[name]:
            yield index, f"says that {tensor!r} is in {name}, which does not have it; {FETCH}"
            return


def size_of(folder: Path) -> dict[str, int | None]:
    """``parameters`` and ``bytes`` of a model's weights, from the headers; {} where none are here.

    ``parameters`` is None of a quantised model, several of whose numbers share one stored integer.
    Tied weights are stored, and natural, once. Files that the index does not name do not count.
    """
    files = _files_of(folder)
    try:
        entries = {name: e for file in files for name, e in header_of(file).items()}
    except ValueError:  # Broken, or not fetched to this machine.
        return {}
    if not entries:
        return {}
    plain = all(str(entry["dtype"]) in PLAIN for entry in entries.values())
    numbers = sum(math.prod(entry["shape"]) for entry in entries.values())
    held = sum(end - begin for begin, end in (e["data_offsets"] for e in entries.values()))
    return {"parameters": numbers if plain else None, "bytes": held}


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor or a module of this name is in; None outside of layers."""
    return natural(name.partition("layers.")[2].partition(".")[0])


def layer_prefixes(names: Iterable[str], num_layers: int) -> list[str]:
    """What names of tensors of ``num_layers`` layers begin with; a vision tower has layers too."""
    numbers: dict[str, set[int]] = {}
    for found in filter(None, map(LAYER.fullmatch, names)):
        numbers.setdefault(found[1], set()).add(int(found[2]))
    return [before for before, there in numbers.items() if there >= set(range(num_layers))]


def files_of_layers(folder: Path, num_layers: int, layers: Collection[int]) -> set[str] | None:
    """The files with these of the decoder's layers, or with something else than layers.

    None where that is not certain: there is no index, or several things have so many layers.
    """
    index = _weight_map(folder)
    if index is None or (folder / "model.safetensors").exists():
        return None
    prefixes = layer_prefixes(index, num_layers)
    if len(prefixes) != 1:
        return None
    found = {name: LAYER.fullmatch(name) for name in index}
    return {
        index[name]
        for name, layer in found.items()
        if layer is None or layer[1] != prefixes[0] or int(layer[2]) in layers
    }


def _weight_map(folder: Path) -> dict[str, str] | None:
    """File of each tensor by the folder's index; None where there is none that says it."""
    found = read_object(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        return None
    return found


def _is_shard(name: str) -> bool:
    """Whether it names a file beside the index, and none elsewhere."""
    return len(name) <= 255 and re.fullmatch(r"[^/\0]+\.safetensors", name) is not None


def _files_of(folder: Path) -> list[Path]:
    """The weight files that are loaded: those of the index, one whole file, or all."""
    whole, index = folder / "model.safetensors", _weight_map(folder)
    if whole.exists():
        return [whole]
    if index is None:
        return sorted(folder.glob("*.safetensors"))
    return [folder / name for name in sorted(set(index.values())) if _is_shard(name)]


def _what_else(start: bytes) -> str | None:
    """What a file is that begins so, if it is not a safetensors file."""
    begins = start.lstrip().lower()
    if not start:
        return f"is empty; {FETCH}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights; run `git lfs pull` in its folder"
    if begins.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"is a web page and not the weights (an error, or a log-in); {FETCH}"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a pickle and not a safetensors file; save the model with safe_serialization=True"
    if begins.startswith((b"{", b"[")) and len(start) >= 8 and start[8:9] not in (b"{", b"["):
        return f"is a text and not a safetensors file; {FETCH}"
    return None


def _end_of(name: str, entry: Any) -> int:
    """Where the tensor's bytes end, natural from the first tensor; ValueError if it makes none."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    kind = entry.get("dtype") if isinstance(entry, dict) else None
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has a header without shape or place of {name[:80]!r}; {FETCH}")
    if len(shape) > MOST_SIZES:
        raise ValueError(f"gives {name[:80]!r} {len(shape):,} sizes; {FETCH}")
    if not isinstance(kind, str) or HALF.search(kind) or HALF.search(name):
        raise ValueError(f"has a name or type of a tensor that is no text ({name[:80]!r}); {FETCH}")
    bits, (begin, end) = BITS.get(kind), offsets
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError(
            f"gives {name[:80]!r} {end - begin:,} bytes, but {shape[:8]} of {kind} has "
            f"{math.prod(shape) * bits // 8:,}; {FETCH}"
        )
    return end


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers from 0 up that 64 bits hold."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
