"""Owns where a model comes from: configuration, skeleton, weights. Nothing here runs a forward.

The skeleton is the module tree on the meta device: names, classes and shapes without weights. The
real module replaces it when the first block runs.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..tracing.errors import LoadError, near
from .architectures import pads_right
from .checkpoint_files import CheckpointFiles
from .loaded_weights import check_weights
from .model_class import build, model_class

logger = logging.getLogger("graftwork")

#: The model that ships inside the package.
TINY = "graftwork/tiny"

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
#: As torch, numpy and transformers spell them.
SPELLINGS = {
    "float64": "fp64",
    "double": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "single": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}
QUANTIZED = ("int8", "int4", "nf4")
_HUB_OPTIONS = (
    "revision", "trust_remote_code", "cache_dir", "token", "local_files_only", "subfolder",
    "code_revision", "force_download", "proxies",
)  # fmt: skip
#: What else people give, for the advice where a name is none of them.
_KNOWN_OPTIONS = (
    *_HUB_OPTIONS, "dtype", "device_map", "tokenizer", "rename", "hook_config", "automodel", "task",
    "allow_missing", "config", "quantization_config", "attn_implementation", "max_memory", "variant",
    "offload_folder", "use_safetensors", "ignore_mismatched_sizes", "generation_config", "gguf_file",
    "key_mapping", "experts_implementation", "distributed_config", "dispatch", "device",
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


def placement(options: dict[str, Any], device_map: Any) -> Any:
    """`device_map`, also where it is given in another spelling; takes that out of the options.

    Raises:
        LoadError: it is given twice.
    """
    for spelling in ("devicemap", "device"):
        if options.get(spelling) is not None and device_map is not None:
            raise LoadError(
                f"`device_map=` and `{spelling}=` say the same thing: give one of them."
            )
        device_map = options.pop(spelling, None) if device_map is None else device_map
        options.pop(spelling, None)
    return device_map


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
    if isinstance(dtype, str):
        plain = dtype.lower().removeprefix("torch.")
        dtype = SPELLINGS.get(plain, plain)
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
    if torch.cuda.is_available():
        return device_map
    mapped = isinstance(device_map, Mapping)
    places = list(device_map.values()) if mapped else [device_map]
    if not any(_is_cuda(place) for place in places):
        return device_map
    logger.warning("device_map=%r, but there is no CUDA device: loading on the CPU", device_map)
    if not mapped:
        return "cpu"
    return {path: "cpu" if _is_cuda(place) else place for path, place in device_map.items()}


def _is_cuda(place: Any) -> bool:
    """True for a CUDA device, also by its number."""
    if isinstance(place, int) and not isinstance(place, bool):
        return True
    return isinstance(place, (str, torch.device)) and str(place).startswith("cuda")


class Checkpoint:
    """A hub id or folder: its configuration now, its weights when they are asked for.

    Args:
        options: those of `from_pretrained`, and `automodel`, `task` and `allow_missing`, as for
            `LanguageModel`.
    """

    def __init__(self, name: str, dtype: Any, device_map: Any, options: dict[str, Any]) -> None:
        self.name = name
        self._folder = folder_of(name)
        self.hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
        # Asked with None, transformers waits for an answer on the terminal.
        self.hub["trust_remote_code"] = bool(self.hub.get("trust_remote_code"))
        self.files = CheckpointFiles(name, self._folder, self.hub)
        self.device_map = available(device_map)
        self._options = dict(options)
        config = self._options.pop("config", None)
        automodel, task = (self._options.pop(key, None) for key in ("automodel", "task"))
        allowed = self._options.pop("allow_missing", None) or ()
        self._allowed = (allowed,) if isinstance(allowed, str) else tuple(allowed)
        self._dtype = weights_dtype(dtype, self.device_map)
        self.config = config if config is not None else self._read_config()
        self._class = model_class(self.config, automodel, task)

    def _read_config(self) -> Any:
        from transformers import AutoConfig

        if os.path.isdir(self._folder) and not os.path.isfile(
            os.path.join(self._folder, self.hub.get("subfolder") or "", "config.json")
        ):
            raise LoadError(
                f"The folder {self.name!r} has no config.json, so it holds no model. A folder written "
                "by `save_pretrained` has one."
            )
        try:
            return AutoConfig.from_pretrained(self._folder, **self.hub)
        except (OSError, ValueError) as error:
            raise LoadError(self._not_found(error)) from error

    def _not_found(self, error: Exception) -> str:
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            return (
                f"{self.name!r} has code of its own, which is not run unless you trust it: read it, "
                "and pass trust_remote_code=True."
            )
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
            code = "custom code" in str(error) or "trust_remote_code" in str(error)
            text = self._not_found(error) if code else error
            logger.log(logging.WARNING if code else logging.INFO, "no tokenizer: %s", text)
            return None
        return None if _is_blank(tokenizer) else tokenizer

    def skeleton(self) -> torch.nn.Module:
        """The module tree on the meta device."""
        dtype = self._dtype.get("dtype")
        options: dict[str, Any] = {"dtype": dtype} if isinstance(dtype, torch.dtype) else {}
        attention = self._options.get("attn_implementation")
        if attention in ("eager", "sdpa"):
            options["attn_implementation"] = attention
        if self.hub["trust_remote_code"] and hasattr(self._class, "_model_mapping"):
            options["trust_remote_code"] = True
        config = copy.deepcopy(self.config)
        with torch.device("meta"):
            module = build(self._class, config, **options).eval()
        self._check_options(type(module))
        if hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
            # The other implementations have shapes that depend on data, or fake kernels for bf16 only.
            module.set_experts_implementation("batched_mm")
        return module  # type: ignore[no-any-return]

    def _check_options(self, kind: type[torch.nn.Module]) -> None:
        """Refuse an option that nothing would take when the weights are loaded.

        Raises:
            LoadError: there is one.
        """
        if not kind.__module__.startswith("transformers."):
            return  # code of its own may read any
        # What `from_pretrained` takes out of its keywords, it names in its code.
        taken = inspect.unwrap(kind.from_pretrained.__func__).__code__.co_consts  # type: ignore[attr-defined]
        for name in self._options:
            if (
                name not in _KNOWN_OPTIONS
                and name not in taken
                and not any(isinstance(one, tuple) and name in one for one in taken)
                and name not in inspect.signature(kind.__init__).parameters
            ):
                raise self._no_option(name)

    def _no_option(self, name: str) -> LoadError:
        return LoadError(
            f"`{name}=` is no option for loading {self.name!r}. {near(name, _KNOWN_OPTIONS)}"
        )

    def load(self) -> torch.nn.Module:
        """Read the weights.

        Raises:
            LoadError: files are missing or damaged, or do not hold the weights of the model.
        """
        options = {**self._options, **self.hub, **self._dtype, "output_loading_info": True}
        # What has another shape is refused below, with its name.
        options["ignore_mismatched_sizes"] = True
        if not hasattr(self._class, "_model_mapping"):
            options.pop("code_revision", None)  # for Auto classes alone
        if self.device_map is not None:
            options["device_map"] = self.device_map
        try:
            module, info = self._class.from_pretrained(
                self._folder, config=copy.deepcopy(self.config), **options
            )
        except (
            OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError, TypeError,
            pickle.UnpicklingError,
        ) as error:  # fmt: skip
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._explain(error)
            raise
        if self._options.get("ignore_mismatched_sizes"):
            info = {**info, "mismatched_keys": ()}
        check_weights(module, info, self.name, self._allowed)
        return module.eval()  # type: ignore[no-any-return]

    def _explain(self, error: Exception) -> None:
        """Say of an error of loading what is wrong with the checkpoint or the options, if that is it.

        Raises:
            LoadError: it is.
        """
        try:
            self.files.check(
                self._options.get("variant"), getattr(self.config, "transformers_weights", None)
            )
        except LoadError as found:
            raise found from error
        text = str(error)
        if isinstance(error, TypeError) and "unexpected keyword argument" in text:
            name = text.rpartition("argument ")[2].strip("'\"")
            raise self._no_option(name) from error
        if isinstance(error, OSError):
            raise LoadError(self._not_found(error)) from error


def what_loading_replaces() -> list[tuple[Any, str]]:
    """What transformers replaces for a while when it makes and fills a model: owners and names.

    Source: transformers 5.23, initialization.py.
    """
    from transformers import PreTrainedModel, initialization

    names = getattr(initialization, "TORCH_INIT_FUNCTIONS", ())
    patched = getattr(initialization, "TORCH_MODULES_TO_PATCH", ())
    modules = [sys.modules.get(name) for name in patched]
    found = [(one, name) for one in modules for name in names if hasattr(one, name)]
    own = [(PreTrainedModel, "tie_weights"), (PreTrainedModel, "init_weights")]
    return [*found, *own, (torch, "linspace")]


def _is_blank(tokenizer: Any) -> bool:
    """True for the empty tokenizer that transformers makes up where a folder has no tokenizer files.

    It knows its special tokens (and at most a word separator) and turns every text into nothing.
    """
    if len(tokenizer) > 256:
        return False
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return len(set(tokenizer.get_vocab()) - special) <= 1


def takes_images(module: torch.nn.Module) -> bool:
    """True for a model whose input is pixels alone, such as an image classifier."""
    return (
        getattr(module, "main_input_name", "") == "pixel_values"
        and not module.config.is_encoder_decoder  # type: ignore[union-attr]
    )


def meta_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module on the meta device, without copying its weights.

    Tied parameters stay tied. Hooks are left behind. Quantized linear maps, whose kernels know no meta
    device, are plain ones of the same sizes.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for child in module.modules():
        if isinstance(child, torch.nn.Linear) and _is_quantized(child):
            bias = getattr(child, "bias", None) is not None
            memo[id(child)] = torch.nn.Linear(
                child.in_features, child.out_features, bias, device="meta", dtype=dtype
            )
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


def _is_quantized(linear: torch.nn.Linear) -> bool:
    """True where the memory of a weight is not its numbers."""
    weight = linear.weight
    shape = (linear.out_features, linear.in_features)
    return not weight.is_floating_point() or tuple(weight.shape) != shape
