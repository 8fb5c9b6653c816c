"""Owns what a model says of a prompt, and what in it says so: ranks and probabilities of answers, the
logit lens, and direct logit attribution.

What changes runs to find causes is in `patching`, `attribution` and `path_patching`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..envoy.names import write_name
from ..tracing.errors import InputError
from .activation_cache import AnySlice, Tokens
from .patching import prompt_of, record_hooks

# -------------------------------------------------------------------- answers of a prompt


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a model rates one answer of a prompt, token by token.

    Attributes:
        tokens: its ids, [token].
        words: the tokens as text.
        ranks: of each among all tokens, 0 for the most likely.
        logits, probabilities: of each, [token].
        top: for each token, the most likely ones there, as (text, logit, probability).
    """

    tokens: torch.Tensor
    words: list[str]
    ranks: list[int]
    logits: torch.Tensor
    probabilities: torch.Tensor
    top: list[list[tuple[str, float, float]]]

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def log_probability(self) -> float:
        """Of the whole answer after the prompt, in nats."""
        return float(self.probabilities.double().log().sum())


@dataclasses.dataclass(frozen=True)
class PromptTest:
    """A prompt and how a model rates answers of it. `print(test)` shows a table.

    Attributes:
        words: the prompt's tokens as text.
        answers: in the order in which they were given.
    """

    words: list[str]
    answers: list[Answer]

    def __str__(self) -> str:
        lines = [f"Tokenized prompt: {self.words}"]
        for answer in self.answers:
            lines.append(f"Tokenized answer: {answer.words}")
            for number, word in enumerate(answer.words):
                lines.append(
                    f"Performance on answer token {word!r}: rank {answer.ranks[number]}, logit "
                    f"{answer.logits[number]:.2f}, probability {answer.probabilities[number]:.2%}"
                )
                for place, (text, logit, probability) in enumerate(answer.top[number]):
                    lines.append(
                        f"  top {place:>3}  logit {logit:6.2f}  probability {probability:7.2%}  "
                        f"{text!r}"
                    )
        ranks = [list(zip(a.words, a.ranks, strict=True)) for a in self.answers]
        lines.append(f"Ranks of the answer tokens: {ranks[0] if len(ranks) == 1 else ranks}")
        return "\n".join(lines)


def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = False,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> PromptTest:
    """Rank and probability of the right answer of a prompt, and what else is likely.

    Args:
        answer: one answer, or several; each may have several tokens, which are all rated, each after
            those before it.
        model: a HookedTransformer.
        prepend_space_to_answer: put a space before answers that do not begin with one.
        print_details: also write the table to the standard output.
        prepend_bos: whether the prompt begins with the beginning-of-text token; default the model's.
        top_k: how many likely tokens to keep for each token of an answer.

    Returns:
        What was found; `str` of it is a table.

    Raises:
        InputError: no answer, or an answer without tokens.

    Source: TransformerLens, utilities/exploratory_utils.py.
    """
    answers = [answer] if isinstance(answer, str) else list(answer)
    if prepend_space_to_answer:
        answers = [one if one.startswith(" ") else f" {one}" for one in answers]
    if not answers:
        raise InputError("There is no answer to rate: give a text or several.")
    start = model.to_tokens(prompt, prepend_bos=prepend_bos)
    endings = [model.to_tokens(one, prepend_bos=False) for one in answers]
    if any(not one.numel() for one in endings):
        raise InputError("An answer without tokens cannot be rated.")
    boxes, length = [], start.shape[1]
    with torch.no_grad(), model.model.trace() as tracer:
        for ending in endings:
            ids = torch.cat([start, ending], 1)
            with tracer.invoke(input_ids=ids, attention_mask=torch.ones_like(ids)):
                record_hooks(model)
                boxes.append(tracer.output.logits[0, length - 1 : ids.shape[1] - 1].save())
    found = [
        _rated(model, ending[0], box.value.float(), top_k)
        for ending, box in zip(endings, boxes, strict=True)
    ]
    result = PromptTest(model.to_str_tokens(start[0]), found)
    if print_details:
        sys.stdout.write(f"{result}\n")
    return result


# pytest takes the name for that of a test, wherever it is imported.
test_prompt.__test__ = False  # type: ignore[attr-defined]


def _rated(model: Any, ids: torch.Tensor, logits: torch.Tensor, top_k: int) -> Answer:
    """An answer [token] and the logits before each of its tokens, [token, d_vocab]."""
    each = torch.arange(len(ids), device=logits.device)
    probabilities, ids = logits.softmax(-1), ids.to(logits.device)
    own = logits[each, ids]
    best = logits.topk(min(top_k, logits.shape[-1]), -1).indices
    return Answer(
        ids,
        model.to_str_tokens(ids),
        (logits > own[:, None]).sum(-1).tolist(),
        own,
        probabilities[each, ids],
        [
            [
                (model.to_single_str_token(int(i)), float(logits[n, i]), float(probabilities[n, i]))
                for i in row
            ]
            for n, row in enumerate(best)
        ],
    )


# -------------------------------------------------------------------- logit lens


@dataclasses.dataclass(frozen=True)
class LogitLens:
    """What each residual stream would say if it were the last.

    Attributes:
        logits: [stream, batch, pos, d_vocab].
        labels: of the streams: "0_pre", "0_mid", …, "final_post".
        model: which unembedded them.
    """

    logits: torch.Tensor
    labels: list[str]
    model: Any

    def top_ids(self, k: int = 1) -> torch.Tensor:
        """Ids of the most likely tokens, [stream, batch, pos, k]."""
        return self.logits.topk(k, -1).indices

    def top_tokens(self, k: int = 1) -> list[Any]:
        """The same as texts, nested: stream, prompt, position, and the k tokens there."""

        def texts(ids: torch.Tensor) -> Any:
            return (
                [self.model.to_single_str_token(int(i)) for i in ids]
                if ids.ndim == 1
                else [texts(one) for one in ids]
            )

        found: list[Any] = texts(self.top_ids(k))
        return found

    def ranks(self, token: int | str) -> torch.Tensor:
        """The rank of one token everywhere, [stream, batch, pos]; 0 for the most likely."""
        one = self.model.to_single_token(token) if isinstance(token, str) else int(token)
        return (self.logits > self.logits[..., one, None]).sum(-1)

    def __str__(self) -> str:
        rows = [
            [self.labels[n], *(words[0] for words in prompt)]
            for n, stream in enumerate(self.top_tokens())
            for prompt in stream
        ]
        widths = [max(len(repr(row[i])) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                (text if i == 0 else repr(text)).ljust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def logit_lens(
    model: Any, prompt: Any, layers: Sequence[int] | None = None, mid: bool = False
) -> LogitLens:
    """The residual stream before each layer and behind the last, through the model's own end.

    Each stream takes the place of the last one, so that the final norm, the unembedding and whatever
    a model does with its logits (caps, scales) are the model's own. The layers run once.

    Args:
        model: a HookedTransformer.
        prompt: text, texts or ids.
        layers: before which layers; the number of layers means behind the last. Default all.
        mid: also between attention and MLP of each of these layers.

    Returns:
        Logits [stream, batch, pos, d_vocab] with labels.

    Raises:
        InputError: a layer that does not exist, or none.
        UnavailableNameError: `mid` in parallel blocks, where there is nothing between.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    count = len(model._vocabulary)
    wanted = list(range(count + 1)) if layers is None else [int(i) for i in layers]
    wanted = [i + count if i < 0 else i for i in wanted]
    if not wanted or not all(0 <= i <= count for i in wanted):
        raise InputError(
            f"layers={list(layers or ())}: streams are before layers 0 to {count - 1}, or {count}"
        )
    places: list[tuple[int, str, str]] = []
    for i in wanted:
        places.append((i, "resid_pre", f"{i}_pre") if i < count else (i, "", "final_post"))
        if mid and i < count:
            places.append((i, "resid_mid", f"{i}_mid"))
    given, names, boxes = prompt_of(model, prompt), model._vocabulary, []
    with torch.no_grad(), model.model.trace() as tracer:
        with tracer.invoke(**given):
            record_hooks(model)
            streams = [names.read(i, name) if name else None for i, name, _ in places]
        for stream in streams:
            with tracer.invoke(**given):
                record_hooks(model)
                if stream is not None:
                    write_name(model.model, names, count - 1, "resid_post", stream)
                boxes.append(tracer.output.logits.save())
    logits = torch.stack([box.value for box in boxes])
    return LogitLens(logits, [label for *_, label in places], model)


# -------------------------------------------------------------------- direct logit attribution


@dataclasses.dataclass(frozen=True)
class LogitAttribution:
    """What each component adds to a logit, or to the difference of two.

    Attributes:
        values: [component, *batch, *pos].
        labels: of the components: "L0H0", …, "0_mlp_out", …, "embed", "pos_embed", "bias".
        bias: what the biases behind the stream add, of the final norm and the unembedding.
    """

    values: torch.Tensor
    labels: list[str]
    bias: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """The logit as the unembedding gives it, [*batch, *pos]: before a cap, if there is one."""
        total = self.values.sum(0)
        return total + self.bias.reshape(*self.bias.shape, *[1] * (total.ndim - self.bias.ndim))

    def __getitem__(self, label: str) -> torch.Tensor:
        if label not in self.labels:
            raise InputError(f"no component is called {label!r}: {', '.join(self.labels[:4])}, …")
        return self.values[self.labels.index(label)]

    def heads(self) -> torch.Tensor:
        """Those of the heads, [layer, head, *batch, *pos]."""
        where = [i for i, label in enumerate(self.labels) if label.startswith("L")]
        layers = len({self.labels[i].partition("H")[0] for i in where})
        return self.values[where].reshape(layers, -1, *self.values.shape[1:])

    def mlps(self) -> torch.Tensor:
        """Those of the MLPs, [layer, *batch, *pos]."""
        return self.values[[i for i, one in enumerate(self.labels) if one.endswith("_mlp_out")]]


_FOR_ATTRIBUTION = ("hook_z", "hook_mlp_out", "hook_embed", "hook_pos_embed", "hook_scale")


def direct_logit_attribution(
    model: Any,
    prompt: Any,
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    pos_slice: AnySlice = -1,
) -> LogitAttribution:
    """What heads, MLPs, embeddings and biases add to a token's logit on the direct path.

    The final norm is taken as linear, with the scale of the run; so the values and `bias` sum to the
    logit exactly.

    Args:
        model: a HookedTransformer.
        prompt: text, texts or ids.
        tokens: whose logit: see `ActivationCache.logit_attrs`.
        incorrect_tokens: whose logits are subtracted.
        pos_slice: positions; default the last.

    Raises:
        InputError: texts of several tokens, or a model whose sums are normalized (BERT).
        ShapeError: tokens that do not fit the prompts.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022,
    Interpretability in the Wild (logit differences).
    """
    with torch.no_grad():
        _, cache = model.run_with_cache(
            prompt, return_type=None, names_filter=lambda name: name.endswith(_FOR_ATTRIBUTION)
        )
        stack, labels = cache.get_full_resid_decomposition(
            expand_neurons=False, pos_slice=pos_slice, return_labels=True
        )
        values = cache.logit_attrs(stack, tokens, incorrect_tokens, pos_slice)
        return LogitAttribution(values, labels, cache.logit_bias(tokens, incorrect_tokens))
