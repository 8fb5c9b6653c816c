"""Owns tokenization as TransformerLens has it: when a beginning-of-text token stands in front, and on
which side rows are padded.

Nothing here changes the tokenizer that it is given, so two threads may use one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from ..tracing.errors import InputError

#: What arguments hold that were not given.
USE_DEFAULT_VALUE: Any = None


class Tokens(NamedTuple):
    """Token ids and their mask, both [batch, pos]; zeros of the mask are padding."""

    ids: torch.Tensor
    mask: torch.Tensor


class Tokenization:
    """The tokenizer of a model, and the rules for its first token and its padding.

    Attributes:
        tokenizer: of transformers; None for a model of ids alone.
        prepend_bos: whether a beginning-of-text token stands in front where nothing else is said.
        prepends: the tokenizer adds that token by itself.
        n_ctx: longest row; None without a limit.
    """

    def __init__(
        self,
        tokenizer: Any,
        n_ctx: int | None,
        prepend_bos: bool = True,
        padding_side: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.prepend_bos = prepend_bos
        self._side = checked_side(padding_side) if padding_side else None
        self.prepends = tokenizer is not None and self._adds_in_front()
        if tokenizer is not None:
            eos = tokenizer.eos_token_id
            self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
            self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
            if self.bos is None:
                self.bos = getattr(tokenizer, "cls_token_id", None)
            if self.pad is None:
                self.pad = self.bos if self.bos is not None else 0
        else:
            self.bos = self.pad = None

    @property
    def padding_side(self) -> str:
        """ "left" or "right": what was given, else what the tokenizer says now."""
        return self._side or checked_side(getattr(self.tokenizer, "padding_side", None) or "right")

    def _adds_in_front(self) -> bool:
        # Of an empty text nothing is learnt: what some tokenizers add to it stands behind a text.
        return self._encode("a")[:1] != self._plain("a")[:1]

    def _plain(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return list(self._need()(text, add_special_tokens=False)["input_ids"])

    def _need(self) -> Any:
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: give token ids, or `set_tokenizer`.")
        return self.tokenizer

    def _encode(self, text: str) -> list[int]:
        return list(self._need()(text)["input_ids"])

    def encode(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids of one text, with a beginning-of-text token or without."""
        wanted = self.prepend_bos if prepend_bos is None else prepend_bos
        ids = self._encode(text)
        if wanted and not self.prepends:
            if self.bos is None:
                raise InputError(
                    "the tokenizer has no beginning-of-text token: pass prepend_bos=False."
                )
            return [self.bos, *ids]
        if not wanted and self.prepends and ids and ids[0] == self.bos:
            return ids[1:]
        return ids

    def to_tokens(
        self,
        text: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        truncate: bool = True,
    ) -> Tokens:
        """Ids and mask of a text or several, padded to one length.

        Args:
            truncate: cut rows at the model's positions.
        """
        given: Any = text
        if not is_text(given) or not isinstance(given, (str, list, tuple)):
            raise InputError(
                f"to_tokens takes a text or a list of texts, not {type(text).__name__}"
            )
        side = checked_side(padding_side) if padding_side else self.padding_side
        rows = [self.encode(t, prepend_bos) for t in ([text] if isinstance(text, str) else text)]
        if truncate and self.n_ctx is not None:
            rows = [row[: self.n_ctx] for row in rows]
        width = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), width), self.pad if self.pad is not None else 0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[number, place] = torch.tensor(row, dtype=torch.long)
            mask[number, place] = 1
        return Tokens(ids, mask)

    def mask_of(self, ids: torch.Tensor, prepend_bos: bool | None = None) -> torch.Tensor:
        """Which of given ids are padding: runs of the padding token at the ends of a row.

        Where that token is also the first one of a text, the last one of a run in front is the text's
        first. A row that is nothing but padding keeps all of it, and so does a single row where that
        token also begins or ends texts: nothing says that it is padding there.

        Args:
            ids: [batch, pos].
        """
        mask = torch.ones_like(ids)
        if self.tokenizer is None or self.pad is None:
            return mask
        if ids.shape[0] == 1 and self.pad in (self.bos, self.tokenizer.eos_token_id):
            return mask
        same = ids == self.pad
        front = same.long().cumprod(1)
        back = same.flip(1).long().cumprod(1).flip(1)
        wanted = self.prepend_bos if prepend_bos is None else prepend_bos
        if self.bos == self.pad and wanted:
            first = front.sum(1, keepdim=True) - 1
            front = front * (torch.arange(ids.shape[1], device=ids.device) != first)
        mask = mask * (1 - front) * (1 - back)
        return torch.where(same.all(1, keepdim=True), torch.ones_like(mask), mask)

    # ---------------------------------------------------------------- text

    def to_string(self, tokens: Any) -> Any:
        """Text of ids: [pos] or one id gives a text; [batch, pos], or rows of any lengths, a list."""
        tokenizer = self._need()
        if isinstance(tokens, (list, tuple)) and tokens and np.ndim(tokens[0]):
            return [self.to_string(one) for one in tokens]
        ids = torch.as_tensor(
            np.asarray(tokens) if not isinstance(tokens, torch.Tensor) else tokens
        )
        if ids.ndim == 2:
            return [
                tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()
            ]
        if ids.ndim > 2:
            raise InputError(f"to_string takes ids [pos] or [batch, pos], not {list(ids.shape)}")
        row = ids.reshape(-1).tolist()
        return tokenizer.decode(row, clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self, given: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> Any:
        """Each token as text: a list, or a list of lists for a list of texts."""
        if isinstance(given, (list, tuple)) and not all(isinstance(g, int) for g in given):
            return [self.to_str_tokens(one, prepend_bos, padding_side) for one in given]
        if isinstance(given, str):
            ids = self.encode(given, prepend_bos)
        else:
            tensor = torch.as_tensor(np.asarray(given) if isinstance(given, np.ndarray) else given)
            if tensor.ndim == 2 and tensor.shape[0] == 1:
                tensor = tensor[0]
            if tensor.ndim > 1:
                raise InputError(
                    f"to_str_tokens takes one row of ids, not {list(tensor.shape)}: give a list."
                )
            ids = tensor.reshape(-1).tolist()
        tokenizer = self._need()
        return [tokenizer.decode([one], clean_up_tokenization_spaces=False) for one in ids]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        ids = self._plain(text)
        if len(ids) != 1:
            parts = self.to_str_tokens(ids)
            raise InputError(f"{text!r} is {len(ids)} tokens, not one: {parts}")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """The text of one id."""
        if not isinstance(token, (int, np.integer)):
            raise InputError(f"to_single_str_token takes one id, not {type(token).__name__}")
        found: str = self.to_str_tokens([int(token)])[0]
        return found

    def get_token_position(
        self,
        single_token: str | int,
        given: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a text or in ids.

        Args:
            mode: "first" or "last" of its places.
        """
        if mode not in ("first", "last"):
            raise InputError(f'mode is "first" or "last", not {mode!r}')
        if isinstance(given, str):
            ids = self.encode(given, prepend_bos)
        else:
            row = torch.as_tensor(given)
            if row.ndim > 1 and row.shape[0] != 1:
                raise InputError(
                    f"get_token_position takes a text or one row of ids, not {list(row.shape)}"
                )
            ids = row.reshape(-1).tolist()
        if isinstance(single_token, str):
            single_token = self.to_single_token(single_token)
        places = [i for i, one in enumerate(ids) if one == int(single_token)]
        if not places:
            raise InputError(f"the token {single_token} does not occur in the prompt")
        return places[0] if mode == "first" else places[-1]


def checked_side(side: str) -> str:
    """A padding side, or an error."""
    if side not in ("left", "right"):
        raise InputError(f'padding_side is "left" or "right", not {side!r}')
    return side


def is_text(given: Any) -> bool:
    """True for a text or a list of texts."""
    return isinstance(given, str) or (
        isinstance(given, Iterable)
        and not isinstance(given, (torch.Tensor, np.ndarray, dict))
        and all(isinstance(one, str) for one in given)
    )
