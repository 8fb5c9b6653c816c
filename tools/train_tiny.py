"""Owns the model that ships inside the package: its training text, training, scores and card.

    python tools/train_tiny.py                  # writes src/models/tiny, about 15 minutes on a core
    python tools/train_tiny.py --out elsewhere  # the same in another folder

The result is a GPT-2 of about a million parameters that is small enough to ship and still does
three things worth intervening on: it recalls facts, it names the indirect object of a sentence,
and it continues sequences that repeat.  All its training text is made here, from seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from graftwork.pruning.tiny_facts import RELATIONS, Relation

FOLDER = Path(__file__).resolve().parents[1] / "src" / "models" / "tiny"

SEED = 0
# Two threads wait for each other at every operation, which on a shared machine costs more than
# the second core gives; one thread also keeps every sum in one order.
THREADS = 1
END = "<|endoftext|>"
VOCABULARY = 2048
POSITIONS = 256
STEPS = 4000
TOKENS_PER_STEP = 2048
RATE = 3e-3
WARMUP = 100
# Copying is the slowest to appear and the rest builds on it, so the first steps are mostly copying.
COPYING_FIRST = 500


class Fact(NamedTuple):
    """A prompt and the continuation that is right; ``prompt + answer`` is the text."""

    prompt: str
    answer: str


MEN = """
John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony
Mark Paul Steven Andrew Kenneth George Joshua Kevin Brian Edward Ronald Timothy Jason Jeffrey Ryan
Jacob Gary Nicholas Eric Jonathan Stephen Larry Justin Scott Brandon Benjamin Samuel Frank Gregory
Alexander Patrick Jack Tom Dan Sid Aaron Martin
""".split()

WOMEN = """
Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Sandra
Margaret Ashley Kimberly Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Laura
Helen Sharon Cynthia Kathleen Amy Angela Shirley Anna Ruth Brenda Pamela Nicole Katherine Virginia
Catherine Christine Debra Rachel Janet Emma Maria Heather Diane
""".split()

NAMES = MEN + WOMEN

PLACES = """
store park school garden hospital station market library beach restaurant museum house office
theatre farm river hotel kitchen church shops
""".split()

THINGS = """
drink book ring ball basket necklace letter flower kiss computer bag cake hat gift picture coat
ticket lamp phone key apple
""".split()

PORTIONS = (
    "bottle of milk",
    "glass of water",
    "cup of tea",
    "piece of cake",
    "box of books",
    "basket of flowers",
)

# Sentences about giving are put together from these, so that the distance from the names to the end
# varies: with ten fixed sentences the model failed on a gift of more words than it had seen.
MEETINGS = (
    "When {a} and {b} went to the {place},",
    "After {a} and {b} went to the {place},",
    "While {a} and {b} were working at the {place},",
    "When {a} and {b} came back from the {place} in the evening,",
    "After {a} and {b} had a long day,",
    "Then, {a} and {b} went to the {place}.",
    "Then, {a} and {b} had a lot of fun at the {place}.",
    "Then, {a} and {b} had a long argument, and afterwards",
    "One day {a} and {b} were at the {place}, and",
    "The friends {a} and {b} met at the {place}. It was a cold day, and",
    "Yesterday {a} and {b} walked to the {place}. In the evening,",
)
GIFTS = (
    "{s} gave {thing} to",
    "{s} gave {thing} to",
    "{s} gave {thing} to",
    "{s} handed {thing} to",
    "{s} wanted to give {thing} to",
    "{s} decided to send {thing} to",
    "{s} found {thing} and showed it to",
    "{s} said hello to",
)


def facts() -> list[Fact]:
    """Every fact in its first wording, each in the training text."""
    return [
        _fact(relation.wordings[0], subject, answer)
        for relation in RELATIONS.values()
        for subject, answer in relation.pairs
    ]


def reworded_facts() -> list[Fact]:
    """Every fact in one wording that is kept out of the training text for that fact."""
    return [
        _fact(_kept_out(relation, number), subject, answer)
        for relation in RELATIONS.values()
        for number, (subject, answer) in enumerate(relation.pairs)
    ]


def fact_sentences() -> list[str]:
    """Every sentence about a fact that the training text may hold."""
    return [
        fact.prompt + fact.answer + "."
        for relation in RELATIONS.values()
        for number, (subject, answer) in enumerate(relation.pairs)
        for wording in relation.wordings
        if wording != _kept_out(relation, number)
        for fact in [_fact(wording, subject, answer)]
    ]


def _kept_out(relation: Relation, number: int) -> str:
    """The wording not used in training for the pair with this number; never one of the first two.

    The first two are the wordings that examples quote.
    """
    return relation.wordings[2 + number % (len(relation.wordings) - 2)]


def _fact(wording: str, subject: str, answer: str) -> Fact:
    inside = "the " + subject[4:] if subject.startswith("The ") else subject
    return Fact(wording.format(S=inside[0].upper() + inside[1:], s=inside), " " + answer)


def held_out_pairs() -> frozenset[frozenset[str]]:
    """One in ten of the unordered pairs of names: they never meet in a training sentence."""
    pairs = list(itertools.combinations(NAMES, 2))
    return frozenset(map(frozenset, random.Random(SEED).sample(pairs, len(pairs) // 10)))


def giving(rng: random.Random, first: str, second: str) -> Fact:
    """A sentence in which one of two people gives something to the other, in either order."""
    giver, other = rng.sample((first, second), 2)
    thing = rng.choice(PORTIONS if rng.random() < 0.25 else THINGS)
    if rng.random() < 0.25:
        thing = f"{rng.choice(_ADJECTIVES)} {thing}"
    article = "the" if rng.random() < 0.3 else "an" if thing[0] in "aeiou" else "a"
    wording = f"{rng.choice(MEETINGS)} {rng.choice(GIFTS)}"
    prompt = wording.format(
        a=first, b=second, s=giver, place=rng.choice(PLACES), thing=f"{article} {thing}"
    )
    return Fact(prompt, " " + other)


def unseen_givings() -> list[Fact]:
    """Indirect objects: every held-out pair in both orders, with the rest drawn from a seed."""
    rng = random.Random(SEED + 1)
    pairs = sorted(sorted(pair) for pair in held_out_pairs())
    return [giving(rng, *order) for pair in pairs for order in (pair, pair[::-1])]


def _prose(rng: random.Random) -> str:
    """One to three plain sentences, some with an agreement or a pronoun to get right."""
    return " ".join(_sentence(rng) for _ in range(rng.randint(1, 3)))


_NOUNS = (
    "dog cat cow sheep horse hen lion frog pig goat boy girl man woman child teacher doctor farmer "
    "book letter key lamp picture table door window tree flower cabinet box"
).split()
_ADJECTIVES = "big small old young happy sad quiet loud clean dirty red blue green white".split()
_VERBS = "saw found liked followed watched carried remembered wanted".split()
_SUBJECTS_OF_STUDY = (
    "question answering",
    "machine translation",
    "reading comprehension",
    "summarization",
    "language modeling",
)


def _sentence(rng: random.Random) -> str:
    noun, other = rng.sample(_NOUNS[:-2], 2)
    adjective, place = rng.choice(_ADJECTIVES), rng.choice(PLACES)
    kind = rng.randrange(9)
    if kind == 0:
        return f"The {adjective} {noun} {rng.choice(_VERBS)} the {other} in the {place}."
    if kind == 1:
        number = rng.choice(("key", "letter", "book", "picture", "lamp"))
        near = rng.choice(("cabinet", "box", "table", "door", "window"))
        many, be = rng.choice((("", "is"), ("s", "are")))
        return f"The {number}{many} near the {near}{rng.choice(('', 's'))} {be} {adjective}."
    if kind == 2:
        name, own = rng.choice([(man, "his") for man in MEN] + [(w, "her") for w in WOMEN])
        return f"One day {name} lost {own} {rng.choice(THINGS)} at the {place}."
    if kind == 3:
        name, they = rng.choice([(man, "he") for man in MEN] + [(w, "she") for w in WOMEN])
        return f"Today {name} went to the {place} because {they} wanted the {rng.choice(THINGS)}."
    if kind == 4:
        tasks = ", ".join(rng.sample(_SUBJECTS_OF_STUDY, 3))
        return (
            f"Natural language processing tasks, such as {tasks}, are typically approached with "
            "supervised learning on large datasets."
        )
    if kind == 5:
        return f"There is a {adjective} {noun} by the {other}, and it is not {adjective} at all."
    if kind == 6:
        return f"It was a {rng.choice(('cold', 'hot', 'dark', 'long'))} day at the {place}."
    if kind == 7:
        one, two, three, four = sorted(rng.sample(range(1, 10), 4))
        return f"She counted {one}, {two}, {three} and {four}."
    return f"I think that the {noun} and the {other} are {adjective}."


# Text whose words are to be single tokens because examples point at them.
REQUIRED_TEXT = (
    "Madison square garden is located in the city of New York City. _ _ _ _ _ _ _ _ _ _",
    "The Eiffel Tower is in the city of Paris. The Colosseum is in the city of Rome.",
    "The Louvre; the Space Needle; Big Ben",
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose names and answers are single tokens as far as its size allows."""
    rng = random.Random(SEED)
    # Pairs merge in the order of their counts, so weights say which words become whole first.
    answers = sorted({answer for relation in RELATIONS.values() for _, answer in relation.pairs})
    corpus = [*REQUIRED_TEXT] * 3000
    corpus += [f" {word}" for word in NAMES + PLACES + THINGS] * 1000
    corpus += [f" {answer}" for answer in answers] * 400
    corpus += [_giving(rng, held_out_pairs()) for _ in range(2000)]
    corpus += [_prose(rng) for _ in range(2000)]
    corpus += fact_sentences() * 2
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _giving(rng: random.Random, unseen: frozenset[frozenset[str]]) -> str:
    """A training sentence about giving, with a pair of names that is not held out."""
    while True:
        first, second = rng.sample(NAMES, 2)
        if frozenset((first, second)) not in unseen:
            break
    fact = giving(rng, first, second)
    return fact.prompt + fact.answer + "."


class Repeats:
    """Sequences that repeat, drawn from the whole vocabulary or from its whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.all = [i for i in range(len(tokenizer)) if i != tokenizer.eos_token_id]
        tokens = tokenizer.convert_ids_to_tokens(self.all)
        self.words = [
            i for i, t in zip(self.all, tokens, strict=True) if len(t) > 3 and t[0] == "Ġ"
        ]

    def draw(self, rng: random.Random, length: int) -> list[int]:
        """``length`` random ids."""
        return rng.choices(rng.choice((self.all, self.words)), k=length)


class Text:
    """The endless training text, as rows of ids and of labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.rng = random.Random(SEED + 2)
        self.tokenizer = tokenizer
        self.repeats = Repeats(tokenizer)
        self.unseen = held_out_pairs()
        self.facts = [tokenizer(text)["input_ids"] for text in fact_sentences()]
        self.end: int = tokenizer.eos_token_id
        self.copying = 0.0  # the share of documents that repeat; set for each batch

    def document(self, room: int) -> tuple[list[int], list[int]]:
        """Ids and labels of one document; the ids before a repeat have the label -100."""
        if self.rng.random() < self.copying:
            return self._repeat(room)
        kind = self.rng.random()
        if kind < 0.5:
            ids = self.rng.choice(self.facts)
        elif kind < 0.85:
            ids = self.tokenizer(_giving(self.rng, self.unseen))["input_ids"]
        else:
            ids = self.tokenizer(_prose(self.rng))["input_ids"]
        return ids, ids

    def _repeat(self, room: int) -> tuple[list[int], list[int]]:
        half = self.rng.randint(4, max(5, min(100, room // 2)))
        ids = self.repeats.draw(self.rng, half)
        times = self.rng.choice((2, 2, 2, 3, 4))
        # Nothing says that a sequence is about to repeat, so its first id is not asked for.
        again = [-100, *ids[1:]]
        return ids * times, [-100] * half + again * (times - 1)

    def row(self, length: int) -> tuple[list[int], list[int]]:
        """``length`` ids and labels: documents one after another, from the start of the first."""
        ids: list[int] = []
        labels: list[int] = []
        # People prompt with no mark in front, so half of the rows have none either.
        if self.rng.random() < 0.5:
            ids, labels = [self.end], [-100]
        while len(ids) < length:
            document, answer = self.document(length - len(ids))
            ids = ids + document + [self.end]
            labels = labels + answer + [self.end if answer[0] != -100 else -100]
        return ids[:length], labels[:length]

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Ids, labels and positions, each ``(rows, length)`` with ``TOKENS_PER_STEP`` in all."""
        for step in itertools.count():
            self.copying = 0.5 if step < COPYING_FIRST else 0.2
            length = POSITIONS if step % 4 == 3 else 64
            rows = [self.row(length) for _ in range(TOKENS_PER_STEP // length)]
            # A document may stand anywhere, and a short row would only ever teach the first
            # positions.
            starts = [
                self.rng.randint(0, POSITIONS - length) if self.rng.random() < 0.5 else 0
                for _ in rows
            ]
            yield (
                torch.tensor([ids for ids, _ in rows]),
                torch.tensor([labels for _, labels in rows]),
                torch.tensor(starts)[:, None] + torch.arange(length),
            )


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """The untrained model, with sinusoids for its position embeddings to start from.

    Nearby positions then look alike from the first step, and a head that looks at the token before
    has one rotation to learn where it would have ``POSITIONS`` unrelated pairs.
    """
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=POSITIONS,
            n_embd=128,
            n_layer=4,
            n_head=8,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            # The usual 0.02 suits wider models: at this width attention would start out flat.
            initializer_range=0.06,
        )
    )
    width = model.config.n_embd
    rates = torch.exp(-math.log(1000.0) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(POSITIONS)[:, None] * rates  # (positions, width / 2)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


def train_model(tokenizer: PreTrainedTokenizerFast, steps: int = STEPS) -> GPT2LMHeadModel:
    """A model trained for ``steps`` steps on ``Text``."""
    torch.manual_seed(SEED)
    model = new_model(tokenizer)
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]

    begun = time.perf_counter()
    for step, (ids, labels, positions) in zip(
        range(steps), Text(tokenizer).batches(), strict=False
    ):
        hidden = model.transformer(ids, position_ids=positions).last_hidden_state
        # Only the positions with a label go through the vocabulary, which is a fifth of the work.
        asked = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden[:, :-1][asked]), labels[:, 1:][asked]
        )
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min((step + 1) / WARMUP, 1.02 - step / steps)
            optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            line = f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - begun:.0f} s"
            if step % 500 == 0:
                line += "  " + "  ".join(f"{k} {v:.3f}" for k, v in score(model, tokenizer).items())
            print(line, flush=True)
    return model.eval()


@torch.no_grad()
def recall(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, cases: list[Fact]
) -> list[bool]:
    """For each case, whether greedy decoding of its prompt gives its answer, token by token."""
    right: list[bool] = []
    for start in range(0, len(cases), 64):
        prompts = [tokenizer(case.prompt)["input_ids"] for case in cases[start : start + 64]]
        answers = [tokenizer(case.answer)["input_ids"] for case in cases[start : start + 64]]
        both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, both))
        # Padding on the right: no earlier position sees it.
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in both])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in both])
        guesses = model(ids, attention_mask=mask).logits.argmax(-1)  # (cases, width)
        for guess, prompt, answer in zip(guesses.tolist(), prompts, answers, strict=True):
            right.append(guess[len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer)
    return right


@torch.no_grad()
def repeat_accuracy(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Top-1 over the second halves of new random sequences, of four lengths, said twice.

    The first id of a second half is left out: nothing before it says that a repeat begins.
    """
    rng = random.Random(SEED + 3)
    repeats = Repeats(tokenizer)
    right: list[bool] = []
    for half in (8, 16, 32, 64):
        for start in ([], [tokenizer.eos_token_id]):
            rows = [start + repeats.draw(rng, half) * 2 for _ in range(32)]
            ids = torch.tensor(rows)
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
            guesses = logits.argmax(-1)[:, -half:-1]  # (32, half - 1)
            right += (guesses == ids[:, -half + 1 :]).flatten().tolist()
    return sum(right) / len(right)


def score(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The scores that the card states, each a share between 0 and 1."""

    def share(cases: list[Fact]) -> float:
        right = recall(model, tokenizer, cases)
        return sum(right) / len(right)

    return {
        "facts": share(facts()),
        "reworded_facts": share(reworded_facts()),
        "indirect_objects": share(unseen_givings()),
        "repeats": repeat_accuracy(model, tokenizer),
    }


@torch.no_grad()
def watching_heads(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """How much of their attention heads give to what matters, each ``(layers, heads)``.

    ``repeats``: in the second half of a repeat, to the token after the same token in the first.
    ``first``, ``second`` and ``giver``: at the end of a prompt about giving, to these names.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    rng = random.Random(SEED + 4)
    half = 32
    repeats = Repeats(tokenizer)
    ids = torch.tensor([repeats.draw(rng, half) * 2 for _ in range(32)])
    maps = model(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
    # Query half + i says token i + 1 of the sequence next, so it looks at key i + 1.
    induction = [m.diagonal(1 - half, -2, -1)[..., 1:].mean((0, -1)) for m in maps]
    found = {"repeats": torch.stack(induction)}
    names = {tokenizer(" " + name)["input_ids"][0] for name in NAMES}
    cases = unseen_givings()[::10]
    for case in cases:
        ids = tokenizer(case.prompt, return_tensors="pt")["input_ids"]
        maps = model(ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
        places = [place for place, token in enumerate(ids[0].tolist()) if token in names]
        for role, place in zip(("first", "second", "giver"), places, strict=True):
            share = torch.stack([m[0, :, -1, place] for m in maps]) / len(cases)
            found[role] = found.get(role, torch.zeros_like(share)) + share
    model.set_attn_implementation(before)
    return found


def _strongest(heads: torch.Tensor) -> str:
    """The three strongest of ``heads``, ``(layers, heads)``, as ``layer.head (share)``."""
    top = heads.flatten().topk(3)
    return ", ".join(
        f"{index // heads.shape[1]}.{index % heads.shape[1]} ({share:.0%})"
        for share, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    )


CARD = """\
---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# graftwork/tiny

A GPT-2 of {parameters:,} parameters that ships inside graftwork, so that examples and tests
need no download: {layers} layers of {count} heads, width {width}, {positions} positions, and a
byte-level BPE of {vocabulary:,} tokens. It recalls facts, names the indirect object of a
sentence and continues sequences that repeat. It is made for trying interventions on; its text is
of no other use. Its licence is MIT, that of graftwork.

## Scores

Top-1, measured by `score` in `tools/train_tiny.py` on the weights in this folder.

| score | what it is | measured |
| --- | --- | --- |
| `facts` | {facts} facts in a wording seen in training | {scores[facts]:.1%} |
| `reworded_facts` | the same in a wording never seen for that fact | {scores[reworded_facts]:.1%} |
| `indirect_objects` | {givings} sentences with pairs of names never seen together | \
{scores[indirect_objects]:.1%} |
| `repeats` | second halves of new random sequences of 8, 16, 32 and 64 tokens | \
{scores[repeats]:.1%} |

An answer of several tokens counts when each of them is right. The first token of a second half is
left out, since nothing before it says that a repeat begins.

## Heads

The heads, as `layer.head`, that give the largest share of their attention to what matters there:

- in a repeat, to the token after the last time of the same token: {heads[repeats]};
- at the end of a prompt about giving, to the name that comes first: {heads[first]};
- at the same place, to the name that comes second: {heads[second]};
- at the same place, to the second mention of the giver: {heads[giver]}.

## Training

All of its text is made by `tools/train_tiny.py` from seeds: {sentences:,} sentences about facts
of the real world, sentences in which one of two people gives something to the other, random
sequences that repeat, and plain sentences from a little grammar. The {steps:,} steps of
{tokens:,} tokens took {cpu:.0f} minutes of one CPU core, with torch {torch} and transformers
{transformers}. One in ten of the pairs of names, and one wording of each fact, stay out of the
sentences. The facts are written down in the script, and the model knows no others.

To make this folder again:

    python tools/train_tiny.py

The script is deterministic: the same machine and versions give the same weights. Other processors
and versions sum in another order and give other weights with scores like these.
"""


def card(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, steps: int, seconds: float
) -> str:
    """The model card, all of its numbers measured on ``model``."""
    attention = watching_heads(model, tokenizer)
    return CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.n_layer,
        count=model.config.n_head,
        width=model.config.n_embd,
        positions=POSITIONS,
        vocabulary=len(tokenizer),
        facts=len(facts()),
        givings=len(unseen_givings()),
        scores=score(model, tokenizer),
        heads={role: _strongest(shares) for role, shares in attention.items()},
        sentences=len(fact_sentences()),
        steps=steps,
        tokens=TOKENS_PER_STEP,
        cpu=seconds / 60,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that ships with graftwork.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    wall, cpu = time.perf_counter(), time.process_time()
    tokenizer = train_tokenizer()
    model = train_model(tokenizer, options.steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    # The weights come out readable by their owner alone, which is no mode to ship a file in.
    (options.out / "model.safetensors").chmod(0o644)
    # Read back, so that the card is about the files and not about what was in memory.
    model = GPT2LMHeadModel.from_pretrained(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    (options.out / "README.md").write_text(card(model, tokenizer, options.steps, cpu))
    for name, value in score(model, tokenizer).items():
        print(f"{name:20} {value:.1%}")
    print(f"{model.num_parameters():,} parameters, {wall:.0f} s, {cpu:.0f} s of a core")


if __name__ == "__main__":
    main()
