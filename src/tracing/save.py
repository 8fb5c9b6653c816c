"""Owns `graftwork.save`: keeping what any value holds, beyond the run."""

from __future__ import annotations

from typing import Any

from .context import current_tracer
from .proxy import save_all


def save(value: Any) -> Any:
    """Keep a value beyond the run, as its own `.save()` does, or all that a structure holds.

    Args:
        value: a value of the block, or a list, dict or other container with some. A list or dict stays
            the one that it is: what is put into it later in the block is kept, too, as it is when the
            block ends.

    Returns:
        What `value.save()` gives; a list or dict itself; for another container, one with what was
        saved. Anything else comes back as it is.

    Example:
        with model.trace(prompt):
            streams = graftwork.save([])
            for layer in model.layers:
                streams.append(layer.resid_post)
        torch.stack(streams)
    """
    tracer = current_tracer()
    if tracer is not None and isinstance(value, (list, dict)):
        tracer.recording.containers.append(value)
    return save_all(value)
