"""Owns `Edit`: the block that records lasting changes of a model, `with model.edit() as edited:`.

What it records is a template. Every block of the edited model gets it for each of its prompts, before
the user's own operations, in a generation at every step. So planner and run know nothing of edits, and
they batch, plan and draw as all operations do.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from .context import Backend, Exit, Tracer, open_block
from .errors import BlockError
from .frames import entry
from .node import HookPoint
from .proxy import Handle
from .recording import ABANDONED, DONE
from .template import Template


class Edit(Tracer):
    """A block without a prompt of its own.

    Attributes:
        prompt: a prompt of any length, by which shapes are known; None where there is none.
        done: takes the template when the block has ended.
    """

    def __init__(
        self,
        model: Any,
        backend: Backend,
        prompt: Any,
        given: Any,
        before: Template | None,
        done: Callable[[Tracer, Template], None],
    ) -> None:
        super().__init__(model, backend, generates=False, args=(), prompt_kwargs={}, kwargs={})
        self._given = given
        self._done = done
        recording = self.recording
        recording.lasting = recording.looped = True
        recording.loop, recording.early = 0, None
        recording.no_values = (
            "an edit is recorded for prompts that come later; `graftwork.apply(function, value)` runs "
            "a function then"
        )
        recording.no_gradients = "an edit has no prompt: use `trace` on the edited model"
        self._implicit = self._append(prompt, self.location)
        if before is not None:
            before.place(recording, 0)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        raise BlockError("an edit has no prompts: open `invoke` in a block of the edited model.")

    def admit(self, tracer: Tracer) -> Any:
        raise BlockError.block_in_edit(self.location)

    def __enter__(self) -> Any:
        outer = open_block()
        if outer is not None:
            raise BlockError.edit_in_block(outer.location)
        super().__enter__()
        return self._given

    @Exit
    @entry
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.left:
            if kind is None:
                raise BlockError.was_reset(self.location)
            return
        self.close()
        recording = self.recording
        state = ABANDONED
        try:
            if kind is None:
                self._done(self, self.take())
                state = DONE
        finally:
            recording.close(state)

    def take(self) -> Template:
        """What was recorded.

        Raises:
            OrderError: what is written in an attached module depends on its result.
        """
        recording, graph = self.recording, self.recording.graph
        graph.settle()
        template = Template.of(recording)
        template.lasting = True
        return template


def name_kinds(template: Template, kind: Callable[[str], type[Handle]]) -> None:
    """Fill in the kinds of proxies of a template that comes from a file."""
    for node in template.nodes:
        if type(node.target) is HookPoint and node.target.port == "output":
            template.kinds[node.invoke, node.target] = kind(node.target.path)
