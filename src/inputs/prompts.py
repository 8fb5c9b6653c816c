"""Owns prompts: from what the user gives to token ids, and from several prompts to one batch.

Padding is on the left, and for encoders on the right, with the attention mask and position ids that
make each row compute what it computes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..tracing.errors import InputError

#: Model inputs that have one entry for each token, and what padding holds in them.
PER_TOKEN = {
    "input_ids": None,
    "attention_mask": 0,
    "position_ids": 0,
    "token_type_ids": 0,
    "labels": -100,
    "inputs_embeds": 0,
}
#: Inputs of a decoder beside the prompt, which its encoder reads: one row for each of the prompt's.
DECODED = (
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
    "decoder_attention_mask",
)


class TextPrompt:
    """Token ids of one invoke.

    Attributes:
        inputs: model inputs [row, token] (`inputs_embeds` [row, token, d_model]), rows of different
            lengths padded; always with `attention_mask`.
        spans: where the tokens of each row begin and end in it; outside is padding.
        lengths: own tokens of each row.
        width: tokens of the longest row.
        needs_grad: its embeddings ask for gradients.
        other: further keyword inputs of the model, the same for the whole batch.
    """

    __slots__ = ("inputs", "lengths", "needs_grad", "other", "spans", "width")

    def __init__(self, inputs: dict[str, torch.Tensor], other: dict[str, Any]) -> None:
        self.inputs = inputs
        self.other = other
        embeddings = inputs.get("inputs_embeds")
        self.needs_grad = embeddings is not None and embeddings.requires_grad
        mask = inputs["attention_mask"]
        self.width = mask.shape[1]
        self.spans = [(0, self.width)] * mask.shape[0]
        self.lengths = [self.width] * mask.shape[0]
        if bool(mask.all()):
            return
        # Zeros at the ends are padding; a zero inside the prompt is the user's own masking.
        seen = mask.bool().long()
        starts = (seen.cumsum(1) == 0).sum(1).tolist()
        after = (seen.flip(1).cumsum(1) == 0).sum(1).tolist()
        self.spans = [(a, self.width - b) for a, b in zip(starts, after, strict=True)]
        self.lengths = [stop - start for start, stop in self.spans]
        if min(self.lengths) <= 0:
            raise InputError("the attention mask masks every token of a row.")

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def arguments(self) -> Any:
        """What it gives the forward beside its tokens."""
        return self.other

    def with_arguments(self, arguments: Any) -> TextPrompt:
        again = copy.copy(self)
        again.other = arguments
        return again


class Reader:
    """Reads prompts for one model.

    Attributes:
        tokenizer: for strings; None refuses them.
        limit: longest prompt in tokens that the model's position table holds, None without one.
        vocabulary: number of token ids.
        channels: of an embedding; None where that is not known.
        pads: asked whether rows of different lengths may share a forward of this model.
        right: their padding is on the right.
        decodes: a decoder has tokens of its own, and labels are theirs.
    """

    def __init__(
        self,
        tokenizer: Any,
        limit: int | None,
        vocabulary: int | None,
        name: str,
        pad: int | None = None,
        pads: Callable[[], bool] = lambda: True,
        right: bool = False,
        decodes: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        self.vocabulary = vocabulary
        self.channels: int | None = None
        self.name = name
        self.pads = pads
        self.right = right
        self.decodes = decodes
        self._known_pad = pad

    @property
    def pad(self) -> int:
        """Token id that fills the padding."""
        if self._known_pad is not None:
            return self._known_pad
        for owner in ("pad_token_id", "eos_token_id"):
            known = getattr(self.tokenizer, owner, None)
            if isinstance(known, int):
                return known
        return 0

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TextPrompt:
        """Read the arguments of an invoke.

        Raises:
            InputError: no, several or unusable prompts.
        """
        inputs: dict[str, Any] = {}
        if len(args) > 1:
            if not all(isinstance(a, str) for a in args):
                raise InputError(f"an invoke takes one prompt, {len(args)} were given; use a list.")
            args = (list(args),)
        if args:
            inputs.update(self._main(args[0]))
        own = [k for k in PER_TOKEN if not (self.decodes and k == "labels")]
        tokens = {k: v for k, v in kwargs.items() if k in own}
        other = {k: v for k, v in kwargs.items() if k not in own}
        other.update({k: inputs.pop(k) for k in list(inputs) if k not in own})
        other.update({k: _rows(k, other[k]) for k in DECODED if other.get(k) is not None})
        for name, value in tokens.items():
            if name in inputs and name != "attention_mask":
                raise InputError(f"`{name}` was given twice.")
            inputs[name] = _rows(name, value)
        main = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if main is None:
            raise InputError("the prompt has neither `input_ids` nor `inputs_embeds`.")
        if main.shape[0] == 0 or main.shape[1] == 0:
            raise InputError("the prompt is empty: it has no tokens. Give at least one.")
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones(
                main.shape[:2], dtype=torch.long, device=main.device
            )
        for name, value in inputs.items():
            if value.shape[:2] != main.shape[:2]:
                raise InputError(
                    f"`{name}` has shape {list(value.shape)}, the prompt has "
                    f"{main.shape[0]} rows of {main.shape[1]} tokens."
                )
        for name in DECODED:
            value = other.get(name)
            if value is not None and value.shape[0] != main.shape[0]:
                raise InputError(
                    f"`{name}` has {value.shape[0]} rows, the prompt has {main.shape[0]}."
                )
        self._check(inputs)
        return TextPrompt(inputs, other)

    def _check(self, inputs: dict[str, torch.Tensor]) -> None:
        width = inputs["attention_mask"].shape[1]
        if self.limit is not None and width > self.limit:
            raise InputError(
                f"the prompt has {width} tokens, {self.name} has positions for {self.limit}. "
                "Shorten it."
            )
        given = inputs.get("inputs_embeds")
        if given is not None and self.channels and given.shape[2] != self.channels:
            raise InputError(
                f"`inputs_embeds` has shape {list(given.shape)}; [row, token, {self.channels}] is "
                f"wanted: the embeddings of {self.name} have {self.channels} channels."
            )
        ids = inputs.get("input_ids")
        if ids is not None and self.vocabulary and ids.device.type != "meta":
            worst = int(ids.max())
            if worst >= self.vocabulary or int(ids.min()) < 0:
                found = worst if worst >= self.vocabulary else int(ids.min())
                raise InputError(
                    f"token id {found} is outside the vocabulary of {self.vocabulary}."
                )

    def _main(self, prompt: Any) -> dict[str, Any]:
        if isinstance(prompt, str):
            return self._tokenize([prompt])
        if isinstance(prompt, torch.Tensor):
            return {"input_ids": _rows("input_ids", prompt)}
        talks = _conversations(prompt)
        if talks:
            return self._pad([self._chat(talk) for talk in talks])
        if isinstance(prompt, Mapping):
            return {
                key: _rows(key, value) if key in PER_TOKEN else value
                for key, value in prompt.items()
            }
        if hasattr(prompt, "__array__"):
            return {"input_ids": _rows("input_ids", prompt)}
        if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            if not prompt:
                raise InputError("the prompt is an empty list.")
            if all(isinstance(part, str) for part in prompt):
                return self._tokenize(list(prompt))
            if all(isinstance(part, (int, float)) for part in prompt):
                return {"input_ids": _rows("input_ids", torch.tensor([list(prompt)]))}
            if all(
                isinstance(part, (Sequence, torch.Tensor)) and not isinstance(part, str)
                for part in prompt
            ):
                return self._pad([_row(part) for part in prompt])
        raise InputError(
            f"a prompt of type {type(prompt).__name__} cannot be read. Give a string, a list of "
            "strings, token ids (list or tensor), or a mapping with `input_ids`."
        )

    def _chat(self, talk: list[Any]) -> torch.Tensor:
        """Token ids [token] of a conversation, as the tokenizer's template writes it.

        As in the pipelines of transformers: the model is asked for the next turn, and where the last
        message is its own, to go on with it.
        """
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer, so it cannot read messages. Give token ids, or pass "
                "`LanguageModel(..., tokenizer=...)`."
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"the tokenizer of {self.name} has no chat template, so it cannot read messages. Give "
                "the text itself, or set `model.tokenizer.chat_template`."
            )
        own = talk[-1]["role"] == "assistant"
        encoded = self.tokenizer.apply_chat_template(
            talk, add_generation_prompt=not own, continue_final_message=own, return_dict=True
        )
        return torch.tensor(encoded["input_ids"], dtype=torch.long)

    def _tokenize(self, texts: list[str]) -> dict[str, Any]:
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer, so it cannot read text. Give token ids, or pass "
                "`LanguageModel(..., tokenizer=...)`."
            )
        # What is too long, we say ourselves.
        encoded = self.tokenizer(texts, verbose=False)
        ids = [torch.tensor(row, dtype=torch.long) for row in encoded["input_ids"]]
        for text, row in zip(texts, ids, strict=True):
            if row.numel() == 0:
                raise InputError(f"the prompt {text!r} is empty: it has no tokens.")
        result = self._pad(ids)
        types = encoded.get("token_type_ids")
        if types is not None:
            result["token_type_ids"] = pad([torch.tensor(t) for t in types], 0, self.right)
        return result

    def _pad(self, ids: list[torch.Tensor]) -> dict[str, Any]:
        if any(row.numel() == 0 for row in ids):
            raise InputError("a prompt of the list is empty: it has no tokens.")
        lengths = sorted({row.numel() for row in ids})
        if len(lengths) > 1 and not self.pads():
            raise InputError(
                f"a list of prompts of {lengths} tokens would need padding, and {self.name} is not "
                "known to compute the same with it. Give each prompt an invoke of its own."
            )
        return {
            "input_ids": pad(ids, self.pad, self.right),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0, self.right),
        }


def _conversations(prompt: Any) -> list[list[Any]]:
    """The conversations of a prompt: a message, a list of messages, or a list of such lists."""

    def is_message(part: Any) -> bool:
        return isinstance(part, Mapping) and "role" in part and "content" in part

    def is_talk(part: Any) -> bool:
        return isinstance(part, (list, tuple)) and bool(part) and all(map(is_message, part))

    if is_message(prompt):
        return [[prompt]]
    if is_talk(prompt):
        return [list(prompt)]
    if isinstance(prompt, (list, tuple)) and prompt and all(map(is_talk, prompt)):
        return [list(talk) for talk in prompt]
    return []


def _row(ids: Any) -> torch.Tensor:
    """Token ids [token] of one prompt of a list."""
    rows = _rows("input_ids", ids) if len(ids) else torch.zeros(1, 0, dtype=torch.long)
    if len(rows) > 1:
        raise InputError(f"a prompt of the list has shape {list(rows.shape)}; [token] is wanted.")
    return rows[0]


def _rows(name: str, value: Any) -> torch.Tensor:
    try:
        # A copy: what the user changes later is for a later prompt.
        tensor = torch.as_tensor(value).clone()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"`{name}` is a tensor or a list of numbers, not {type(value).__name__} {value!r:.60}."
        ) from None
    if name.endswith("inputs_embeds"):
        if tensor.ndim not in (2, 3) or not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"`{name}` has shape {list(tensor.shape)} and holds {kind}; [token, channel] or "
                "[row, token, channel] of floating-point numbers is wanted."
            )
        tensor = tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
    elif tensor.ndim == 1:
        tensor = tensor.unsqueeze(0)
    elif tensor.ndim != 2:
        raise InputError(
            f"`{name}` has shape {list(tensor.shape)}; [token] or [row, token] is wanted."
        )
    if name == "input_ids" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise InputError(
            f"token ids are whole numbers, found {str(tensor.dtype).removeprefix('torch.')}. "
            "Embeddings are given as `inputs_embeds=`."
        )
    return tensor.long() if name == "input_ids" else tensor


def pad(rows: list[torch.Tensor], fill: Any, right: bool) -> torch.Tensor:
    """Rows of different lengths as one tensor [row, token, …], padded on the left or the right."""
    width = max(row.shape[0] for row in rows)
    if all(row.shape[0] == width for row in rows):
        return torch.stack(rows)
    padded = rows[0].new_full((len(rows), width, *rows[0].shape[1:]), fill)
    for i, row in enumerate(rows):
        start = 0 if right else width - row.shape[0]
        padded[i, start : start + row.shape[0]] = row
    return padded


def batch(
    prompts: list[TextPrompt],
    fill_id: int,
    with_positions: bool,
    device: torch.device,
    right: bool = False,
) -> dict[str, Any]:
    """The model inputs of several prompts together.

    Args:
        fill_id: token id that fills the padding.
        with_positions: add `position_ids` where padding or several rows need them.
        device: where the model takes its inputs.
        right: padding is on the right.

    Raises:
        InputError: prompts have different kinds of inputs.
    """
    names = set(prompts[0].inputs)
    result: dict[str, Any] = {}
    for prompt in prompts:
        if set(prompt.inputs) != names:
            raise InputError(
                f"prompts of one block have different inputs: {sorted(names)} and "
                f"{sorted(prompt.inputs)}. Give all of them the same."
            )
        for key, value in prompt.other.items():
            if key in DECODED and isinstance(value, torch.Tensor):
                continue
            if key in result and result[key] is not value and result[key] != value:
                raise InputError(f"`{key}` differs between the prompts of one block.")
            result[key] = value.to(device) if isinstance(value, torch.Tensor) else value
    for name in DECODED:
        parts = [p.other[name] for p in prompts if isinstance(p.other.get(name), torch.Tensor)]
        if parts:
            result[name] = torch.cat(parts).to(device)
    for name in prompts[0].inputs:
        fill = fill_id if name == "input_ids" else PER_TOKEN[name]
        if len(prompts) == 1:
            result[name] = prompts[0].inputs[name].to(device)
        else:
            rows = [row.to(device) for prompt in prompts for row in prompt.inputs[name]]
            result[name] = pad(rows, fill, right)
    mask = result["attention_mask"]
    if with_positions and "position_ids" not in result and mask.ndim == 2:
        leading = (mask.long().cumsum(1) == 0).sum(1, keepdim=True)
        if mask.shape[0] > 1 or bool(leading.any()):
            places = torch.arange(mask.shape[1], device=mask.device) - leading
            result["position_ids"] = places.clamp(min=0)
    return result
