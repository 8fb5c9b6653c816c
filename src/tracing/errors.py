"""Owns every error of the package: one tree, with named constructors that build the message.

A message says what was done (file and line), what was found, and what to do. Errors raised by
torch inside an operation keep their type and gain the line (`place_error`).
"""

from __future__ import annotations

import difflib
import linecache
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar


class Location(NamedTuple):
    """A line of the user's program."""

    file: str
    line: int

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.line).strip()
        cell = _cell(self.file)
        place = f"{self.file}:{self.line}" if cell is None else f"{cell}, line {self.line}"
        return place + (f"  `{source}`" if source else "")


def _cell(file: str) -> str | None:
    """The notebook's own name of a cell, such as "Cell In[3]": what IPython compiles has the name of a
    temporary file."""
    # Where IPython runs, it is imported; asking for it would import it elsewhere.
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = ask() if ask is not None else None
    named = getattr(getattr(shell, "compile", None), "format_code_name", None)
    found: tuple[str, str] | None = named(file) if named is not None else None
    if found is not None:
        return " ".join(found)
    number = re.match(r"<ipython-input-(\d+)-", file)
    return f"Cell In[{number[1]}]" if number else None


def near(name: str, known: Iterable[str]) -> str:
    """A sentence with the names closest to `name`, or the first few if none is close."""
    names = list(dict.fromkeys(known))  # a submodule may be called as a port is
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    if not names:
        return "It has no submodules."
    listed = ", ".join(f"`{n}`" for n in names[:12]) + (", …" if len(names) > 12 else "")
    return f"It has {listed}."


def place_error(error: BaseException, line: Location, what: str, message: bool = True) -> None:
    """Say once that `error` belongs to a line of the user's, first of all that is said.

    Args:
        what: the operation at that line.
        message: put it into the message; else, and where the message is none that can be changed,
            it becomes a note below it.
    """
    if line_of(error) is not None:
        return
    error.__dict__["graftwork_line"] = line
    if isinstance(error, GraftworkError):
        return
    said = error.args[0] if len(error.args) == 1 else None
    if message and isinstance(said, str) and str(error) == said:
        error.args = (f"{line}\nin {what}: {said}",)
    elif hasattr(error, "add_note"):  # from Python 3.11
        error.add_note(f"graftwork: in {what}, recorded at {line}")


def line_of(error: BaseException) -> Location | None:
    """The line of the user's that an error belongs to, where it is known."""
    found: Location | None = error.__dict__.get("graftwork_line")
    return found


E = TypeVar("E", bound="GraftworkError")


_CANNOT_CLOSE = (
    "If its `with` is never left (a generator that waits, a bare `__enter__`), `graftwork.reset()` "
    "closes it."
)


class GraftworkError(Exception):
    """Root of every error that graftwork raises by itself."""

    @classmethod
    def at(cls: type[E], line: Location, message: str) -> E:
        """An error that is raised elsewhere than at the line that it is about, which it says first."""
        error = cls(f"{line}\n{message}")
        error.__dict__["graftwork_line"] = line
        return error


class PaddingWarning(UserWarning):
    """An operation on rows of different lengths takes padding for tokens."""


class UnknownModuleError(GraftworkError, AttributeError):
    """A name that is not in the module tree."""

    @classmethod
    def child(cls, path: str, kind: str, name: str, known: Iterable[str]) -> UnknownModuleError:
        where = f"`{path}` ({kind})" if path else f"the model ({kind})"
        return cls(f"{where} has no submodule or attribute `{name}`. {near(name, known)}")

    @classmethod
    def elsewhere(cls, kind: str, name: str, written: str) -> UnknownModuleError:
        return cls(f"the model ({kind}) has no `{name}`: {written}")

    @classmethod
    def index(cls, path: str, kind: str, index: int, length: int) -> UnknownModuleError:
        return cls(
            f"`{path}` ({kind}) has {length} modules, so index {index} does not exist; "
            f"use {-length} to {length - 1}."
        )


class UnavailableNameError(GraftworkError, AttributeError):
    """A name of the unified vocabulary that does not exist, or not on this architecture."""

    @classmethod
    def unknown(cls, name: str, kind: str, known: Iterable[str]) -> UnavailableNameError:
        return cls(f"`{name}` is no name of a place in {kind}. {near(name, known)}")

    @classmethod
    def missing(cls, name: str, kind: str, reason: str) -> UnavailableNameError:
        return cls(f"`{name}` does not exist on {kind}: {reason}")

    @classmethod
    def no_layer(cls, index: int, count: int) -> UnavailableNameError:
        return cls(f"there are {count} layers, so layer {index} does not exist")

    @classmethod
    def size(cls, name: str, kind: str, known: Iterable[str]) -> UnavailableNameError:
        return cls(
            f"`{name}` is no size that `model.cfg` has, in the same words for every model. "
            f"{near(name, known)} `model.config` is {kind}'s own configuration."
        )

    @classmethod
    def weight(cls, name: str, kind: str, known: Iterable[str]) -> UnavailableNameError:
        return cls(f"`{name}` is no weight of {kind}. {near(name, known)}")


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
    def unfinished_edit(cls, location: Location) -> BlockError:
        return cls(
            "This view of the model has no edits: its `model.edit()` block did not end, or ended with "
            f"an error: {location}\nRecord the edits again, or use the model itself."
        )

    @classmethod
    def nested(cls) -> BlockError:
        return cls(
            "An invoke was opened inside another invoke. Close the first one before: invokes of one "
            "block stand side by side, and a value of one may be used in any other."
        )

    @classmethod
    def block_in_block(cls, location: Location) -> BlockError:
        return cls(
            f"A block was opened inside another block, which is open since {location}\n"
            "Close that one before, or put both prompts into one block as two invokes. "
            f"{_CANNOT_CLOSE}"
        )

    @classmethod
    def session_in_block(cls, location: Location) -> BlockError:
        return cls(
            "A session was opened inside a block or another session, or a second time. Open one with "
            "`with model.session():`, and the blocks inside it. What is open began at "
            f"{location}\n{_CANNOT_CLOSE}"
        )

    @classmethod
    def edit_in_block(cls, location: Location) -> BlockError:
        return cls(
            f"`model.edit()` was opened inside a block, which is open since {location}\n"
            f"Open it outside. {_CANNOT_CLOSE}"
        )

    @classmethod
    def block_in_edit(cls, location: Location) -> BlockError:
        return cls(
            f"A block was opened inside `model.edit()`, which is open since {location}\n"
            f"Close the edit first. {_CANNOT_CLOSE}"
        )

    @classmethod
    def was_reset(cls, location: Location) -> BlockError:
        return cls(
            "The block was closed by `graftwork.reset()` before its end, so it has not run. It was "
            f"opened at {location}"
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
    def steps(cls, what: str) -> BlockError:
        return cls(
            f"`{what}`: steps are whole numbers from 0 in rising order: `iter[0:3]`, `iter[[0, 2]]`, "
            "`iter[4]`. How many there will be is not known, so they are not counted from the end."
        )

    @classmethod
    def late_prompt(cls, location: Location) -> BlockError:
        return cls(
            "A prompt was opened after an invoke without input in which a size or a value of the whole "
            f"batch was asked for: {location}\nThat counted the prompts before it alone. Open the "
            "prompts first."
        )

    @classmethod
    def not_indexed(cls) -> BlockError:
        return cls(
            "`iter` is indexed, as a list is: `iter[0:3]`, `iter[[0, 2]]`, `iter[4]`; `iter[:]` and "
            "`all()` are all steps."
        )

    @classmethod
    def forward(cls) -> BlockError:
        return cls(
            "a trace is one forward and has no steps. Use `model.generate(...)`; for a module that is "
            "called several times in one forward, `module.calls[1].output` is its second call."
        )

    @classmethod
    def uncopied(cls, kind: str, reason: str, location: Location) -> BlockError:
        return cls(
            f"The block at {location} takes several forwards, each of which changes its argument of "
            f"type {kind}, and that cannot be copied ({reason}). Give each prompt a block of its own, "
            "and save values instead of using them while the block is written."
        )

    @classmethod
    def used_up(cls, kind: str, location: Location) -> BlockError:
        return cls(
            f"The block at {location} has an argument of type {kind}, which its forward changes: run "
            "again, it would not compute the same. Write the block anew with the argument as it is to "
            "be."
        )

    @classmethod
    def no_steps(cls, option: str, location: Location) -> BlockError:
        return cls(
            f"The block at {location} reads, writes or stops inside a generation, and under "
            f"`{option}` the forwards of the model are not its steps (the prompt, then one token "
            f"each). Generate without `{option}`, or use the result alone."
        )

    @classmethod
    def left_loop(cls, what: str, location: Location) -> BlockError:
        return cls(
            f"{what} belongs to a `with tracer.iter[…]` block and has one value for each of its steps. "
            f"Save it there, and use the list after the run. Recorded at {location}"
        )

    @classmethod
    def not_called(cls, place: str) -> BlockError:
        return cls(
            f"`{place}` is a place of an attached module, which is not called before this line. Call "
            "it on a value of the block, or use the model that an edit with such a call has given."
        )

    @classmethod
    def otherwise(cls) -> BlockError:
        return cls(
            "`tracer.otherwise()` has no condition: write it directly after the end of "
            "`with tracer.cond(...)`."
        )

    @classmethod
    def transformed(cls, place: str) -> BlockError:
        return cls(
            f"`{place}` is inside a transform of torch.func (vmap, grad, …), where tensors stand for "
            "others and cannot be kept or changed. Take a module around the transform."
        )

    @classmethod
    def stopped_output(cls, location: Location) -> BlockError:
        return cls.at(
            location,
            "The forward is left here, so it has no output: save what the modules give, without "
            "`tracer.output`.",
        )

    @classmethod
    def no_backward(cls, what: str, location: Location) -> BlockError:
        return cls.at(
            location, f"`{what}` needs a backward, and the block has no `loss.backward()` for it."
        )

    @classmethod
    def checkpointing(cls) -> BlockError:
        return cls(
            "The model computes its activations again in the backward (gradient checkpointing), where "
            "a block does not see them. Call `model.gradient_checkpointing_disable()`, or "
            "`module.eval()`."
        )

    @classmethod
    def saves_in_edit(cls, what: str) -> BlockError:
        return cls(
            f"{what} was saved in an edit, which has no prompt of its own. Save it in a block of the "
            "edited model."
        )

    @classmethod
    def cut_in_branch(cls, what: str, at: Location, branch: Location) -> BlockError:
        return cls(
            f"A value from before a branch is written below it: {what} ({at}). In the branch its place "
            f"was assigned ({branch}), so whether it is still there is known only in the run. Read the "
            "place again, or write into it with `[:]` in the branch."
        )

    @classmethod
    def changes_outer(cls, what: str, location: Location) -> BlockError:
        return cls(
            f"{what} is from before the `with tracer.iter[…]` block and is changed in it. Use "
            f"`for step in tracer.iter[…]`, or save a value for each step. Recorded at {location}"
        )

    @classmethod
    def whole_batch(cls, location: Location, passes: int) -> BlockError:
        return cls.at(
            location,
            "the whole batch was used here, but the prompts of this block cannot run together: it "
            f"takes {passes} passes. Use the value inside each invoke.",
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
    def has_input(cls) -> BlockError:
        return cls(
            "This block already has its prompt (it was given to trace or generate), so it takes no "
            "further invokes. Open the block without a prompt and give each prompt to an invoke."
        )


class BlockAttributeError(BlockError, AttributeError):
    """A name that a block does not have."""


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
    def session(cls, what: str, location: Location) -> NotRunError:
        return cls(
            f"{what} has no value yet: its block runs when the session exits. Save it and read "
            f"`.value` after the session's `with`. Recorded at {location}"
        )

    @classmethod
    def freed(cls, what: str, location: Location) -> NotRunError:
        return cls(
            f"{what} went from one block of a session to another and was freed after its last use. "
            f"Save it where it is recorded: {location}"
        )

    @classmethod
    def no_values(cls, use: str, what: str, reason: str, location: Location) -> NotRunError:
        return cls(
            f"`{use}` needs the real value of {what}, and {reason}. Save it and use it after the "
            f"block, or give the computation to `graftwork.apply(function, proxy)`. Used at {location}"
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
    def later(cls, what: str, location: Location) -> ForeignProxyError:
        return cls(
            f"{what} and what it is used with belong to two blocks of the session, and the earlier "
            f"one's value cannot be changed by the later: make a new value of both, as in "
            f"`total = total + loss`. Recorded at {location}"
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
        return cls.at(
            write_at,
            f"This write needs a value that is computed later in the same forward.\n"
            f"  written: {write}\n"
            f"  needs:   {read} at {read_at}\n"
            "Take the later value from another invoke of the same prompt: it then runs first.",
        )

    @classmethod
    def cycle(cls, first: Location, second: Location) -> OrderError:
        return cls.at(
            first,
            "Two invokes wait for each other's later values, so neither can run first: this one and\n"
            f"  {second}\n"
            "Compute one of the values in a block of its own and save it.",
        )

    @classmethod
    def gradients(cls, first: Location, second: Location) -> OrderError:
        return cls.at(
            first,
            "Backwards wait for each other's gradients, so none can run first: this one and\n"
            f"  {second}\n"
            "Save the gradient in a block of its own, or name the backward: `with loss.backward():`.",
        )

    @classmethod
    def passes(cls, place: str, write: Location, passed: Location) -> OrderError:
        return cls.at(
            write,
            f"What is written to `{place}` here depends on what the attached module computes from it "
            f"at {passed}. Write a value that is known before it.",
        )


class ShapeError(GraftworkError):
    """A written value does not fit the place it is written to."""

    @classmethod
    def write(cls, place: str, location: Location, expected: str, found: str) -> ShapeError:
        return cls.at(
            location,
            f"The value written to {place} does not fit.\n"
            f"  expected: {expected}\n  found:    {found}\n"
            "Write a value of the expected shape, or write into a slice of it: "
            "`module.output[0][:, -1] = value`.",
        )

    @classmethod
    def weight(cls, name: str, shape: Sequence[int], value: object, given: object) -> ShapeError:
        size = getattr(given, "shape", None)
        what = f"a value of the shape {list(size)}" if size else f"`{value!r:.60}`"
        return cls(
            f"`{name}` has the shape {list(shape)}, and {what} was given. Give a tensor of that shape, "
            "or one number for all of it."
        )

    @classmethod
    def shared(cls, place: str, location: Location) -> ShapeError:
        return cls.at(
            location,
            f"{place} is one value shared by all prompts of the batch, so it cannot be changed for one "
            "prompt alone. Give this prompt a block of its own.",
        )


class LimitError(GraftworkError):
    """An operation would make something that no graph may make, see limits.py."""

    @classmethod
    def integer(cls, operation: str) -> LimitError:
        return cls(
            f"`{operation}` gives an integer that does not fit into 64 bits. Compute with floats, or "
            "with a tensor."
        )

    @classmethod
    def parts(cls, operation: str, most: int) -> LimitError:
        return cls(
            f"`{operation}` gives a container or a text of more than {most} parts. Keep such values in "
            "a tensor."
        )

    @classmethod
    def depth(cls, operation: str, most: int) -> LimitError:
        return cls(f"`{operation}` gives containers that are nested deeper than {most}.")

    @classmethod
    def run(cls, operation: str, most: int) -> LimitError:
        return cls(
            f"`{operation}`: the operations of this block make containers of more than {most} parts "
            "together. Keep such values in tensors."
        )

    @classmethod
    def elements(cls, what: str, location: Location, shape: Sequence[int], most: int) -> LimitError:
        return cls(
            f"{what} is a tensor {list(shape)}, and {most} numbers are the most that is allowed. "
            f"Recorded at {location}"
        )


class CapturedTensorError(GraftworkError):
    """A tensor taken from outside the block cannot be used as it was recorded."""

    @classmethod
    def changed(cls, name: str, shape: Sequence[int], location: Location) -> CapturedTensorError:
        return cls.at(
            location,
            f"{name} (shape {list(shape)}) was changed in place after it was recorded here and before "
            f"the block ran. Use `{name.strip('`')}.clone()` in the block if both values are wanted.",
        )

    @classmethod
    def meta(cls, name: str, location: Location) -> CapturedTensorError:
        return cls(
            f"{name} has no data (it is on the meta device: it was taken from the model before the "
            f"weights were loaded): {location}\nRead it inside the block, or call `model.load()` first."
        )

    @classmethod
    def mutated(cls, what: str, location: Location) -> CapturedTensorError:
        return cls.at(
            location,
            f"{what} changed its argument in place. Return the new value instead and assign it: "
            "`module.output[:] = result`.",
        )


class StepError(GraftworkError):
    """A place that the forward never reached.

    Attributes:
        ended: the generation ended before it.
    """

    ended = False

    @classmethod
    def never_ran(cls, what: str, location: Location, reason: str) -> StepError:
        return cls.at(location, f"{what} has no value: {reason}.")

    @classmethod
    def several_calls(cls, what: str, path: str, location: Location) -> StepError:
        return cls(
            f"{what} does not say which value: `{path}` is called several times in one forward. Write "
            f"`.calls[0].{what.strip('`').rpartition('.')[2]}` for the first call, `.calls[1]` for the "
            f"second. Recorded at {location}"
        )

    @classmethod
    def untaken(cls, what: str, location: Location) -> StepError:
        error = cls.at(location, f"{what} has no value: it belongs to a branch that was not taken.")
        error.ended = True
        return error

    @classmethod
    def no_gradient(cls, what: str, reason: str, location: Location) -> StepError:
        return cls(f"`{what}` cannot be here: {reason}. Recorded at {location}")


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
        return cls.at(
            location,
            f"{what} cannot be split into the prompts of a batch: {reason}. Give this prompt a block "
            "of its own.",
        )


class UnmeasuredError(ScheduleError):
    """A value whose sizes only the run tells."""

    @classmethod
    def unknown(cls, what: str, reason: str) -> UnmeasuredError:
        return cls(
            f"The shape of {what} is not known before the run: {reason}. Save the value, and ask after "
            "the block."
        )


class UnreachedError(UnmeasuredError, StepError):
    """A place that the trial run of a model never reached."""

    @classmethod
    def place(cls, place: str) -> UnreachedError:
        return cls(
            f"The shape of `{place}` is not known before the run: the trial run without weights, which "
            "is fed tokens alone, never reached this place. Save the value, and ask after the block."
        )


class SourceError(GraftworkError, AttributeError):
    """An operation inside a forward that cannot be reached."""

    @classmethod
    def no_text(cls, what: str) -> SourceError:
        return cls(
            f"{what} has no source text that Python can read: it was made by `exec`, written in C or "
            "typed where nothing is kept. The torch functions that a module calls can be reached "
            "without its text: `module.functions`."
        )

    @classmethod
    def not_plain(cls, what: str, reason: str) -> SourceError:
        return cls(
            f"the operations inside {what} cannot be reached: it is {reason}. The torch functions that "
            "a module calls can be reached all the same: `module.functions`."
        )

    @classmethod
    def module(cls, what: str) -> SourceError:
        return cls(
            f"{what} calls a module. Write `.source` of that module itself: `model.path.source`."
        )

    @classmethod
    def operation(cls, where: str, name: str, known: Iterable[str]) -> SourceError:
        return cls(f"{where} has no operation `{name}`. {near(name, known)}")

    @classmethod
    def never_called(cls, path: str, prefix: str, reason: str) -> SourceError:
        return cls(
            f"which function `{prefix}` of `{path}` calls is only known from a trial run, and {reason}"
        )


class InputError(GraftworkError, ValueError):
    """A prompt that cannot be run."""

    @classmethod
    def joins(cls, reason: str) -> InputError:
        return cls(f"these blocks cannot run as one: {reason}. Run them one after the other.")


class LoadError(GraftworkError):
    """A model that cannot be found or loaded."""

    @classmethod
    def compiled(cls, what: str) -> LoadError:
        return cls(
            f"this module cannot be looked into: {what}, and what runs then is no longer its modules. "
            "Give the module as it was before it was compiled: `compiled._orig_mod`, or, for one that "
            "was compiled in place, `module._compiled_call_impl = None`."
        )

    @classmethod
    def compiled_in_place(cls, path: str) -> LoadError:
        what = f"`{path}`" if path else "the model"
        return cls(
            f"{what} was compiled in place (`.compile()`), and what runs then is no longer its "
            "modules. Take that back for blocks: `module._compiled_call_impl = None`."
        )


class WireError(GraftworkError, ValueError):
    """A graph that cannot be sent, or bytes that are no graph that may be received."""

    @classmethod
    def unsendable(cls, what: str, reason: str, location: Location) -> WireError:
        return cls(f"{what} cannot be sent: {reason}. Recorded at {location}")

    @classmethod
    def python_function(cls, name: str, location: Location) -> WireError:
        return cls(
            f"`{name}` is a Python function, and a graph that is sent holds no code: {location}\n"
            "Build the value from proxies and functions of torch instead, without "
            "`graftwork.apply`; or save what the function needs and call it after the block."
        )

    @classmethod
    def damaged(cls, reason: str) -> WireError:
        return cls(
            f"These bytes are not a graph that `pack` has written: {reason}. Pack the graph again; if "
            "they came over a network, they may have been cut short."
        )

    @classmethod
    def version(cls, found: object, known: int, library: object) -> WireError:
        return cls(
            f"The graph has format {found!r} (written by graftwork {library!r}), this graftwork reads "
            f"format {known}. Install the same version of graftwork on both sides."
        )

    @classmethod
    def unknown(cls, what: str, name: str, where: str, known: Iterable[str]) -> WireError:
        return cls(
            f"{where} of the graph names the {what} {name!r}, which is not allowed in a graph or not "
            f"known to this version. {near(name, known)}"
        )

    @classmethod
    def content(cls, where: str, reason: str) -> WireError:
        return cls(f"{where} of the graph is refused: {reason}. Nothing of it was run.")


class EditError(GraftworkError):
    """Edits of a model cannot be kept, or do not fit a model."""

    @classmethod
    def file(cls, what: str, file: str, error: OSError) -> EditError:
        return cls(
            f"The edits cannot be {what} `{file}`: {error.strerror or error}. Give the path of a file "
            "that `save_edits` writes, in a folder that exists."
        )

    @classmethod
    def misfit(cls, file: str, of: str, own: str, reason: str) -> EditError:
        return cls(f"The edits in `{file}` were saved on {of} and do not fit this {own}: {reason}")


class DrawError(GraftworkError):
    """A graph that cannot be drawn as it was asked for."""

    @classmethod
    def no_graphviz(cls, form: str) -> DrawError:
        return cls(
            f"A picture as {form} needs Graphviz, whose program `dot` was not found. Install it "
            "(`apt install graphviz`, `brew install graphviz`), or write Mermaid text, which GitHub "
            'and notebooks draw: `graph.draw("graph.mmd")`.'
        )

    @classmethod
    def failed(cls, message: str) -> DrawError:
        return cls(
            f"Graphviz could not draw the graph: {message.strip()[:500]}\nDraw fewer operations "
            '(`draw(limit=50)`), or write Mermaid text: `graph.draw("graph.mmd")`.'
        )

    @classmethod
    def suffix(cls, path: str, known: Iterable[str]) -> DrawError:
        return cls(f"`{path}` does not end in a form that can be written: {', '.join(known)}.")


class OperationError(GraftworkError, TypeError):
    """An operation that cannot be recorded."""

    @classmethod
    def computed_anew(cls, changed: Location, source: str, source_at: Location) -> OperationError:
        return cls(
            f"This name is computed, and was changed at {changed}. Since then there is another "
            f"{source} ({source_at}), from which it is computed: neither the change nor the new value "
            "would be all of it. Write what it is computed from first, the name itself after."
        )

    @classmethod
    def attribute(cls, name: str) -> OperationError:
        return cls(
            f"`.{name} = …` of a value of the block cannot be recorded. Write into the value "
            "(`value[:] = …`), assign the place (`module.output = …`), or set it after the block."
        )

    @classmethod
    def outside_write(cls, name: str) -> OperationError:
        what = "tensor[...] = value" if name == "__setitem__" else f"tensor.{name}(value)"
        return cls(
            f"`{what}` with a value of the block would change a tensor from outside, when the block "
            "is only being written. Build the result from values instead (`torch.stack`, "
            "`torch.cat`, `torch.where`), or save the value and copy it after the block."
        )
