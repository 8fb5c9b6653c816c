"""Owns every error of the package: one tree, with named constructors that build the message.

A message says what was done (file and line), what was found, and what to do. Errors raised by
torch inside an operation keep their type and gain a note instead (`add_note`).
"""

from __future__ import annotations

import difflib
import linecache
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Location(NamedTuple):
    """A line of the user's program."""

    file: str
    line: int

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line}" + (f"  `{source}`" if source else "")


def near(name: str, known: Iterable[str]) -> str:
    """A sentence with the names closest to `name`, or the first few if none is close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    if not names:
        return "It has no submodules."
    listed = ", ".join(f"`{n}`" for n in names[:12]) + (", …" if len(names) > 12 else "")
    return f"It has {listed}."


def add_note(error: BaseException, note: str) -> None:
    """Attach `note` to `error` once; Python 3.10 has no `add_note`, there it joins the arguments."""
    if note in getattr(error, "__notes__", ()):
        return
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])


class GraftworkError(Exception):
    """Root of every error that graftwork raises by itself."""


class UnknownModuleError(GraftworkError, AttributeError):
    """A name that is not in the module tree."""

    @classmethod
    def child(cls, path: str, kind: str, name: str, known: Iterable[str]) -> UnknownModuleError:
        where = f"`{path}` ({kind})" if path else f"the model ({kind})"
        return cls(f"{where} has no submodule or attribute `{name}`. {near(name, known)}")

    @classmethod
    def index(cls, path: str, kind: str, index: int, length: int) -> UnknownModuleError:
        return cls(
            f"`{path}` ({kind}) has {length} modules, so index {index} does not exist; "
            f"use {-length} to {length - 1}."
        )


class BlockError(GraftworkError):
    """Blocks opened, nested or used in a way that has no meaning."""

    @classmethod
    def outside(cls, what: str) -> BlockError:
        return cls(
            f"`{what}` is only known inside a block: write it under `with model.trace(...)`, or "
            "under `with tracer.invoke(...)` in a `model.trace()` or `model.generate()` block."
        )

    @classmethod
    def no_invoke(cls, what: str) -> BlockError:
        return cls(
            f"`{what}` was used in a block but in no invoke, so it has no prompt: write it under "
            "`with tracer.invoke(prompt):`, or under `with tracer.invoke():` to see the whole batch."
        )

    @classmethod
    def nested(cls) -> BlockError:
        return cls(
            "An invoke was opened inside another invoke. Close the first one before: invokes of one "
            "block stand side by side, and a value of one may be used in any other."
        )

    @classmethod
    def block_in_block(cls) -> BlockError:
        return cls(
            "A block was opened inside another block. Close the first one before, or put both prompts "
            "into one block as two invokes."
        )

    @classmethod
    def other_model(cls, path: str) -> BlockError:
        return cls(
            f"`{path or 'the model'}` belongs to another model than the block that is open. "
            "Open a block on that model, save the value there, and use it here."
        )

    @classmethod
    def closed(cls, what: str) -> BlockError:
        return cls(f"`{what}` was called on a block that is closed. Call it inside its `with`.")

    @classmethod
    def whole_batch(cls, location: Location, passes: int) -> BlockError:
        return cls(
            f"the whole batch was used at {location}, but the prompts of this block cannot run "
            f"together: it takes {passes} passes. Use the value inside each invoke."
        )

    @classmethod
    def unknown_rows(cls, shape: Sequence[int]) -> BlockError:
        return cls(
            f"A block of the model takes a tensor {list(shape)} that was not seen when the model was "
            'measured, so variants cannot start in the middle: use `plan={"prefix_reuse": False}`.'
        )

    @classmethod
    def empty(cls) -> BlockError:
        return cls(
            "The block has no prompt: give one to `model.trace(prompt)` or `model.generate(prompt)`, "
            "or open `with tracer.invoke(prompt):` inside it."
        )

    @classmethod
    def no_gradients(cls, what: str, location: Location) -> BlockError:
        return cls(
            f"`{what}` in a generation: transformers generates without gradients. Use "
            f"`model.trace(...)`, on the prompt with the generated tokens if they are meant: {location}"
        )

    @classmethod
    def no_backward(cls, what: str, location: Location) -> BlockError:
        return cls(
            f"{what} was used, but no `loss.backward()` is in its block: {location}\n"
            "Call `backward()` on a value of the block, before or after this line."
        )

    @classmethod
    def checkpointing(cls, location: Location) -> BlockError:
        return cls(
            "`backward()` in a block of a model with gradient checkpointing, which computes its layers "
            f"again without the block's edits: {location}\n"
            "Call `gradient_checkpointing_disable()` on the module, or `eval()`."
        )

    @classmethod
    def has_input(cls) -> BlockError:
        return cls(
            "This block already has its prompt (it was given to trace or generate), so it takes no "
            "further invokes. Open the block without a prompt and give each prompt to an invoke."
        )


class NotSavedError(GraftworkError):
    """A value that was not kept is read after the run."""

    @classmethod
    def value(cls, what: str, location: Location) -> NotSavedError:
        return cls(
            f"{what} was not saved, so its value was freed during the run. Add `.save()` where it is "
            f"recorded: {location}"
        )


class NotRunError(GraftworkError):
    """A value is read that no run has produced."""

    @classmethod
    def recording(cls, what: str, location: Location) -> NotRunError:
        return cls(
            f"{what} has no value yet: the block is still recording and runs when it exits. Read "
            f"`.value` after the `with`. Recorded at {location}"
        )

    @classmethod
    def running(cls, what: str, location: Location) -> NotRunError:
        return cls(
            f"{what} is used by a function in the run that was not given it. Pass it as an argument: "
            f"`graftwork.apply(function, proxy)`. Recorded at {location}"
        )

    @classmethod
    def on_demand(cls, use: str, what: str, location: Location) -> NotRunError:
        return cls(
            f"`{use}` needs the real value of {what}, which is only known when the block has run. "
            f"Save it and use it after the block, or give the computation to "
            f"`graftwork.apply(function, proxy)`. Recorded at {location}"
        )

    @classmethod
    def abandoned(cls, what: str) -> NotRunError:
        return cls(f"{what} has no value: its block was left by an exception, so nothing ran.")

    @classmethod
    def failed(cls, what: str, location: Location) -> NotRunError:
        return cls(
            f"{what} has no value: the run failed before it was reached. Recorded at {location}"
        )

    @classmethod
    def output(cls) -> NotRunError:
        return cls(
            "The forward's own output was not asked for, so the run stopped early without it. Use it "
            "inside the block: `output = tracer.output.save()`."
        )


class ForeignProxyError(GraftworkError):
    """A proxy of another block, whose value is not known, is used in this one."""

    @classmethod
    def unsaved(cls, what: str, location: Location) -> ForeignProxyError:
        return cls(
            f"{what} comes from another block and was not saved there. Add `.save()` at {location} "
            "and use it after that block has run."
        )

    @classmethod
    def unfinished(cls, what: str, location: Location) -> ForeignProxyError:
        return cls(
            f"{what} comes from another block, which has not run. Let that block exit first. "
            f"Recorded at {location}"
        )


class OrderError(GraftworkError):
    """A write needs a value that the forward computes later."""

    @classmethod
    def later(cls, write: str, write_at: Location, read: str, read_at: Location) -> OrderError:
        return cls(
            f"A write needs a value that is computed later in the same forward.\n"
            f"  written: {write} at {write_at}\n"
            f"  needs:   {read} at {read_at}\n"
            "Take the later value from another invoke of the same prompt: it then runs first."
        )

    @classmethod
    def cycle(cls, first: Location, second: Location) -> OrderError:
        return cls(
            "Two invokes wait for each other's later values, so neither can run first.\n"
            f"  {first}\n  {second}\n"
            "Compute one of the values in a block of its own and save it."
        )

    @classmethod
    def gradients(cls, first: Location, second: Location) -> OrderError:
        return cls(
            "Two backwards wait for each other's gradients, so neither can run first.\n"
            f"  {first}\n  {second}\n"
            "Read `.grad` after the `backward()` that is meant, or under `with loss.backward():`."
        )


class ShapeError(GraftworkError):
    """A written value does not fit the place it is written to."""

    @classmethod
    def write(cls, place: str, location: Location, expected: str, found: str) -> ShapeError:
        return cls(
            f"The value written to {place} does not fit.\n"
            f"  line:     {location}\n  expected: {expected}\n  found:    {found}\n"
            "Write a value of the expected shape, or write into a slice of it: "
            "`module.output[0][:, -1] = value`."
        )

    @classmethod
    def shared(cls, place: str, location: Location) -> ShapeError:
        return cls(
            f"{place} is one value shared by all prompts of the batch, so it cannot be changed for one "
            f"prompt alone: {location}\nGive this prompt a block of its own."
        )


class CapturedTensorError(GraftworkError):
    """A tensor taken from outside the block cannot be used as it was recorded."""

    @classmethod
    def changed(cls, name: str, shape: Sequence[int], location: Location) -> CapturedTensorError:
        return cls(
            f"{name} (shape {list(shape)}) was changed in place after it was recorded and before the "
            f"block ran: {location}\nUse `{name.strip('`')}.clone()` in the block if both values are "
            "wanted."
        )

    @classmethod
    def meta(cls, name: str, location: Location) -> CapturedTensorError:
        return cls(
            f"{name} has no data (it is on the meta device: it was taken from the model before the "
            f"weights were loaded): {location}\nRead it inside the block, or call `model.load()` first."
        )

    @classmethod
    def mutated(cls, what: str, location: Location) -> CapturedTensorError:
        return cls(
            f"{what} changed its argument in place: {location}\nReturn the new value instead and "
            "assign it: `module.output[:] = result`."
        )


class StepError(GraftworkError):
    """A place that the forward never reached, or no gradient."""

    @classmethod
    def never_ran(cls, what: str, location: Location, reason: str) -> StepError:
        return cls(f"{what} has no value: {reason}. Recorded at {location}")


class ScheduleError(GraftworkError):
    """A fact about the model's structure is needed and cannot be had."""

    @classmethod
    def no_schedule(cls, need: str, reason: str) -> ScheduleError:
        return cls(
            f"{need} needs the structure of the model's forward, and a trial run without weights "
            f"failed: {reason}"
        )

    @classmethod
    def shared(cls, what: str, location: Location, reason: str) -> ScheduleError:
        return cls(
            f"{what} cannot be split into the prompts of a batch: {reason}. Recorded at {location}\n"
            "Give this prompt a block of its own."
        )


class InputError(GraftworkError, ValueError):
    """A prompt that cannot be run."""


class LoadError(GraftworkError):
    """A model that cannot be found or loaded."""


class OperationError(GraftworkError, TypeError):
    """An operation that cannot be recorded."""

    @classmethod
    def outside_write(cls, name: str) -> OperationError:
        what = "tensor[...] = value" if name == "__setitem__" else f"tensor.{name}(value)"
        return cls(
            f"`{what}` with a value of the block would change a tensor from outside, when the block "
            "is only being written. Build the result from values instead (`torch.stack`, "
            "`torch.cat`, `torch.where`), or save the value and copy it after the block."
        )
