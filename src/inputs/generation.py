"""Owns what a generation is: what each option of `generate` asks of a batch, and which forward of the
model is which step.

A step is the prompt, then one accepted token each. Options under which a forward is something else are
left out where they only save work, and refused where they do not and the block looks at steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from ..intervention import Run, Stop
from ..tracing.errors import InputError
from ..tracing.graph import Graph
from ..tracing.node import READ, WRITE

#: What an option does in a batch.
#: Every row is by itself, whatever the padding.
ROWS = "rows"
#: It looks at the ids so far with their padding, or counts them: prompts of one length share a batch.
LENGTH = "length"
#: It may look at other rows, at how many there are, or end a row for reasons of its own: each prompt
#: runs alone.
ALONE = "alone"
#: The same tokens in other forwards: left out where steps are looked at.
SAVES = "saves work"
#: As `SAVES` in a greedy search; with sampling, other tokens are drawn.
GUESSES = "guesses tokens"
#: The forwards are what somebody else's loop makes of them.
LOOP = "a loop of its own"


def _unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Collection) and not value)


def _but(*neutral: Any) -> Callable[[Any], bool]:
    """Unset, or one of these numbers or names."""
    return lambda value: (
        _unset(value) or (isinstance(value, (int, float, str)) and value in neutral)
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option of `generate`.

    Attributes:
        kind: what it does in a batch, where it asks for anything.
        is_neutral: whether a value asks for nothing.
    """

    kind: str
    is_neutral: Callable[[Any], bool] = _unset


_ROWS = Option(ROWS)

#: Every option of `generate`: those of `GenerationConfig`, and its own arguments.
#: Source: transformers 5.23, generation/utils.py, `_get_logits_processor`, `_get_stopping_criteria`.
OPTIONS: dict[str, Option] = {
    # How long. Without `max_new_tokens`, the length counts the padding: see `Options.kinds`.
    "max_length": _ROWS,
    "max_new_tokens": _ROWS,
    "min_length": Option(LENGTH, _but(0)),
    "min_new_tokens": _ROWS,  # counted from the prompt's end
    "early_stopping": _ROWS,
    "max_time": Option(ALONE),
    "stop_strings": Option(ALONE),
    "stopping_criteria": Option(ALONE),
    # How tokens are chosen.
    "do_sample": _ROWS,
    "num_beams": _ROWS,
    "num_return_sequences": _ROWS,
    "temperature": _ROWS,
    "top_k": _ROWS,
    "top_p": _ROWS,
    "min_p": _ROWS,
    "top_h": _ROWS,
    "typical_p": _ROWS,
    "epsilon_cutoff": _ROWS,
    "eta_cutoff": _ROWS,
    "length_penalty": _ROWS,  # counts generated tokens alone
    "renormalize_logits": _ROWS,
    "remove_invalid_values": _ROWS,
    "exponential_decay_length_penalty": _ROWS,  # counted from the prompt's end
    "suppress_tokens": _ROWS,
    "begin_suppress_tokens": Option(LENGTH),  # where the prompt ends, but for a prompt of one token
    "forced_bos_token_id": Option(LENGTH),  # where the ids are one token
    "forced_eos_token_id": _ROWS,
    "repetition_penalty": Option(LENGTH, _but(1)),
    "encoder_repetition_penalty": Option(LENGTH, _but(1)),
    "no_repeat_ngram_size": Option(LENGTH, _but(0)),
    "encoder_no_repeat_ngram_size": Option(LENGTH, _but(0)),
    "bad_words_ids": Option(LENGTH),
    "sequence_bias": Option(LENGTH),
    "guidance_scale": Option(LENGTH, lambda value: value is None or value == 1),
    "negative_prompt_ids": Option(ALONE),
    "negative_prompt_attention_mask": Option(ALONE),
    "watermarking_config": Option(LENGTH),
    "prefix_allowed_tokens_fn": Option(ALONE),
    "logits_processor": Option(ALONE),
    # Which tokens are special.
    "pad_token_id": _ROWS,
    "bos_token_id": _ROWS,
    "eos_token_id": _ROWS,
    "decoder_start_token_id": Option(ALONE, lambda value: value is None or isinstance(value, int)),
    # What is kept between the forwards. Others than the dynamic caches hold more than the tokens so
    # far, or round the values of a batch together.
    "use_cache": _ROWS,
    "cache_implementation": Option(ALONE, _but("dynamic", "offloaded")),
    "cache_config": Option(ALONE),
    "max_cache_len": _ROWS,
    "low_memory": _ROWS,
    # What is returned.
    "output_attentions": _ROWS,
    "output_hidden_states": _ROWS,
    "output_scores": _ROWS,
    "output_logits": _ROWS,
    "return_dict_in_generate": _ROWS,
    "streamer": Option(ALONE),
    # Other forwards for the same tokens.
    "prefill_chunk_size": Option(SAVES),
    "assistant_model": Option(GUESSES),
    "prompt_lookup_num_tokens": Option(GUESSES),
    "assistant_early_exit": Option(GUESSES),
    "use_mtp": Option(GUESSES),
    "is_assistant": _ROWS,
    "num_assistant_tokens": _ROWS,
    "num_assistant_tokens_schedule": _ROWS,
    "assistant_confidence_threshold": _ROWS,
    "assistant_lookbehind": _ROWS,
    "target_lookbehind": _ROWS,
    "assistant_ensemble_weight": _ROWS,
    "max_matching_ngram_size": _ROWS,
    "speculation_type": _ROWS,
    "assistant_tokenizer": _ROWS,
    # Loops that are not those of transformers, or no longer; and prompts that are read anew.
    "custom_generate": Option(LOOP),
    "penalty_alpha": Option(LOOP, _but(0)),
    "dola_layers": Option(LOOP),
    "num_beam_groups": Option(LOOP, _but(1)),
    "diversity_penalty": Option(LOOP, _but(0)),
    "constraints": Option(LOOP),
    "force_words_ids": Option(LOOP),
    "token_healing": Option(LOOP),
    "continuous_batching_config": Option(LOOP),
    # How it is run.
    "generation_config": _ROWS,  # what it holds counts, one by one
    "compile_config": _ROWS,
    "disable_compile": _ROWS,
    "synced_gpus": _ROWS,
    "trust_remote_code": _ROWS,
    "tokenizer": _ROWS,
    "transformers_version": _ROWS,
}
_ASKING = {name: option for name, option in OPTIONS.items() if option.kind != ROWS}
#: Options of `generate` that change what each forward returns.
RETURNED = ("output_hidden_states", "output_attentions")


#: Options that are whole numbers, and the least that each may be.
_LEAST = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
}


def check_counts(given: Mapping[str, Any]) -> None:
    """Refuse, at its line, what is no count.

    Raises:
        InputError: an option that counts is no whole number, or too small.
    """
    for name, least in _LEAST.items():
        value = given.get(name)
        if value is None:
            continue
        whole = type(value) is not bool and hasattr(value, "__index__")
        if not whole or value.__index__() < least:
            raise InputError(
                f"`{name}={value!r:.60}`: it is a whole number, {least} or more; None leaves it to the "
                "model's own configuration."
            )


class Options:
    """The options of one generation: what the user gave, or else what the model's configuration says.

    Args:
        given: the keywords of the block.
        own: the model's `generation_config`.
    """

    __slots__ = ("_configs", "given")

    def __init__(self, given: Mapping[str, Any], own: Any) -> None:
        self.given = given
        self._configs = [c for c in (given.get("generation_config"), own) if c is not None]

    def get(self, name: str) -> Any:
        """The value of an option; None where nobody sets it. As in transformers, a keyword counts even
        where it is None, and what a given configuration leaves open is the model's own."""
        if name in self.given:
            return self.given[name]
        for config in self._configs:
            value = getattr(config, name, None)
            if value is not None:
                return value
        return None

    def asking(self, *kinds: str) -> Iterator[str]:
        """The options of these kinds that ask for anything."""
        for name, option in _ASKING.items():
            if option.kind in kinds and not option.is_neutral(self.get(name)):
                yield name

    def asks(self, *kinds: str) -> bool:
        return next(self.asking(*kinds), None) is not None

    def number(self, name: str) -> int:
        """A count that is 1 where nobody sets it."""
        return int(self.get(name) or 1)

    @property
    def repeats(self) -> int:
        """Rows of a forward for each row of a prompt."""
        return max(self.number("num_beams"), self.number("num_return_sequences"))

    def endings(self) -> torch.Tensor | None:
        """Token ids that end a generation."""
        ids = self.get("eos_token_id")
        return None if ids is None else torch.as_tensor(ids).flatten()

    def may_end(self) -> bool:
        """True if a generation may end before it has all of its tokens."""
        return self.endings() is not None or any(
            not OPTIONS[name].is_neutral(self.get(name))
            for name in ("max_time", "stop_strings", "stopping_criteria")
        )

    def without_steps(self) -> str | None:
        """What in these options makes forwards of which no one can be told that it is a step."""
        if self.get("cache_implementation") == "paged":
            return "cache_implementation='paged'"
        kinds = [LOOP]
        if self.get("do_sample") or self.get("assistant_ensemble_weight") is not None:
            kinds.append(GUESSES)  # others would be drawn without them
        return next(self.asking(*kinds), None)


def looks_at_steps(graph: Graph) -> bool:
    """True if a block reads, writes or stops anywhere inside a generation."""
    return bool(graph.stops) or any(
        node.kind in (READ, WRITE) and node.target.port != "result" for node in graph.nodes
    )


class Clock:
    """Tells a run which forward of the model is which step.

    Between two steps transformers asks its stopping criteria, the last of which this is. The first
    forward after that is the next step. Others, such as those of a logits processor for guidance,
    are no steps: the run does not listen to them.

    Attributes:
        begins_with: how many ids the first step continues.

    Args:
        run: who is told.
        count: rows of the prompts of this pass.
        endings: token ids that end a row; None where nobody asks which rows have ended.
        watches: tell which rows have ended.
        stops: rows may be stopped by the block.
        until: the step at whose beginning the run may be left.
    """

    def __init__(
        self,
        run: Run,
        count: int,
        endings: torch.Tensor | None,
        watches: bool,
        until: int | None = None,
    ) -> None:
        self._run = run
        self._count = count
        self._endings = endings
        self._watches = watches
        self._until = until
        self._step = -1
        self._waits = True
        self._outside = 0
        self._ended: set[int] = set()
        self.begins_with: int | None = None

    def begins(self, _: Any, args: Any, kwargs: Any) -> None:
        """A forward of the model begins."""
        run = self._run
        if not run.listens():
            return
        if not self._waits:
            self._outside, run.suspended = self._outside + 1, True
            return
        self._waits = False
        self._step += 1
        step = self._step
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs.get("decoder_input_ids", kwargs.get("inputs_embeds"))
        if not step and ids is not None:
            self.begins_with = ids.shape[1]
        if run.places is None and not self._watches:
            run.step = step  # the one invoke sees the whole value, whatever its rows are
            run.reached.update(dict.fromkeys(run.extents, step + 1))
            if step == self._until:
                raise Stop
            return
        rows = self._count if ids is None else ids.shape[0]
        if self._watches and step and ids is not None and ids.ndim == 2:
            self._watch(ids[:, -1])
        run.forward_begins(step, rows, step, self._ended)
        if step == self._until:
            raise Stop

    def _watch(self, last: torch.Tensor) -> None:
        """Note which prompts have ended, by the last ids of all rows."""
        if self._endings is not None:
            over = torch.isin(last, self._endings.to(last.device))
            self._ended.update(over.reshape(self._count, -1).all(1).nonzero().flatten().tolist())

    def ends(self, *_: Any) -> None:
        """A forward of the model has ended."""
        if self._outside:
            self._outside, self._run.suspended = 0, False

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """As a stopping criterion: a step has its token. No row ends by this."""
        self._waits = True
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


class StoppingClock(Clock):
    """A clock by which the rows end whose invokes were stopped."""

    # By it transformers knows that rows end one by one, and pads those that have ended.
    eos_token_id = None

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self._waits = True
        return torch.tensor(self._run.ended_rows(self._step, ids.shape[0]), device=ids.device)
