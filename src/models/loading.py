"""Owns where a model comes from: configuration, skeleton, weights. Nothing here runs a forward.

The skeleton is the module tree on the meta device: names, classes and shapes without weights. The
real module replaces it when the first block runs.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ..tracing.errors import LoadError, near
from .architectures import pads_right

logger = logging.getLogger("graftwork")

#: The model that ships inside the package.
TINY = "graftwork/tiny"

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
QUANTIZED = ("int8", "int4", "nf4")
_HUB_OPTIONS = (
    "revision", "trust_remote_code", "cache_dir", "token", "local_files_only", "subfolder",
    "code_revision", "force_download", "proxies",
)  # fmt: skip


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        first = str(record.msg) not in self._seen
        self._seen.add(str(record.msg))
        return first


def folder_of(name: str) -> str:
    """The folder of a model that ships with the package, or the name itself."""
    return str(Path(__file__).parent / "tiny") if name == TINY else name


def weights_dtype(dtype: Any, device_map: Any) -> dict[str, Any]:
    """`from_pretrained` arguments for a dtype given by name or as a torch.dtype.

    int8 is bitsandbytes' LLM.int8(), int4 its FP4 and nf4 its NF4 with double quantization.

    Raises:
        LoadError: the name is unknown, or bitsandbytes is not installed.
    """
    if dtype is None:
        return {}
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return {"dtype": dtype}
    if dtype in DTYPES:
        return {"dtype": DTYPES[dtype]}
    if dtype not in QUANTIZED:
        known = [*DTYPES, *QUANTIZED]
        raise LoadError(
            f"dtype={dtype!r} is not supported. {near(str(dtype), known)} "
            f"Known: {', '.join(known)}, or a torch.dtype."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoadError(
            f"dtype={dtype!r} needs bitsandbytes, which is not installed: "
            'pip install "graftwork[quant]"'
        )
    from transformers import BitsAndBytesConfig

    if dtype == "int8":
        # It warns at every layer of every forward that activations are cast, which is what int8 does.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
        config = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    else:
        # Without a GPU there are no fast bf16 kernels, and bf16 would only lose digits.
        compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4" if dtype == "nf4" else "fp4",
            bnb_4bit_use_double_quant=dtype == "nf4",
            bnb_4bit_compute_dtype=compute,
        )
    options: dict[str, Any] = {"quantization_config": config}
    if device_map is None:
        options["device_map"] = "auto" if torch.cuda.is_available() else "cpu"
    return options


def available(device_map: Any) -> Any:
    """`device_map`, moved to the CPU where it names CUDA and there is none."""
    wants_cuda = isinstance(device_map, (str, torch.device)) and str(device_map).startswith("cuda")
    if wants_cuda and not torch.cuda.is_available():
        logger.warning("device_map=%r, but there is no CUDA device: loading on the CPU", device_map)
        return "cpu"
    return device_map


class Checkpoint:
    """A hub id or folder: its configuration now, its weights when they are asked for."""

    def __init__(self, name: str, dtype: Any, device_map: Any, options: dict[str, Any]) -> None:
        self.name = name
        self._folder = folder_of(name)
        self.hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
        self.device_map = available(device_map)
        self._options = dict(options)
        config = self._options.pop("config", None)
        self._dtype = weights_dtype(dtype, self.device_map)
        self.config = config if config is not None else self._read_config()
        self._class = model_class(self.config)

    def _read_config(self) -> Any:
        from transformers import AutoConfig

        if os.path.isdir(self._folder) and not os.path.isfile(f"{self._folder}/config.json"):
            raise LoadError(
                f"The folder {self.name!r} has no config.json, so it holds no model. A folder written "
                "by `save_pretrained` has one."
            )
        try:
            return AutoConfig.from_pretrained(self._folder, **self.hub)
        except (OSError, ValueError) as error:
            raise LoadError(self._not_found(error)) from error

    def _not_found(self, error: Exception) -> str:
        first = str(error).strip().split("\n", 1)[0]
        if os.path.isdir(self._folder):
            return f"The folder {self.name!r} cannot be read as a model: {first}"
        if os.sep in self.name and self.name.count("/") != 1:
            return f"There is no folder {self.name!r}."
        return (
            f"There is no model {self.name!r}: it is no folder here, and the hub gave none "
            f"({first}). {TINY!r} is in the package and needs no network."
        )

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None if it has none."""
        from transformers import AutoTokenizer

        try:
            side = "right" if pads_right(self.config) else "left"
            tokenizer = AutoTokenizer.from_pretrained(self._folder, padding_side=side, **self.hub)
        except (OSError, ValueError, KeyError, TypeError) as error:
            # Reported where a string prompt needs it: models are also run on token ids alone.
            logger.info("no tokenizer for %r: %s", self.name, error)
            return None
        return None if _is_blank(tokenizer) else tokenizer

    def skeleton(self) -> torch.nn.Module:
        """The module tree on the meta device."""
        dtype = self._dtype.get("dtype")
        options: dict[str, Any] = {"dtype": dtype} if isinstance(dtype, torch.dtype) else {}
        attention = self._options.get("attn_implementation")
        if attention in ("eager", "sdpa"):
            options["attn_implementation"] = attention
        if self.hub.get("trust_remote_code"):
            options["trust_remote_code"] = True
        config = copy.deepcopy(self.config)
        with torch.device("meta"):
            module = self._class.from_config(config, **options).eval()
        if hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
            # The other implementations have shapes that depend on data, or fake kernels for bf16 only.
            module.set_experts_implementation("batched_mm")
        return module  # type: ignore[no-any-return]

    def load(self) -> torch.nn.Module:
        """Read the weights."""
        options = {**self._options, **self._dtype}
        if self.device_map is not None:
            options["device_map"] = self.device_map
        try:
            module = self._class.from_pretrained(
                self._folder, config=copy.deepcopy(self.config), **options
            )
        except OSError as error:
            raise LoadError(self._not_found(error)) from error
        return module.eval()  # type: ignore[no-any-return]


def _is_blank(tokenizer: Any) -> bool:
    """True for the empty tokenizer that transformers makes up where a folder has no tokenizer files.

    It knows its special tokens (and at most a word separator) and turns every text into nothing.
    """
    if len(tokenizer) > 256:
        return False
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return len(set(tokenizer.get_vocab()) - special) <= 1


def classifies_images(config: Any) -> bool:
    """True for a checkpoint of an image classifier."""
    named = (getattr(config, "architectures", None) or [""])[0]
    return bool(named.endswith("ForImageClassification"))


def model_class(config: Any) -> Any:
    """The Auto class with a language model head for a configuration, or the bare one."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    named = (getattr(config, "architectures", None) or [""])[0]
    if named.endswith("ForMaskedLM"):
        return AutoModelForMaskedLM
    if classifies_images(config):
        return AutoModelForImageClassification
    for kind in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM):
        if type(config) in kind._model_mapping or "AutoModelForCausalLM" in (
            getattr(config, "auto_map", None) or {}
        ):
            return kind
    return AutoModel


def meta_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module on the meta device, without copying its weights.

    Tied parameters stay tied. Hooks are left behind.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = copy.deepcopy(module, memo)
    for child in copied.modules():
        for hooks in (
            child._forward_hooks,
            child._forward_pre_hooks,
            child._backward_hooks,
            child._backward_pre_hooks,
        ):
            hooks.clear()
    return copied
