"""What invokes with the same input share is computed once, and every value stays what one plain
forward for each invoke gives."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from graftwork import LanguageModel

CHAINED = [
    "gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "llama", "mistral", "gemma2", "gemma3_text",
    "falcon", "falcon_alibi", "bloom", "mamba", "mixtral",
]  # fmt: skip
#: Lengths that share a batch, with padding.
PADDED = (8, 10)


def head_of(module: Any) -> str:
    return next(p for p, c in module.named_modules() if c is module.get_output_embeddings())


def double(token: int) -> Any:
    def change(value: torch.Tensor) -> torch.Tensor:
        value[..., token, :] *= 2
        return value

    return change


# ---------------------------------------------------------------- each architecture


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHAINED, "gemma3n_text"])
def test_variants_start_at_their_first_written_block(name: str, tools: SimpleNamespace) -> None:
    module, model = tools.module(name), tools.model(name)
    blocks, head = tools.blocks(module), head_of(module)
    ids = tools.prompts(*PADDED)
    saved = []
    with tools.block_rows(module) as rows:
        with model.trace() as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    saved.append((prompt, None, {head: model.get(head).output.save()}))
                for k in range(4):
                    with tracer.invoke(prompt):
                        model.get(f"{blocks}.{k}").output[0][..., 1, :] *= 2
                        mine = {head: model.get(head).output.save()}
                        for j in range(4):
                            path = f"{blocks}.{j}"
                            mine[path] = model.get(path).output[0].save()
                        saved.append((prompt, k, mine))
    # The base pass runs both prompts through all blocks; a write at a block's output leaves the block
    # itself shared.
    chained = [2, 4, 6, 8]
    assert [rows[k] for k in range(4)] == (chained if name != "gemma3n_text" else [10] * 4)
    wrong = []
    for prompt, k, mine in saved:
        edits = [] if k is None else [((f"{blocks}.{k}", "output"), double(1))]
        seen = tools.plain(module, prompt, edits)
        wrong += [
            (len(prompt), k, path)
            for path, value in mine.items()
            if not tools.close(value, seen[path, "output"])
        ]
    assert wrong == []


@pytest.mark.parametrize("name", CHAINED)
def test_blocks_are_a_chain(name: str, tools: SimpleNamespace) -> None:
    module = tools.module(name)
    blocks = tools.blocks(module)
    assert tools.model(name).schedule().chain == tuple(f"{blocks}.{k}" for k in range(4))


def test_blocks_that_share_keys_and_values_are_no_chain(tools: SimpleNamespace) -> None:
    assert tools.model("gemma3n_text").schedule().chain == ()


# ---------------------------------------------------------------- where the first write is

#: What is written → blocks that the variant skips of four.
WRITES = {
    ("transformer.wte", "output"): 0,
    ("transformer.drop", "output"): 0,
    ("transformer.h.0", "input"): 0,
    ("transformer.h.0.ln_1", "output"): 0,
    ("transformer.h.0", "output"): 1,
    ("transformer.h.1", "input"): 1,
    ("transformer.h.1.attn.c_attn", "output"): 1,
    ("transformer.h.2.mlp", "output"): 2,
    ("transformer.h.3", "output"): 4,
    ("transformer.ln_f", "output"): 4,
    ("lm_head", "output"): 4,
}


@pytest.mark.parametrize("place", list(WRITES), ids=lambda place: ".".join(place))
def test_write_decides_where_a_variant_starts(place: Any, tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (prompt,) = tools.prompts(6)
    saved = []
    with tools.block_rows(module) as rows:
        with model.trace() as tracer:
            with tracer.invoke(prompt):
                plain = model.lm_head.output.save()
            for token in (1, 3):
                with tracer.invoke(prompt):
                    envoy = model.get(place[0])
                    value = envoy.input if place[1] == "input" else envoy.output
                    value[:, token] *= 2
                    saved.append(model.lm_head.output.save())
    skipped = WRITES[place]
    expected = [1 + 2 * (k >= skipped) for k in range(4)]
    assert [rows[k] for k in range(4)] == expected
    for token, value in zip((1, 3), saved, strict=True):
        seen = tools.plain(module, prompt, [(place, double(token))])
        assert tools.close(value, seen["lm_head", "output"])
    assert tools.close(plain, tools.plain(module, prompt)["lm_head", "output"])


def test_several_writes_start_at_the_first(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (prompt,) = tools.prompts(6)
    places = [("transformer.h.3.mlp", "output"), ("transformer.h.1", "output")]
    with tools.block_rows(module) as rows:
        with model.trace() as tracer:
            with tracer.invoke(prompt):
                plain = model.lm_head.output.save()
            with tracer.invoke(prompt):
                for path, _ in places:
                    model.get(path).output[:, 2] *= 2
                edited = model.lm_head.output.save()
    assert [rows[k] for k in range(4)] == [1, 1, 2, 2]
    seen = tools.plain(module, prompt, [(place, double(2)) for place in places])
    assert tools.close(edited, seen["lm_head", "output"])
    assert tools.close(plain, tools.plain(module, prompt)["lm_head", "output"])


def test_attention_mask_of_one_block_may_be_written(tools: SimpleNamespace) -> None:
    module = tools.fresh("llama", attn_implementation="eager")
    model = LanguageModel(module)
    (prompt,) = tools.prompts(6)
    saved = []
    with tools.block_rows(module) as rows:
        with model.trace() as tracer:
            for k in (None, 2, 3):
                with tracer.invoke(prompt):
                    if k is not None:
                        mask = model.model.layers[k].self_attn.inputs[1]["attention_mask"]
                        mask[:, :, :, 0] = -1e4
                    saved.append(model.lm_head.output.save())
    assert [rows[k] for k in range(4)] == [1, 1, 2, 3]

    def hidden(_: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[:, :, :, 0] = -1e4
        return args, {**kwargs, "attention_mask": mask}

    for k, value in zip((None, 2, 3), saved, strict=True):
        handles = []
        if k is not None:
            attention = module.model.layers[k].self_attn
            handles.append(attention.register_forward_pre_hook(hidden, with_kwargs=True))
        with torch.no_grad():
            expected = module(prompt[None], use_cache=False).logits
        for handle in handles:
            handle.remove()
        assert tools.close(value, expected), k


@pytest.mark.parametrize("name", ["mask", "positions"])
def test_what_a_block_is_given_besides_is_the_prompts_own_where_others_join(
    name: str, tools: SimpleNamespace
) -> None:
    module = tools.fresh("llama", attn_implementation="eager")
    model = LanguageModel(module)
    blocks = model.model.layers
    ids = tools.prompts(6, 7)
    saved = []

    def part(inputs: Any) -> Any:
        kwargs = inputs[1]
        return kwargs["attention_mask"] if name == "mask" else kwargs["position_embeddings"][0]

    with model.trace() as tracer:
        for prompt in ids:
            for k in range(3):
                with tracer.invoke(prompt):
                    blocks[k].output[0][:, 1] *= 2
                    part(blocks[k + 1].inputs)[..., 0] = -1e4
                    mine = [part(blocks[j].inputs).save() for j in range(4)]
                    saved.append((prompt, k, mine, model.lm_head.output.save()))
    for prompt, k, mine, logits in saved:
        seen: list[torch.Tensor] = []

        def note(_: Any, args: Any, kwargs: Any, place: tuple[int, int], seen: Any = seen) -> Any:
            value = part((args, kwargs)).clone()
            if place[0] == place[1] + 1:
                value[..., 0] = -1e4
            seen.append(value)
            if name == "mask":
                return args, {**kwargs, "attention_mask": value}
            return args, {
                **kwargs,
                "position_embeddings": (value, kwargs["position_embeddings"][1]),
            }

        def double_row(_: Any, args: Any, output: Any) -> Any:
            output = output.clone()
            output[:, 1] *= 2
            return output

        handles = [module.model.layers[k].register_forward_hook(double_row)]
        for j, block in enumerate(module.model.layers):
            hook = functools.partial(note, place=(j, k))
            handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            expected = module(prompt[None], use_cache=False).logits
        for handle in handles:
            handle.remove()
        assert tools.close(logits, expected)
        assert all(tools.close(a, b) for a, b in zip(mine, seen, strict=True))


# ---------------------------------------------------------------- what is shared


def test_unwritten_duplicates_run_once(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    ids = tools.prompts(6, 4)
    saved = []
    with tools.batches_of(module) as batches:
        with model.trace() as tracer:
            for i in range(10):
                with tracer.invoke(ids[i % 2]):
                    saved.append(model.transformer.h[i % 4].output.save())
    assert batches == [(2, 6)]
    for i, value in enumerate(saved):
        seen = tools.plain(module, ids[i % 2])
        assert tools.close(value, seen[f"transformer.h.{i % 4}", "output"])


def test_distinct_inputs_are_not_shared(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    ids = tools.prompts(6, 6, 6)
    with tools.batches_of(module) as batches:
        with model.trace() as tracer:
            for prompt in ids:
                with tracer.invoke(prompt):
                    model.transformer.h[3].output[:, 0] = 0
                    model.lm_head.output.save()
    assert batches == [(3, 6)]


def test_masks_and_positions_are_part_of_the_input(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (prompt,) = tools.prompts(6)
    positions = [torch.arange(6)[None] + shift for shift in (0, 5)]
    saved = []
    with model.trace() as tracer:
        for shift in positions:
            for factor in (1, 3):
                with tracer.invoke(input_ids=prompt, position_ids=shift):
                    model.transformer.h[2].output[:, 0] *= factor
                    saved.append((shift, factor, model.lm_head.output.save()))
    for shift, factor, value in saved:

        def change(_: Any, args: Any, output: Any, factor: int = factor) -> Any:
            output = output.clone()
            output[:, 0] *= factor
            return output

        handle = module.transformer.h[2].register_forward_hook(change)
        with torch.no_grad():
            expected = module(prompt[None], position_ids=shift).logits
        handle.remove()
        assert tools.close(value, expected), (shift, factor)


def test_value_of_a_variant_may_be_used_by_another(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (prompt,) = tools.prompts(6)
    with tools.block_rows(module) as rows:
        with model.trace() as tracer:
            with tracer.invoke(prompt):
                model.transformer.h[1].output[:, 2] *= 2
                early = model.transformer.h[0].output  # before its start: from the base pass
                late = model.transformer.h[3].output
            with tracer.invoke(prompt):
                model.transformer.h[2].output[:, 1] = late[:, 1]
                model.transformer.h[2].output[:, 4] = early[:, 4]
                logits = model.lm_head.output.save()
            with tracer.invoke(prompt):
                model.lm_head.output.save()
    assert [rows[k] for k in range(4)] == [1, 1, 2, 3]
    first = tools.plain(module, prompt, [(("transformer.h.1", "output"), double(2))])

    def change(value: torch.Tensor) -> torch.Tensor:
        value[:, 1] = first["transformer.h.3", "output"][:, 1]
        value[:, 4] = first["transformer.h.0", "output"][:, 4]
        return value

    seen = tools.plain(module, prompt, [(("transformer.h.2", "output"), change)])
    assert tools.close(logits, seen["lm_head", "output"])


def test_prompts_of_several_rows_are_shared(tools: SimpleNamespace) -> None:
    module, model = tools.module("llama"), tools.model("llama")
    pair = torch.stack(tools.prompts(6, 6))
    (other,) = tools.prompts(7, seed=4)
    saved = []
    with tools.block_rows(module) as counts:
        with model.trace() as tracer:
            for prompt in (pair, other):
                for token in range(3):
                    with tracer.invoke(prompt):
                        model.model.layers[2].output[0][:, token] *= 2
                        saved.append((prompt, token, model.lm_head.output.save()))
    assert [counts[k] for k in range(4)] == [3, 3, 3, 9]
    for prompt, token, value in saved:
        seen = tools.plain(module, prompt, [(("model.layers.2", "output"), double(token))])
        assert tools.close(value, seen["lm_head", "output"])


@pytest.mark.parametrize("plan", [{"micro_batches": False}, {"tokens": 1}, {"tokens": 12}, None])
def test_many_variants_may_start_from_one_block(plan: Any, tools: SimpleNamespace) -> None:
    module = tools.fresh("gpt2")

    class InPlace(type(module.transformer.h[2])):  # type: ignore[misc]
        """Changes what it is given, as some models do."""

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden_states.mul_(1.5)
            return super().forward(hidden_states * 1.0, *args, **kwargs)

    module.transformer.h[2].__class__ = InPlace
    model = LanguageModel(module)
    (prompt,) = tools.prompts(6)
    saved = []
    with model.trace(plan=plan) as tracer:
        with tracer.invoke(prompt):
            plain = model.lm_head.output.save()
        for token in range(4):
            with tracer.invoke(prompt):
                model.transformer.h[2].mlp.output[:, token] = 0
                saved.append(model.lm_head.output.save())
    assert tools.close(plain, tools.plain(module, prompt)["lm_head", "output"])
    for token, value in enumerate(saved):

        def change(value: torch.Tensor, token: int = token) -> torch.Tensor:
            value[:, token] = 0
            return value

        seen = tools.plain(module, prompt, [(("transformer.h.2.mlp", "output"), change)])
        assert tools.close(value, seen["lm_head", "output"])


# ---------------------------------------------------------------- what a block returns besides


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "falcon", "bloom"])
def test_attention_weights_of_a_skipped_block_are_the_shared_ones(
    name: str, tools: SimpleNamespace
) -> None:
    module = tools.fresh(name, attn_implementation="eager")
    model = LanguageModel(module)
    blocks = tools.blocks(module)
    (prompt,) = tools.prompts(6)
    saved = []
    with model.trace() as tracer:
        for factor in (None, 2, 3):
            with tracer.invoke(prompt):
                block = model.get(f"{blocks}.1")
                if factor:
                    block.output[0][:] *= factor
                saved.append((factor, block.output[0].save(), block.output[1].save()))
    outputs: list[Any] = []
    handle = module.get_submodule(f"{blocks}.1").register_forward_hook(
        lambda _m, _a, output: outputs.append(output)
    )
    with torch.no_grad():
        module(prompt[None])
    handle.remove()
    for factor, hidden, weights in saved:
        assert tools.close(hidden, outputs[0][0] * (factor or 1))
        assert tools.close(weights, outputs[0][1])


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "falcon", "bloom"])
def test_attention_weights_of_a_variant_stay_its_own_where_others_join(
    name: str, tools: SimpleNamespace
) -> None:
    module = tools.fresh(name, attn_implementation="eager")
    model = LanguageModel(module)
    blocks = tools.blocks(module)
    (prompt,) = tools.prompts(6)
    with model.trace() as tracer:
        for k in range(4):
            with tracer.invoke(prompt):
                model.get(f"{blocks}.{k}").output[0][:] *= 2
                if k == 0:
                    weights = [model.get(f"{blocks}.{j}").output[1].save() for j in range(4)]
                model.get(head_of(module)).output.save()
    outputs: list[Any] = []

    def twice(_: Any, args: Any, output: Any) -> Any:
        return (output[0] * 2, *output[1:])

    handles = [module.get_submodule(f"{blocks}.0").register_forward_hook(twice)]
    for j in range(4):
        handles.append(
            module.get_submodule(f"{blocks}.{j}").register_forward_hook(
                lambda _m, _a, output: outputs.append(output[1])
            )
        )
    with torch.no_grad():
        module(prompt[None])
    for handle in handles:
        handle.remove()
    for value, expected in zip(weights, outputs, strict=True):
        assert tools.close(value, expected)


def test_cache_of_a_variant_is_whole(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    (prompt,) = tools.prompts(6)
    saved = []
    with model.trace() as tracer:
        for k in (None, 1, 2):
            with tracer.invoke(prompt):
                if k is not None:
                    model.transformer.h[k].output[:] *= 2
                saved.append(model.output.past_key_values.save())
    for cache in saved:
        assert len(cache.value.layers) == 4
        assert cache.value.layers[0].keys.shape == (1, 4, 6, 4)


def test_whole_output_of_a_variant_has_its_cache(tools: SimpleNamespace) -> None:
    model = tools.model("gpt2")
    (prompt,) = tools.prompts(6)
    saved = []
    for plan in (None, False):
        with model.trace(plan=plan) as tracer:
            for k in (1, 2):
                with tracer.invoke(prompt):
                    model.transformer.h[k].output[:] *= 2
                    saved.append(model.output[1].save())
    for cache in saved:
        assert len(cache.value.layers) == 4


@pytest.mark.parametrize("asked", ["config", "keyword"])
def test_hidden_states_of_a_variant_are_its_own(asked: str, tools: SimpleNamespace) -> None:
    module = tools.fresh("gpt2")
    options = {}
    if asked == "config":
        module.config.output_hidden_states = True
    else:
        options = {"output_hidden_states": True}
    model = LanguageModel(module)
    (prompt,) = tools.prompts(6)
    saved = []
    with tools.block_rows(module) as rows:
        with model.trace(**options) as tracer:
            for factor in (1, 2, 3):
                with tracer.invoke(prompt):
                    model.transformer.h[2].output[:] *= factor
                    states = model.output.hidden_states
                    saved.append((factor, [states[i].save() for i in (0, 1, 2, 3)]))
    assert [rows[k] for k in range(4)] == [3, 3, 3, 3], "nothing is shared"
    with torch.no_grad():
        expected = module(prompt[None], output_hidden_states=True).hidden_states
    for factor, states in saved:
        for i, value in enumerate(states):
            assert tools.close(value, expected[i] * (factor if i == 3 else 1)), (factor, i)


# ---------------------------------------------------------------- the module is as it was


def test_forward_is_put_back_after_an_error(tools: SimpleNamespace) -> None:
    module, model = tools.module("gpt2"), tools.model("gpt2")
    (prompt,) = tools.prompts(6)
    with pytest.raises(RuntimeError, match="size"):
        with model.trace() as tracer:
            for _ in range(3):
                with tracer.invoke(prompt):
                    hidden = model.transformer.h[2].output
                    model.transformer.h[2].output[:] = hidden + torch.ones(7, 1)
                    model.lm_head.output.save()
    assert tools.left_behind(module) == []
    expected = tools.plain(module, prompt)["lm_head", "output"]
    with model.trace(prompt):
        logits = model.lm_head.output.save()
    assert tools.close(logits, expected)


def test_hooks_of_the_models_owner_act_once(tools: SimpleNamespace) -> None:
    module = tools.fresh("gpt2")
    handles = [
        block.register_forward_hook(lambda _m, _a, output: output * 1.1)
        for block in module.transformer.h
    ]
    model = LanguageModel(module)
    (prompt,) = tools.prompts(6)
    saved = []
    with model.trace() as tracer:
        for k in range(4):
            with tracer.invoke(prompt):
                model.transformer.h[k].output[:, 2] *= 2
                saved.append(model.lm_head.output.save())
    for k, value in enumerate(saved):
        seen = tools.plain(module, prompt, [((f"transformer.h.{k}", "output"), double(2))])
        assert tools.close(value, seen["lm_head", "output"]), k
    for handle in handles:
        handle.remove()


def test_forward_on_the_instance_is_used_and_stays(tools: SimpleNamespace) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module = tools.fresh("gpt2")
    seen = []

    class Counts(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return args, kwargs

    for block in module.transformer.h:
        add_hook_to_module(block, Counts())
    before = [block.forward for block in module.transformer.h]
    model = LanguageModel(module)
    (prompt,) = tools.prompts(6)
    model.schedule()
    seen.clear()
    with model.trace() as tracer:
        for factor in (1, 2):
            with tracer.invoke(prompt):
                model.transformer.h[2].output[:] *= factor
                last = model.lm_head.output.save()
    assert [block.__dict__["forward"] for block in module.transformer.h] == before
    assert len(seen) == 4, "three blocks of the base pass, one of the variants"
    for block in module.transformer.h:
        remove_hook_from_module(block)

    def twice(value: torch.Tensor) -> torch.Tensor:
        return value * 2

    expected = tools.plain(module, prompt, [(("transformer.h.2", "output"), twice)])
    assert tools.close(last, expected["lm_head", "output"])


# ---------------------------------------------------------------- chains that are none


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.inner(hidden))


class Toy(transformers.PreTrainedModel):  # type: ignore[misc]
    """A decoder of four blocks, as transformers' are; subclasses carry values past the blocks."""

    config_class = transformers.GPT2Config
    _no_split_modules = ()
    block: type[nn.Module] = Block

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, 16)
        self.h = nn.ModuleList([self.block() for _ in range(4)])
        self.lm_head = nn.Linear(16, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            hidden = block(hidden)
        return hidden

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        logits = self.lm_head(self.blocks(self.wte(input_ids)))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class Keyword(Toy):
    """A block hands a second tensor on by keyword."""

    class block(Block):
        def forward(self, hidden: torch.Tensor, past: Any = None) -> Any:  # type: ignore[override]
            new = super().forward(hidden if past is None else hidden + past)
            return new, new * 0.5

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        past = None
        for block in self.h:
            hidden, past = block(hidden, past=past)
        return hidden


class Dictionary(Toy):
    """Blocks write into a dict that they are all given."""

    class block(Block):
        def forward(self, hidden: torch.Tensor, memo: Any = None) -> Any:  # type: ignore[override]
            new = super().forward(hidden + memo.get("past", 0))
            memo["past"] = new * 0.5
            return new

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        memo: dict[str, Any] = {}
        for block in self.h:
            hidden = block(hidden, memo=memo)
        return hidden


class Attribute(Toy):
    """Blocks leave a tensor on an object that all of them know, and that no block is given."""

    class block(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            new = super().forward(hidden + getattr(self.memory, "past", 0))
            self.memory.past = new * 0.5
            return new

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        memory = SimpleNamespace()
        for block in self.h:
            block.memory = memory
        return super().blocks(hidden)


class InPlaceMemory(Toy):
    """Blocks add to a tensor that is older than all of them."""

    class block(Block):
        def forward(self, hidden: torch.Tensor, memory: Any = None) -> Any:  # type: ignore[override]
            new = super().forward(hidden + memory)
            memory.add_(new)
            return new

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        memory = torch.zeros_like(hidden)
        for block in self.h:
            hidden = block(hidden, memory=memory)
        return hidden


class Mixed(Toy):
    """The unembedding sees the mean of what all blocks gave."""

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        every = []
        for block in self.h:
            hidden = block(hidden)
            every.append(hidden)
        return torch.stack(every).mean(0)


class Penalty(Toy):
    """Something else that the blocks return is summed between them."""

    class block(Block):
        def forward(self, hidden: torch.Tensor) -> Any:
            new = super().forward(hidden)
            return new, new.mean((1, 2), keepdim=True)

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        total: Any = 0
        for block in self.h:
            hidden, part = block(hidden)
            total = total + part
        return hidden + total


class Between(Toy):
    """The model changes the hidden states between two blocks."""

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            hidden = block(hidden)
            hidden += 0.1
        return hidden


class Residual(Toy):
    """Blocks change the hidden states in place, and their first value is used at the end."""

    class block(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.add_(torch.tanh(self.inner(hidden)))

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().blocks(hidden) + hidden


class Buffer(Toy):
    """Blocks talk by a buffer of the model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("shared", torch.zeros(16))
        for block in self.h:
            object.__setattr__(block, "owner", self)

    class block(Block):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            new = super().forward(hidden + self.owner.shared)
            self.owner.shared.copy_(new[0, 0])
            return new

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        self.shared.zero_()
        return super().blocks(hidden)


def toy(kind: type[Toy]) -> Toy:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, bos_token_id=None, eos_token_id=None)
    return kind(config).eval()


SIDEWAYS = [Keyword, Dictionary, Attribute, InPlaceMemory, Mixed, Penalty, Between, Residual]


def test_blocks_of_a_plain_toy_are_a_chain() -> None:
    assert LanguageModel(toy(Toy)).schedule().chain == ("h.0", "h.1", "h.2", "h.3")


@pytest.mark.parametrize("kind", SIDEWAYS, ids=lambda kind: kind.__name__)
def test_blocks_with_a_side_channel_are_no_chain_and_right(
    kind: type[Toy], tools: SimpleNamespace
) -> None:
    module = toy(kind)
    model = LanguageModel(module)
    assert model.schedule().chain == ()
    (prompt,) = tools.prompts(6)
    saved = []
    with model.trace() as tracer:
        for token in range(3):
            with tracer.invoke(prompt):
                model.h[2].inner.output[:, token] *= 2
                saved.append(model.lm_head.output.save())
    for token, value in enumerate(saved):
        seen = tools.plain(module, prompt, [(("h.2.inner", "output"), double(token))])
        assert tools.close(value, seen["lm_head", "output"])


def test_memory_of_the_model_itself_is_a_side_channel() -> None:
    # What one prompt leaves there reaches the others of a batch, too: no reuse can be right then.
    assert LanguageModel(toy(Buffer)).schedule().chain == ()


def test_blocks_without_rows_first_are_no_chain(tools: SimpleNamespace) -> None:
    class Turned(Toy):
        def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().blocks(hidden.transpose(0, 1)).transpose(0, 1)

    module = toy(Turned)
    model = LanguageModel(module)
    assert model.schedule().chain == ()
