"""The main job on a small model: a first example to read. `python -m graftwork demo` runs it.

Three experiments, each one block: `logit_lens` (what would every layer say?), `ablate_heads` (which
heads matter?) and `patch` (where is the fact, when?). Below them is how the results are drawn.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from . import LanguageModel, apply
from .tracing.errors import LoadError

CITY = "Madison square garden is located in the city of"
GIFT, RECEIVER, GIVER = (
    "When Mary and John went to the store, John gave a drink to",
    " Mary",
    " John",
)
TOWER, TOWER_CITY = "The Eiffel Tower is in the city of", " Paris"
NEEDLE, NEEDLE_CITY = "The Space Needle is in the city of", " Seattle"


# -------------------------------------------------------------------- three experiments


class Lens(NamedTuple):
    """What `logit_lens` found.

    Attributes:
        text: the prompt and what the model made of it.
        shapes: of the hidden states of one layer, for each generated token: [1, token, d_model].
        columns: for each generated token, for each layer, the likeliest word and its probability.
    """

    text: str
    shapes: list[tuple[int, ...]]
    columns: list[list[tuple[str, float]]]


def logit_lens(model: Any, prompt: str, steps: int) -> Lens:
    """Generate, save each layer's hidden states, and decode what they hold for the next word."""
    states, best = [], []
    with model.generate(max_new_tokens=steps) as generator, generator.invoke(prompt) as invoker:
        for step in range(steps):
            if step > 0:
                invoker.next()  # what follows is about the next generated token
            for layer in model.transformer.h:
                hidden = layer.output[0].save()  # [1, token, d_model]
                # Modules can be applied at any point: here the model's own last ones.
                logits = model.lm_head(model.transformer.ln_f(hidden[:, -1]))
                best.append(logits.softmax(-1).max(-1).save())
                states.append(hidden)

    # Nothing has run until here. Now the saved proxies hold tensors.
    said = [(model.tokenizer.decode(b.value.indices), b.value.values.item()) for b in best]
    layers = len(model.transformer.h)
    columns = [said[start : start + layers] for start in range(0, len(said), layers)]
    shapes = [tuple(hidden.shape) for hidden in states[::layers]]
    return Lens(model.tokenizer.decode(generator.output[0]), shapes, columns)


def ablate_heads(model: Any, prompt: str, right: str, wrong: str) -> tuple[float, torch.Tensor]:
    """Silence each attention head in turn, by setting its value vectors to zero.

    Returns:
        The lead of `right` over `wrong`, a difference of logits, in the untouched model; and the
        lead with each head ablated [layer, head].
    """
    heads = model.config.n_head
    ablated = []
    with progress(model, "ablating heads") as show_progress, model.trace() as tracer:
        with tracer.invoke(prompt):
            show_progress()
            normal = model.lm_head.output[0, -1].save()  # [vocabulary]
        for layer in model.transformer.h:
            for head in range(heads):
                with tracer.invoke(prompt):
                    layer.attn.value.output[:, head] = 0  # [1, head, token, d_head]
                    ablated.append(model.lm_head.output[0, -1].save())

    leads = lead(model, torch.stack([logits.value for logits in ablated]), right, wrong)
    return lead(model, normal.value, right, wrong).item(), leads.view(-1, heads)


def patch(model: Any, source: str, target: str, right: str, wrong: str) -> torch.Tensor:
    """Run `target`, with one hidden state at a time taken from `source`.

    Args:
        source, target: prompts of the same number of tokens.
        right, wrong: what the model says after `source`, and after `target`.

    Returns:
        How far each hidden state moves the model from `wrong` to `right` [layer, token]: 0 not at
        all, 1 as far as running `source` itself. Measured by the lead of `right` over `wrong`.
    """
    patched = []
    with progress(model, "patching") as show_progress, model.trace() as tracer:
        with tracer.invoke(source):
            show_progress()
            states = [layer.output[0] for layer in model.transformer.h]  # [1, token, d_model]
            best = model.lm_head.output[0, -1].save()
        with tracer.invoke(target):
            worst = model.lm_head.output[0, -1].save()
        for layer, state in zip(model.transformer.h, states, strict=True):
            for token in range(len(tokens_of(model, source))):
                with tracer.invoke(target):
                    layer.output[0][:, token] = state[:, token]
                    patched.append(model.lm_head.output[0, -1].save())

    highest = lead(model, best.value, right, wrong)
    lowest = lead(model, worst.value, right, wrong)
    leads = lead(model, torch.stack([logits.value for logits in patched]), right, wrong)
    return ((leads - lowest) / (highest - lowest)).view(len(states), -1)


def lead(model: Any, logits: torch.Tensor, right: str, wrong: str) -> torch.Tensor:
    """By how much the logit of `right` is larger than that of `wrong`; logits [..., vocabulary]."""
    return logits[..., token_id(model, right)] - logits[..., token_id(model, wrong)]


def token_id(model: Any, word: str) -> int:
    """The (first) token of a word."""
    first: int = model.tokenizer.encode(word)[0]
    return first


def tokens_of(model: Any, prompt: str) -> list[str]:
    """The prompt, cut into its tokens."""
    return [model.tokenizer.decode([token]) for token in model.tokenizer.encode(prompt)]


@contextmanager
def progress(model: Any, what: str) -> Iterator[Callable[[], None]]:
    """A bar that counts layers while a block runs, shown if that takes more than two seconds."""
    layers = model.transformer.h
    with tqdm(
        total=len(layers), desc=what, unit="layer", delay=2, leave=False, disable=None
    ) as bar:

        def count_layers() -> None:
            for layer in layers:
                # Any function of your own can run at any point of the forward.
                apply(lambda _: bar.update(), layer.output).save()

        yield count_layers


# -------------------------------------------------------------------- drawing in a terminal

Cell = tuple[str, float]  # a text, and how strong it is, from 0 to 1


class Terminal:
    """Where the results are drawn.

    Attributes:
        width: columns that are used, at most 100.
        colour: a person looks at it, and has not set NO_COLOR (no-color.org).
    """

    def __init__(self) -> None:
        self.width = min(shutil.get_terminal_size().columns, 100)
        wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.colour = sys.stdout.isatty() and wanted

    def title(self, text: str) -> None:
        line = f"── {text} ".ljust(self.width, "─")[: self.width]
        print(f"\n\033[1m{line}\033[0m\n" if self.colour else f"\n{line}\n")

    def say(self, text: str) -> None:
        """Print a paragraph."""
        print(textwrap.fill(" ".join(text.split()), self.width))

    def heat_map(self, rows: Sequence[Sequence[Cell]], below: Sequence[Sequence[str]]) -> None:
        """Draw layers as rows, the last one on top, with lines of words under the columns."""
        label = len(f"layer {len(rows) - 1}  ")
        columns = list(zip(*rows, strict=True))
        texts = [max(len(text) for text, _ in column) for column in columns]
        words = [max(map(len, column)) for column in zip(*below, strict=True)]
        room = self.width - label
        for spare in (5, 3, 1):  # round the text: gap, shade and space; gap and shade; gap
            widths = [max(t + spare, w + 1) for t, w in zip(texts, words, strict=True)]
            if sum(widths) <= room:
                break
        upright = sum(widths) > room
        if upright:
            each = max(1, room // len(widths))
            widths = [each if each > max(texts) else min(each, 2)] * len(widths)
        print()
        for number, row in reversed(list(enumerate(rows))):
            drawn = [self.cell(cell, width) for cell, width in zip(row, widths, strict=True)]
            print((f"layer {number}".ljust(label) + "".join(drawn)).rstrip())
        for line in below:
            height = max(map(len, line)) if upright else 1
            for letter in range(height):
                shown = [word[letter : letter + 1] if upright else word for word in line]
                print((" " * label + "".join(map(under, shown, widths))).rstrip())
        print()

    def cell(self, cell: Cell, width: int) -> str:
        """The text, if it fits, on a ground that is fuller or brighter the stronger it is."""
        text, strength = cell
        level = min(max(int(strength * 5), 0), 4)
        gap = " " if width > 2 else ""  # narrow cells touch, and hold no text
        text = text if gap else ""
        width -= len(gap)
        if self.colour:
            ground, ink = ((235, 245), (17, 252), (54, 255), (161, 255), (214, 16))[level]
            return f"\033[48;5;{ground};38;5;{ink}m{text:^{width}}\033[0m{gap}"
        if len(text) + 4 <= width:
            text = f" {text} "
        return f"{text:{' ░▒▓█'[level]}^{width}}{gap}"


def under(word: str, width: int) -> str:
    """A word below a cell of that width, and the gap after it."""
    return f"{word:^{width - 1}} " if width > 2 else word.ljust(width)


def percent(share: float) -> str:
    """A share as a whole percentage; a dot for zero, so that the eye finds the rest."""
    number = round(share * 100)
    return str(number) if number else "·"


# -------------------------------------------------------------------- the tour


def show_logit_lens(terminal: Terminal, model: Any) -> None:
    terminal.title("1. What would each layer say?")
    lens = logit_lens(model, CITY, steps=3)
    terminal.say(f"""“{CITY}” … the model goes on: “{lens.text.removeprefix(CITY).strip()}”. Saved on
        the way were the hidden states of every layer: {list(lens.shapes[0])} for the prompt, then
        {list(lens.shapes[1])} for each further token.""")
    cells = [[(f"{word.strip()} {p:.0%}", p) for word, p in step] for step in lens.columns]
    said = [f"→ {step[-1][0].strip()}" for step in lens.columns]
    terminal.heat_map(list(zip(*cells, strict=True)), [said])
    terminal.say("""Each column is a generated token. From the bottom up: what the model would say if
        it stopped after that layer, and how sure it is (the logit lens). Try it on other prompts:
        which facts are settled early?""")


def show_ablation(terminal: Terminal, model: Any) -> None:
    terminal.title("2. Which attention heads matter?")
    normal, leads = ablate_heads(model, GIFT, RECEIVER, GIVER)
    change, (layers, heads) = leads - normal, leads.shape
    mary, john = RECEIVER.strip(), GIVER.strip()
    terminal.say(f"""“{GIFT}” … the logit of “{mary}” is {normal:.1f} higher than that of
        “{john}”. By how much does this change, with one head silenced?""")
    largest = change.abs().max().item()
    rows = [[(f"{c:+.1f}", abs(c) / largest) for c in row] for row in change.tolist()]
    terminal.heat_map(rows, [[f"h{head}" for head in range(heads)]])
    for_mary, for_john = (divmod(int(i), heads) for i in (change.argmin(), change.argmax()))
    terminal.say(f"""All {layers * heads} ablations are one block, and ran as one batch. Head
        {for_mary[1]} of layer {for_mary[0]} speaks most for “{mary}”: without it she loses
        {-change.min():.1f}. Head {for_john[1]} of layer {for_john[0]} speaks against her: without it
        she gains {change.max():.1f}. Try two heads at once: does one stand in for another?""")


def show_patch(terminal: Terminal, model: Any) -> None:
    terminal.title("3. Where is the fact, and when?")
    source, target = tokens_of(model, TOWER), tokens_of(model, NEEDLE)
    if len(source) != len(target):
        terminal.say("This model cuts the two prompts into different numbers of tokens.")
        return
    effect = patch(model, TOWER, NEEDLE, TOWER_CITY, NEEDLE_CITY)
    terminal.say(f"""“{NEEDLE}” runs once for each cell, with the one hidden state at that layer and
        token taken from “{TOWER}”.""")
    rows = [[(percent(share), share) for share in row] for row in effect.tolist()]
    taken = [a.strip() if a != b else "" for a, b in zip(source, target, strict=True)]
    terminal.heat_map(rows, [[token.strip() for token in target], taken])
    first, last = (target[int(effect[layer].argmax())].strip() for layer in (0, -1))
    terminal.say(f"""100: the model leans to “{TOWER_CITY.strip()}” as if the whole prompt had been
        replaced. Dot: it still leans to “{NEEDLE_CITY.strip()}”. After layer 0 the strongest place is
        “{first}”, after layer {len(rows) - 1} it is “{last}”. Try `layer.mlp.output` or
        `layer.attn.output[0]` instead of `layer.output[0]`, to see who moves it.""")


def main(name: str = "graftwork/tiny") -> None:
    """Load a GPT-2 and run the three experiments on it.

    Raises:
        GraftworkError: there is no such model, or it has other module names than GPT-2.
    """
    terminal = Terminal()
    model = LanguageModel(name)
    if model.config.model_type != "gpt2":
        raise LoadError(
            f"The demo uses the module names of GPT-2; {name!r} is another architecture."
        )
    size = sum(parameter.numel() for parameter in model.module_tree().parameters())
    terminal.say(f"""{name}: {len(model.transformer.h)} layers of {model.config.n_head} heads,
        {size / 1e6:.1f} million parameters.""")
    show_logit_lens(terminal, model)
    show_ablation(terminal, model)
    show_patch(terminal, model)
    terminal.title("Next")
    terminal.say(f"""The code of the three experiments is the first page of {__file__}; README.md has
        more, shorter examples.""")
