"""What the installed transformers and vLLM know of a model, read from their files, not imported.

Their import takes seconds, and the static check has five. Where they are not installed (a laptop
that only submits), or their files have another form, nothing is known and nothing is concluded.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_CAUSAL = re.compile(
    r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict\(\n(.*?)^\)", re.DOTALL | re.MULTILINE
)
_PAIR = re.compile(r'\(\s*"([^"]+)",')
_WORD = re.compile(r"\w+")
_PART = re.compile(r'CONFIG_MAPPING\[\s*"([^"]+)"')


def decoder_types() -> frozenset[str]:
    """``model_type`` of all models that transformers can train as a decoder; empty if unknown."""
    found = _CAUSAL.search(_text("transformers", "models/auto/modeling_auto.py"))
    return frozenset(_PAIR.findall(found.group(1))) if found else frozenset()


def is_known_type(model_type: str) -> bool | None:
    """Whether transformers has the model, as a decoder or as anything else; None: not known."""
    names = "".join(
        _text("transformers", f"models/auto/{name}.py")
        for name in ("auto_mappings", "configuration_auto")
    )
    return f'"{model_type}"' in names if names else None


def knows_activation(name: object) -> bool | None:
    """Whether transformers has an activation function of this name; None: not known."""
    text = _text("transformers", "activations.py")
    return isinstance(name, str) and f'"{name}"' in text if text else None


def knows_rope(kind: str) -> bool | None:
    """Whether transformers or vLLM scales rotary embeddings in a way of this name; None: not known.

    Names of a single model are taken for known.
    """
    served = _text("vllm", "model_executor/layers/rotary_embedding/__init__.py")
    trained = _text("transformers", "modeling_rope_utils.py")
    if not trained:
        return None
    return kind in ("mrope", "su", "none") or f'"{kind}"' in served + trained


@cache
def vllm_knows(model_type: str) -> bool:
    """Whether vLLM reads the settings of such a model by code of its own."""
    types = _text("vllm", "transformers_utils/config.py")
    return re.search(rf'(?<!\w)"?{re.escape(model_type)}"?\s*[=:]', types) is not None


def words_of_code(model_type: str) -> frozenset[str]:
    """Every word in transformers' code of this type: the name of each module of a model is one.

    The code of the models that it is made of by default is included, which its settings name (Fuyu
    has Persimmon as its decoder). Empty where there is no such code.
    """
    words = _words(model_type)
    if not words:
        return words
    settings = _texts(model_type, "configuration")
    return words.union(*(_words(kind) for kind in _PART.findall(settings)))


@cache
def _words(model_type: str) -> frozenset[str]:
    return frozenset(_WORD.findall(_texts(model_type, "modeling")))


def _texts(model_type: str, what: str) -> str:
    """The text of transformers' files ``{what}_*.py`` on a model type; empty if there are none."""
    folder, kind = _folder("transformers"), model_type.replace("-", "_")
    if folder is None or not kind.isidentifier():
        return ""
    files = sorted((folder / "models" / kind).glob(f"{what}_*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def _folder(package: str) -> Path | None:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


@cache
def _text(package: str, name: str) -> str:
    """The text of an installed package's file; empty where there is none."""
    folder = _folder(package)
    try:
        return "" if folder is None else (folder / name).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
