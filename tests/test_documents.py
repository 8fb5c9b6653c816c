"""The examples of two documents of an older library run as written, with the import renamed.

The documents are the description (README) of nnsight 0.0.2 and the "Basics" page of its manual.
Here is their code alone: `from nnsight import` has become `from graftwork import`, and white space
at line ends is gone; nothing else has changed, typing errors included. Each block stands before
the test that runs it, and the test says what the document says that it shows. `'gpt2'` is a folder
of that name in the current directory: the model of the package, which is a GPT-2 of other sizes.
Values are compared with plain transformers on the same folder.

Supplied by the tests, because the documents do not define them: `device`, `cross_entropy_loss`, and
`abalated_lm_head`, which the document calls `ablated_lm_head` three lines above.
"""

import json
import logging
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftwork
from graftwork import LanguageModel

pytestmark = pytest.mark.usefixtures("folder_named_gpt2")

TINY = Path(graftwork.__file__).parent / "models" / "tiny"
PROMPT = "The Eiffel Tower is in the city of"
MADISON = "Madison square garden is located in the city of New"
BLANKS = "_ _ _ _ _ _ _ _ _ _"


class Plain:
    """The same model without graftwork, and what torch's own hooks see in it."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(TINY).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)

    def ids(self, text: str) -> torch.Tensor:
        """[1, token]"""
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def seen(self, module: torch.nn.Module, run: Callable[[], Any]) -> list[torch.Tensor]:
        """What `module` returns in each forward of `run`."""
        outputs: list[torch.Tensor] = []

        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).clone())

        with torch.no_grad(), Hook(module, hook):
            run()
        return outputs

    def generate(self, text: str, tokens: int) -> torch.Tensor:
        """Greedy continuation, [1, prompt + tokens]."""
        ids = self.ids(text)
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

    def last_hidden(self, text: str) -> torch.Tensor:
        """What the last block returns, [1, token, d_model]."""
        (hidden,) = self.seen(self.model.transformer.h[-1], lambda: self.model(self.ids(text)))
        return hidden


class Hook:
    """A forward hook for the length of a `with`."""

    def __init__(self, module: torch.nn.Module, function: Callable[..., Any]) -> None:
        self.handle = module.register_forward_hook(function)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain()


@pytest.fixture
def folder_named_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copytree(TINY, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    yield


def run(code: str, **given: Any) -> dict[str, Any]:
    """Run a block as a program of its own and return its variables."""
    names: dict[str, Any] = {"__name__": "document", **given}
    exec(compile(code, "<document>", "exec"), names)
    return names


def close(found: Any, expected: torch.Tensor) -> None:
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


# ============================================================== the description of nnsight 0.0.2

FIRST = """
from graftwork import LanguageModel

model = LanguageModel('gpt2', device_map='cuda')

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke('The Eiffel Tower is in the city of') as invoker:

        hidden_states = model.transformer.h[-1].output[0].save()

output = generator.output
hidden_states = hidden_states.value
"""

PRINTED_AFTERWARDS = """
output = generator.output
hidden_states = hidden_states.value

print(output)
print(hidden_states)
"""


def test_first_example_saves_the_hidden_states_of_the_last_layer(plain: Plain) -> None:
    names = run(FIRST)
    count = plain.ids(PROMPT).shape[1]
    assert names["hidden_states"].shape == (1, count, plain.model.config.n_embd)
    close(names["hidden_states"], plain.last_hidden(PROMPT))
    assert torch.equal(names["output"].cpu(), plain.generate(PROMPT, 1))
    assert names["output"].shape == (1, count + 1)


def test_printed_afterwards_are_the_ids_and_the_states(
    plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(FIRST.split("output = generator.output")[0])
    run(PRINTED_AFTERWARDS, generator=names["generator"], hidden_states=names["hidden_states"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{names['generator'].output}\ntensor([[[")


def test_without_cuda_the_model_loads_on_the_cpu_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here, so there is nothing to warn of")
    with caplog.at_level(logging.WARNING, logger="graftwork"):
        run(FIRST)
    (record,) = [r for r in caplog.records if r.name == "graftwork"]
    assert record.getMessage() == (
        "device_map='cuda', but there is no CUDA device: loading on the CPU"
    )


# The three steps that the document takes the first example apart into.
CREATE = """
from graftwork import LanguageModel

model = LanguageModel('gpt2',device_map='cuda')
"""
GENERATE = "with model.generate(max_new_tokens=3) as generator:"
INVOKE = "with generator.invoke('The Eiffel Tower is in the city of') as invoker:"
SAVE = "hidden_states = model.transformer.h[-1].output[0].save()"


def test_the_pieces_put_together_are_the_example(plain: Plain) -> None:
    names = run(CREATE)
    assert not names["model"].loaded
    code = "\n".join(
        textwrap.indent(line, "    " * depth) for depth, line in enumerate((GENERATE, INVOKE, SAVE))
    )
    names = run(code, model=names["model"])
    assert names["model"].loaded
    close(names["hidden_states"].value, plain.last_hidden(PROMPT))
    assert torch.equal(names["generator"].output.cpu(), plain.generate(PROMPT, 3))


def test_printed_model_is_the_tree_that_torch_prints(
    plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run(CREATE)["model"]
    run("print(model)", model=model)
    assert capsys.readouterr().out == f"{plain.model}\n"
    assert not model.loaded


def test_shape_is_known_inside_the_block(plain: Plain, capsys: pytest.CaptureFixture[str]) -> None:
    """The document shows a tuple: since transformers 5 a block returns its hidden states alone."""
    model = run(CREATE)["model"]
    with model.generate(max_new_tokens=1) as generator:
        with generator.invoke(PROMPT):
            run("print(model.transformer.h[-1].output.shape)", model=model)
            assert not model.loaded
    count = plain.ids(PROMPT).shape[1]
    assert capsys.readouterr().out == f"torch.Size([1, {count}, {plain.model.config.n_embd}])\n"


OPERATIONS = """
from graftwork import LanguageModel
import torch

model = LanguageModel('gpt2', device_map='cuda')

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke('The Eiffel Tower is in the city of') as invoker:

        hidden_states_pre = model.transformer.h[-1].output[0].save()

        hs_sum = torch.sum(hidden_states_pre).save()

        hs_edited = hidden_states_pre + hs_sum

        hs_edited = hs_edited.save()

print(hidden_states_pre.value)
print(hs_sum.value)
print(hs_edited.value)
"""


def test_operations_on_proxies_are_computed(
    plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(OPERATIONS)
    hidden = plain.last_hidden(PROMPT)
    close(names["hidden_states_pre"].value, hidden)
    assert names["hs_sum"].value.shape == ()
    torch.testing.assert_close(names["hs_sum"].value.cpu(), hidden.sum(), rtol=1e-3, atol=1e-2)
    close(names["hs_edited"].value, hidden + names["hs_sum"].value.cpu())
    assert capsys.readouterr().out.count("tensor(") == 3


SETTING = """
from graftwork import LanguageModel
import torch

model = LanguageModel('gpt2', device_map='cuda')

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke('The Eiffel Tower is in the city of') as invoker:

        hidden_states_pre = model.transformer.h[-1].output[0].save()

        noise = (0.001**0.5)*torch.randn(hidden_states_pre.shape)

        model.transformer.h[-1].output[0] = hidden_states_pre + noise

        hidden_states_post = model.transformer.h[-1].output[0].save()

print(hidden_states_pre.value)
print(hidden_states_post.value)
"""


def test_setting_adds_noise_to_what_flows_on(plain: Plain) -> None:
    torch.manual_seed(0)
    names = run(SETTING)
    hidden, noise = plain.last_hidden(PROMPT), names["noise"]
    assert isinstance(noise, torch.Tensor) and noise.shape == hidden.shape
    assert noise.abs().max() > 0.01
    close(names["hidden_states_pre"].value, hidden)
    close(names["hidden_states_post"].value, hidden + noise)


def test_what_was_set_is_what_the_model_goes_on_with(plain: Plain) -> None:
    """A change large enough to be seen in the generated token, by the same line of code."""
    code = SETTING.replace("(0.001**0.5)", "100")
    torch.manual_seed(0)
    names = run(code)
    noise = names["noise"]

    def add(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + noise

    with Hook(plain.model.transformer.h[-1], add):
        expected = plain.generate(PROMPT, 1)
    assert torch.equal(names["generator"].output.cpu(), expected)
    assert not torch.equal(expected, plain.generate(PROMPT, 1))


MULTIPLE_TOKENS = """
from graftwork import LanguageModel

model = LanguageModel('gpt2', device_map='cuda')

with model.generate(max_new_tokens=3) as generator:
    with generator.invoke('The Eiffel Tower is in the city of') as invoker:

        hidden_states1 = model.transformer.h[-1].output[0].save()

        invoker.next()

        hidden_states2 = model.transformer.h[-1].output[0].save()

        invoker.next()

        hidden_states3 = model.transformer.h[-1].output[0].save()


output = generator.output
hidden_states1 = hidden_states1.value
hidden_states2 = hidden_states2.value
hidden_states3 = hidden_states3.value
"""


def test_next_moves_on_to_the_next_generated_token(plain: Plain) -> None:
    names = run(MULTIPLE_TOKENS)
    found = [names[f"hidden_states{i}"] for i in (1, 2, 3)]
    expected = plain.seen(plain.model.transformer.h[-1], lambda: plain.generate(PROMPT, 3))
    count, width = plain.ids(PROMPT).shape[1], plain.model.config.n_embd
    assert [tuple(h.shape) for h in found] == [(1, count, width), (1, 1, width), (1, 1, width)]
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert torch.equal(names["output"].cpu(), plain.generate(PROMPT, 3))


TOKEN_INDEX = """
from graftwork import LanguageModel

model = LanguageModel('gpt2', device_map='cuda')

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke('The Eiffel Tower is in the city of') as invoker:

        hidden_states = model.transformer.h[-1].output[0].t[0].save()

output = generator.output
hidden_states = hidden_states.value
"""


@pytest.mark.parametrize("spelling", ["t", "token"])
def test_t_takes_the_state_of_one_token(plain: Plain, spelling: str) -> None:
    hidden = run(TOKEN_INDEX.replace(".t[0]", f".{spelling}[0]"))["hidden_states"]
    assert hidden.shape == (1, plain.model.config.n_embd)
    close(hidden, plain.last_hidden(PROMPT)[:, 0])


CROSS_PROMPT = """
from graftwork import LanguageModel

model = LanguageModel('gpt2', device_map='cuda')

with model.generate(max_new_tokens=3) as generator:

    with generator.invoke("Madison square garden is located in the city of New") as invoker:

        embeddings = model.transformer.wte.output

    with generator.invoke("_ _ _ _ _ _ _ _ _ _") as invoker:

        model.transformer.wte.output = embeddings

print(model.tokenizer.decode(generator.output[0]))
print(model.tokenizer.decode(generator.output[1]))
"""


def test_embeddings_of_one_prompt_take_the_place_of_anothers(
    plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(CROSS_PROMPT)
    taken = [plain.model.transformer.wte(plain.ids(MADISON))]

    def put(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return taken.pop() if taken else output  # in the first forward alone

    with Hook(plain.model.transformer.wte, put):
        expected = plain.generate(BLANKS, 3)
    found = names["generator"].output.cpu()
    assert torch.equal(found, torch.cat([plain.generate(MADISON, 3), expected]))
    assert capsys.readouterr().out.splitlines() == [
        "Madison square garden is located in the city of New York City.",
        "_ _ _ _ _ _ _ _ _ _ York City.",
    ]


PRE_SAVED = """
from graftwork import LanguageModel

model = LanguageModel('gpt2', device_map='cuda')

with model.generate(max_new_tokens=3) as generator:

    with generator.invoke("Madison square garden is located in the city of New") as invoker:

        embeddings = model.transformer.wte.output.save()

print(model.tokenizer.decode(generator.output[0]))
print(embeddings.value)

with model.generate(max_new_tokens=3) as generator:

    with generator.invoke("_ _ _ _ _ _ _ _ _ _") as invoker:

        model.transformer.wte.output = embeddings.value

print(model.tokenizer.decode(generator.output[0]))

"""


def test_embeddings_saved_before_do_the_same(
    plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(PRE_SAVED)
    close(names["embeddings"].value, plain.model.transformer.wte(plain.ids(MADISON)).detach())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == MADISON + " York City."
    assert printed[1].startswith("tensor([[[")
    assert printed[-1] == BLANKS + " York City."


AD_HOC = """
from graftwork import LanguageModel
import torch

model = LanguageModel("gpt2", device_map='cuda')

with model.generate() as generator:
    with generator.invoke('The Eiffel Tower is in the city of') as invoker:

        hidden_states = model.transformer.h[-1].output[0]
        hidden_states = model.lm_head(model.transformer.ln_f(hidden_states)).save()
        tokens = torch.softmax(hidden_states, dim=2).argmax(dim=2).save()

print(hidden_states.value)
print(tokens.value)
print(model.tokenizer.decode(tokens.value[0]))

"""


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
def test_modules_applied_out_of_order_decode_the_hidden_states(
    plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(AD_HOC)
    with torch.no_grad():
        logits = plain.model(plain.ids(PROMPT)).logits
    close(names["hidden_states"].value, logits)
    assert torch.equal(names["tokens"].value.cpu(), logits.argmax(-1))
    assert capsys.readouterr().out.rstrip("\n").endswith(" Paris")


REMOTELY = """
from graftwork import LanguageModel

model = LanguageModel('decapoda-research/llama-65b-hf')
with model.generate(server=True, max_new_tokens=1) as generator:
    with generator.invoke('The Eiffel Tower is in the city of') as invoker:

        hidden_states = model.model.layers[-1].output[0].save()

output = generator.output
hidden_states = hidden_states.value
"""


def test_running_remotely_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """The configuration of a 65B Llama, without weights, stands where the hub would have it."""
    folder = tmp_path / "decapoda-research" / "llama-65b-hf"
    folder.mkdir(parents=True)
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(graftwork.GraftworkError) as refusal:
        run(REMOTELY)
    assert str(refusal.value) == "`server=`: running on a server is not in this release."


# ============================================================== the page "Basics"

BASICS_CREATE = """
# Declare the model and load onto device
model = LanguageModel('gpt2',device_map=device)
"""

BASICS_GENERATE = """
prompt = 'The Eiffel Tower is in the city of'

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke(prompt) as invoker:
        hidden_states = model.transformer.h[-1].output[0].save()

output = generator.output

print([model.tokenizer.decode(t) for t in output])
"""

BASICS_HEADER = "with model.generate(max_new_tokens=1) as generator:"
BASICS_INVOKE = "with generator.invoke(prompt) as invoker:"

BASICS_TOKENS = """
gpt2_text = "Natural language processing tasks, such as..."
gpt2_tokens = model.tokenizer.encode(gpt2_text)

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke(gpt2_tokens) as invoker:
        hidden_states = model.transformer.h[-1].output[0].save()
"""

BASICS_ABLATION = """
layer_to_ablate = 0
head_index_to_ablate = 7

with model.generate(max_new_tokens=1) as generator:
    with generator.invoke(gpt2_tokens) as invoker:
        normal_lm_head = model.lm_head.output.save()

    with generator.invoke(gpt2_tokens) as invoker:
        attention_pattern = model.transformer.h[layer_to_ablate].attn.value.output
        attention_pattern[:,head_index_to_ablate,:,:] = 0.
        ablated_lm_head = model.lm_head.output.save()

normal_lm_head = normal_lm_head.value
ablated_lm_head = ablated_lm_head.value
"""

BASICS_LOSS = """
tensor_tokens = torch.tensor([gpt2_tokens]).to(device)
print(cross_entropy_loss(normal_lm_head, tensor_tokens, shift=True))

print(cross_entropy_loss(abalated_lm_head, tensor_tokens, shift=True))
"""


def cross_entropy_loss(logits: torch.Tensor, tokens: torch.Tensor, shift: bool) -> torch.Tensor:
    """The document's function, which it does not show: the mean loss of the next token."""
    assert shift
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.fixture
def basics(folder_named_gpt2: None) -> dict[str, Any]:
    """The page's variables after its first block; the page is one program from top to bottom."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return run(BASICS_CREATE, LanguageModel=LanguageModel, torch=torch, device=device)


def test_basics_generation_continues_with_paris(
    basics: dict[str, Any], plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(BASICS_GENERATE, **basics)
    assert capsys.readouterr().out == "['The Eiffel Tower is in the city of Paris']\n"
    close(names["hidden_states"].value, plain.last_hidden(PROMPT))


def test_basics_pieces_put_together_run(basics: dict[str, Any], plain: Plain) -> None:
    basics["prompt"] = PROMPT
    code = f"{BASICS_HEADER}\n    {BASICS_INVOKE}\n        {SAVE}\n"
    names = run(code, **basics)
    close(names["hidden_states"].value, plain.last_hidden(PROMPT))


def test_basics_prompt_may_be_a_list_of_token_ids(
    basics: dict[str, Any], plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(PRINTED_AFTERWARDS, **run(BASICS_TOKENS, **basics))
    close(names["hidden_states"], plain.last_hidden(names["gpt2_text"]))
    assert capsys.readouterr().out.startswith("tensor([[")


def test_basics_ablated_head_changes_the_loss(
    basics: dict[str, Any], plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(BASICS_ABLATION, **run(BASICS_TOKENS, **basics))
    names["abalated_lm_head"] = names["ablated_lm_head"]
    run(BASICS_LOSS, **{**names, "cross_entropy_loss": cross_entropy_loss})
    normal, ablated = (
        float(line.removeprefix("tensor(").split(")")[0].split(",")[0])
        for line in capsys.readouterr().out.splitlines()
    )
    assert abs(ablated - normal) > 0.001

    width, heads = plain.model.config.n_embd, plain.model.config.n_head
    first = 2 * width + 7 * (
        width // heads
    )  # where head 7's value vectors begin in c_attn's output

    def ablate(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., first : first + width // heads] = 0.0
        return output

    ids = torch.tensor([names["gpt2_tokens"]])
    with torch.no_grad():
        expected_normal = plain.model(ids).logits
        with Hook(plain.model.transformer.h[0].attn.c_attn, ablate):
            expected_ablated = plain.model(ids).logits
    close(names["normal_lm_head"], expected_normal)
    close(names["ablated_lm_head"], expected_ablated)
