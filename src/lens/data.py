"""Owns sample data: texts like those that a model was trained on, and rows of tokens made of them."""

from __future__ import annotations

from typing import Any

from ..tracing.errors import InputError, LoadError, near

#: A few thousand texts each, on the hub.
DATASETS = {
    "openwebtext": "stas/openwebtext-10k",
    "owt": "stas/openwebtext-10k",
    "pile": "NeelNanda/pile-10k",
    "c4": "NeelNanda/c4-10k",
    "code": "NeelNanda/code-10k",
    "c4_code": "NeelNanda/c4-code-20k",
    "wiki": "NeelNanda/wiki-10k",
}
_TRAINED_ON = {
    "gpt2": "openwebtext",
    "gpt_neo": "pile",
    "gpt_neox": "pile",
    "gptj": "pile",
    "opt": "pile",
}


def get_dataset(name: str, **options: Any) -> Any:
    """A small data set of texts by its short name.

    Raises:
        InputError: the name is not known.
        LoadError: the `datasets` package is not installed.
    """
    if name not in DATASETS:
        raise InputError(f"no data set `{name}` is known. {near(name, DATASETS)}")
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise LoadError("sample data needs the package `datasets`: pip install datasets") from None
    return datasets.load_dataset(DATASETS[name], split="train", **options)


def sample_dataset(model_type: str, **options: Any) -> Any:
    """Data like that which a kind of model was trained on."""
    if model_type not in _TRAINED_ON:
        raise InputError(f"what `{model_type}` was trained on is not known: use get_dataset(name)")
    return get_dataset(_TRAINED_ON[model_type], **options)
