"""Owns which class of transformers a checkpoint is: the one that it names, or one that is asked for.

Another class than the one that was saved has other outputs, and weights that no file has. So nothing is
guessed where the checkpoint says what it is; what its files lack is refused when they are read.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from ..tracing.errors import LoadError, near

logger = logging.getLogger("graftwork")

#: Names of transformers' pipelines, and what loads a model for each.
TASKS = {
    "feature-extraction": "AutoModel",
    "image-feature-extraction": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "translation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "sentiment-analysis": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "ner": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "image-segmentation": "AutoModelForImageSegmentation",
    "depth-estimation": "AutoModelForDepthEstimation",
    "image-text-to-text": "AutoModelForImageTextToText",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}
#: What a configuration that names no class is loaded with: the first that knows it.
_KINDS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")


def model_class(config: Any, automodel: Any = None, task: str | None = None) -> Any:
    """The class that loads a checkpoint: of a model, or an Auto class.

    Args:
        config: its configuration.
        automodel: a class, or the name of one in transformers.
        task: as transformers' pipelines call it.

    Raises:
        LoadError: what is asked for does not exist, or does not know this configuration.
    """
    if automodel is not None and task is not None:
        raise LoadError("give `automodel=` or `task=`: either says which class is loaded.")
    if task is not None:
        if task not in TASKS:
            raise LoadError(f"task={task!r} is not known. {near(task, TASKS)}")
        automodel = TASKS[task]
    if automodel is not None:
        return _asked(automodel, config)
    named = _first(getattr(config, "architectures", None))
    if named is None:
        return _usual(config)
    found = _named(named)
    if found is not None and _is_for(found, config):
        return found
    own = _own_code(config, named)
    if own is not None:
        return own
    usual = _usual(config)
    logger.warning(
        "the checkpoint was saved as a `%s`, which transformers does not have for `%s`: it is loaded "
        "with `%s`. `automodel=` chooses another class",
        named,
        config.model_type,
        usual.__name__,
    )
    return usual


def _first(names: Any) -> str | None:
    return str(names[0]) if names else None


def _named(name: str) -> Any:
    """The class of transformers of that name; None if it has none."""
    import transformers

    found = getattr(transformers, name, None)
    return found if inspect.isclass(found) and hasattr(found, "from_pretrained") else None


def _is_for(kind: Any, config: Any) -> bool:
    own = getattr(kind, "config_class", None)
    return own is not None and isinstance(config, own)


def _own_code(config: Any, named: str) -> Any:
    """The Auto class by which a checkpoint gives the class that it names as code of its own."""
    for auto, place in (getattr(config, "auto_map", None) or {}).items():
        if isinstance(place, str) and place.rpartition(".")[2] == named:
            return _named(auto)
    return None


def _asked(given: Any, config: Any) -> Any:
    import transformers

    kind = given
    if isinstance(given, str):
        kind = _named(given)
        if kind is None:
            known = [name for name in dir(transformers) if name.startswith(("Auto", "PreTrained"))]
            raise LoadError(f"transformers has no class {given!r}. {near(given, known)}")
    if not (inspect.isclass(kind) and hasattr(kind, "from_pretrained")):
        raise LoadError(
            f"automodel= takes a class of transformers or its name, not {type(given).__name__}."
        )
    mapping = getattr(kind, "_model_mapping", None)
    own_code = getattr(config, "auto_map", None) or {}
    if mapping is None:
        fits = _is_for(kind, config)
    else:
        fits = type(config) in mapping or kind.__name__ in own_code
    if not fits:
        named = _first(getattr(config, "architectures", None))
        saved = "" if named is None else f" It was saved as a `{named}`."
        raise LoadError(
            f"`{kind.__name__}` has no model for a configuration of the type `{config.model_type}`."
            + saved
        )
    return kind


def _usual(config: Any) -> Any:
    """What loads a configuration that does not say, with a language model's head where there is one."""
    import transformers

    own_code = getattr(config, "auto_map", None) or {}
    for name in _KINDS:
        kind = getattr(transformers, name)
        if type(config) in kind._model_mapping or name in own_code:
            return kind
    return transformers.AutoModel


def build(kind: Any, config: Any, **options: Any) -> Any:
    """A model of a class without reading weights."""
    make = kind.from_config if hasattr(kind, "_model_mapping") else kind._from_config
    return make(config, **options)
