"""Owns generation as TransformerLens has it: its sampling, its kinds of inputs and results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from ..tracing.errors import InputError
from .cache import KeyValueCache
from .functions import sample_logits
from .tokens import is_text

logger = logging.getLogger("graftwork")

_DEFAULTS: dict[str, Any] = {
    "stop_at_eos": True,
    "eos_token_id": None,
    "do_sample": True,
    "top_k": None,
    "top_p": None,
    "temperature": 1.0,
    "freq_penalty": 0.0,
    "use_past_kv_cache": True,
    "prepend_bos": None,
    "padding_side": None,
    "return_type": "input",
    "verbose": True,
    "output_logits": False,
    "return_dict_in_generate": False,
}


class Generation:
    """One generation.

    Args:
        lens: the HookedTransformer; its hooks are called at every step.
        options: `stop_at_eos`, `eos_token_id` (an id or several), `do_sample`, `top_k`, `top_p`,
            `temperature` (0 takes the likeliest), `freq_penalty`, `use_past_kv_cache`, `prepend_bos`,
            `padding_side`, `return_type` ("input", "str", "tokens", "embeds"), `verbose`,
            `output_logits` with `return_dict_in_generate`.

    Raises:
        InputError: an option that means something else than it would do here.
    """

    def __init__(self, lens: Any, options: dict[str, Any]) -> None:
        self.lens = lens
        for name in ("num_beams", "num_return_sequences", "num_beam_groups", "constraints"):
            if options.get(name) not in (None, 1):
                raise InputError(
                    f"`{name}` is none of TransformerLens' options: use "
                    f"`model.model.generate(..., {name}=...)`, a block over transformers' own search."
                )
        unknown = [name for name in options if name not in _DEFAULTS]
        if unknown:
            logger.warning("generate ignores %s", ", ".join(unknown))
        self.o = {**_DEFAULTS, **{k: v for k, v in options.items() if k in _DEFAULTS}}
        if self.o["return_type"] not in ("input", "str", "tokens", "embeds"):
            raise InputError(
                f'return_type is "input", "str", "tokens" or "embeds", not {self.o["return_type"]!r}'
            )

    def _start(self, input: Any, new: int) -> None:
        lens = self.lens
        if new < 0:
            raise InputError(f"max_new_tokens={new} is negative")
        self.text = is_text(input)
        self.several = self.text and not isinstance(input, str)
        self.embeds = None
        if self.text:
            side = self.o["padding_side"]
            given = list(input) if self.several else input
            tokens = lens._tokens.to_tokens(
                given, self.o["prepend_bos"], "left" if self.several else side
            )
            ids, mask = tokens.ids, tokens.mask
        else:
            tensor = torch.as_tensor(input)
            if tensor.is_floating_point():
                self.embeds = tensor if tensor.ndim == 3 else tensor[None]
                ids = torch.zeros(self.embeds.shape[0], 0, dtype=torch.long)
                mask = torch.ones(self.embeds.shape[:2], dtype=torch.long)
            else:
                ids = tensor.long() if tensor.ndim == 2 else tensor.long()[None]
                mask = lens._tokens.mask_of(ids, self.o["prepend_bos"])
        if mask.shape[1] == 0:
            raise InputError("the prompt is empty: give a text, or prepend_bos=True")
        limit = lens._n_ctx
        if limit is not None and mask.shape[1] + new - 1 > limit:
            raise InputError(
                f"{mask.shape[1]} tokens and {new} new ones pass the {limit} positions of the model"
            )
        device = lens.device
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.width = self.ids.shape[1]
        self.ends = self._endings(device)
        self.logits: list[torch.Tensor] = []

    def _endings(self, device: torch.device) -> torch.Tensor | None:
        if not self.o["stop_at_eos"]:
            return None
        given = self.o["eos_token_id"]
        if given is None:
            given = getattr(self.lens.tokenizer, "eos_token_id", None)
        if given is None:
            raise InputError(
                "stop_at_eos needs the token that ends a text: give eos_token_id, or stop_at_eos=False"
            )
        return torch.as_tensor(given, device=device).reshape(-1)

    @torch.no_grad()
    def _steps(self, new: int) -> Iterator[torch.Tensor]:
        """The ids of each new token, [batch]."""
        lens, options = self.lens, self.o
        cache = KeyValueCache() if options["use_past_kv_cache"] and lens.keeps_keys else None
        finished = torch.zeros(self.mask.shape[0], dtype=torch.bool, device=self.mask.device)
        for step in range(new):
            logits = self._next_logits(step, cache)
            if options["output_logits"]:
                self.logits.append(logits)
            if options["do_sample"]:
                token = sample_logits(
                    logits,
                    top_k=options["top_k"],
                    top_p=options["top_p"],
                    temperature=options["temperature"],
                    freq_penalty=options["freq_penalty"],
                    tokens=self.ids,
                    attention_mask=self._own_mask(),
                )
            else:
                token = logits.argmax(-1)
            token = token.to(self.ids.device)
            if self.ends is not None:
                token = torch.where(finished, self.ends[0], token)
                finished = finished | torch.isin(token, self.ends)
            self.ids = torch.cat([self.ids, token[:, None]], 1)
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            yield token
            if self.ends is not None and bool(finished.all()):
                return
        assert lens is not None

    def _next_logits(self, step: int, cache: KeyValueCache | None) -> torch.Tensor:
        lens = self.lens
        if self.embeds is not None:
            return self._from_embeds()
        if cache is None or step == 0:
            found = lens.forward(self.ids, attention_mask=self.mask, past_kv_cache=cache)
        else:
            last = torch.ones_like(self.ids[:, -1:])
            found = lens.forward(self.ids[:, -1:], attention_mask=last, past_kv_cache=cache)
        return found[:, -1]  # type: ignore[no-any-return]

    def _from_embeds(self) -> torch.Tensor:
        lens = self.lens
        assert self.embeds is not None
        table = lens.module.get_input_embeddings()
        new = table(self.ids) if self.ids.shape[1] else None
        whole = self.embeds.to(lens.device)
        if new is not None:
            whole = torch.cat([whole, new.to(whole)], 1)
        if lens._hooks.active():
            raise InputError("hooks with embeddings as input: use `model.model.generate`")
        return lens.module(inputs_embeds=whole, use_cache=False).logits[:, -1]  # type: ignore[no-any-return]

    def run(self, input: Any, max_new_tokens: int) -> Any:
        """The prompt with its continuation, in the form that `return_type` says."""
        from tqdm.auto import tqdm

        self._start(input, max_new_tokens)
        steps = tqdm(
            self._steps(max_new_tokens),
            total=max_new_tokens,
            disable=not self.o["verbose"],
            delay=2,
            desc="tokens",
        )
        for _ in steps:
            pass
        result = self._result()
        if self.o["return_dict_in_generate"] or self.o["output_logits"]:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            logits: Any = tuple(self.logits) if self.o["output_logits"] else None
            return GenerateDecoderOnlyOutput(sequences=self.ids, logits=logits)
        return result

    def _result(self) -> Any:
        kind = self.o["return_type"]
        if kind == "input":
            kind = "str" if self.text else "tokens"
        if kind == "tokens":
            return self.ids
        if kind == "embeds":
            return self.lens.module.get_input_embeddings()(self.ids)
        return self._texts(self.ids, self._own_mask())

    def _own_mask(self) -> torch.Tensor:
        """The mask of `ids`, which embeddings in front of them have no part in."""
        found: torch.Tensor = self.mask[:, self.mask.shape[1] - self.ids.shape[1] :]
        return found

    def _texts(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """The text of each row without its padding and its first token of text."""
        lens, found = self.lens, []
        added = self.text and lens._tokens.bos is not None
        for row, seen in zip(ids.tolist(), mask.tolist(), strict=True):
            own = [token for token, one in zip(row, seen, strict=True) if one]
            if added and own and own[0] == lens._tokens.bos:
                own = own[1:]
            if self.ends is not None:
                ends = set(self.ends.tolist())
                while len(own) > 1 and own[-1] in ends:
                    own.pop()
            found.append(lens._tokens.to_string(own) if own else "")
        return found if self.several or len(found) > 1 else found[0]

    def stream(self, input: Any, max_new_tokens: int, size: int) -> Iterator[Any]:
        """Parts of at most `size` new tokens; the first has the prompt."""
        if size < 1:
            raise InputError(f"max_tokens_per_yield={size}: at least one token")
        self._start(input, max_new_tokens)
        return self._parts(max_new_tokens, size)

    def _parts(self, new: int, size: int) -> Iterator[Any]:
        shown: list[str] = []
        before, count = 0, 0
        as_text = self.text and self.o["return_type"] in ("input", "str")
        for count, _ in enumerate(self._steps(new), 1):
            if count % size == 0:
                part, before, shown = self._part(as_text, before, shown, False)
                yield part
        part, _, _ = self._part(as_text, before, shown, True)
        if count == 0 or (any(part) if as_text else part.shape[1]):
            yield part

    def _part(
        self, as_text: bool, before: int, shown: list[str], last: bool
    ) -> tuple[Any, int, list[str]]:
        if not as_text:
            return self.ids[:, before:], self.ids.shape[1], shown
        texts = self._texts(self.ids, self.mask)
        rows = texts if isinstance(texts, list) else [texts]
        if not last:  # a token may be a part of a letter: its text is known with the others
            rows = [row.rstrip("\N{REPLACEMENT CHARACTER}") for row in rows]
        old = shown or [""] * len(rows)
        parts = [new[len(was) :] for new, was in zip(rows, old, strict=True)]
        return (parts if isinstance(texts, list) else parts[0]), before, rows
