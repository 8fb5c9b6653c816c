"""Owns the files of a checkpoint: which there are, what stands in which, and which is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open

from ..tracing.errors import LoadError

_OTHER_FORMATS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NOT_FOR_FILES = ("trust_remote_code", "code_revision", "force_download")


class CheckpointFiles:
    """The files of a folder or of a repository of the hub.

    Args:
        name: as the user calls it.
        folder: the folder, or the hub id.
        hub: options for the hub.
    """

    def __init__(self, name: str, folder: str, hub: Mapping[str, Any]) -> None:
        self.name = name
        self._folder = folder
        self._hub = hub

    def path(self, file: str) -> str | None:
        """Where a file is; None if there is none of that name."""
        if os.path.isdir(self._folder):
            path = os.path.join(self._folder, self._hub.get("subfolder") or "", file)
            return path if os.path.isfile(path) else None
        from transformers.utils.hub import cached_file

        options = {key: value for key, value in self._hub.items() if key not in _NOT_FOR_FILES}
        try:
            found: str | None = cached_file(self._folder, file, **options)
        except OSError:  # not there, or no network: loading says which
            return None
        return found

    def tensors(
        self, variant: str | None = None, named: str | None = None
    ) -> dict[str, str] | None:
        """The name of the file that has each stored tensor; None where none is in safetensors.

        Args:
            variant: of the weights, as for `from_pretrained`.
            named: the file that the configuration names.

        Raises:
            LoadError: a file is damaged.
        """
        middle = f".{variant}" if variant else ""
        files = [named] if named else [f"model{middle}.safetensors"]
        files += [] if named else [f"model.safetensors.index{middle}.json"]
        for file in files:
            path = self.path(file)
            if path is None:
                continue
            if file.endswith(".json"):
                return indexed(path)
            with opened(path) as handle:
                return dict.fromkeys(handle.keys(), file)
        return None

    def check(self, variant: str | None = None, named: str | None = None) -> None:
        """Find the file for which loading failed.

        Raises:
            LoadError: one is missing or damaged; the message names it.
        """
        stored = self.tensors(variant, named)
        if stored is not None:
            for file in dict.fromkeys(stored.values()):
                with opened(self._needed(file)) as handle:
                    held = set(handle.keys())
                wrong = [one for one, place in stored.items() if place == file and one not in held]
                if wrong:
                    raise LoadError(
                        f"{file!r} of {self.name!r} has no `{wrong[0]}`, which the index says is in "
                        "it: the index does not belong to these files."
                    )
            return
        for file in _OTHER_FORMATS:
            path = self.path(file)
            if path is None:
                continue
            parts = dict.fromkeys(indexed(path).values()) if file.endswith(".json") else [file]
            for part in parts:
                _check_pickled(self._needed(part), self.name)

    def _needed(self, file: str) -> str:
        path = self.path(file)
        if path is None:
            raise LoadError(
                f"{self.name!r} has no file {file!r}, which its index names: the checkpoint is "
                "incomplete."
            )
        return path


def indexed(path: str) -> dict[str, str]:
    """The file of each tensor by an index.

    Raises:
        LoadError: it is no index.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{os.path.basename(path)} is no index of weights: {error!r}") from error


@contextmanager
def opened(path: str, mapped: bool = False) -> Iterator[Any]:
    """A safetensors file.

    Args:
        mapped: map it into memory: slices are lazy, and whole tensors stay tied to the file.

    Raises:
        LoadError: it is damaged.
    """
    try:
        with _handle(path, mapped) as handle:
            yield handle
    except SafetensorError as error:
        raise LoadError(
            f"{os.path.basename(path)} ({os.path.getsize(path)} bytes) cannot be read: {error}. It is "
            "damaged or was not written to its end: fetch it again."
        ) from error


def _handle(path: str, mapped: bool) -> Any:
    if not mapped:
        try:
            return safe_open(path, framework="pt", backend="pread")
        except TypeError:  # safetensors before 0.8 maps always
            pass
    return safe_open(path, framework="pt")


def _check_pickled(path: str, name: str) -> None:
    import torch

    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever the unpickler says of what it cannot read
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise LoadError(
            f"{os.path.basename(path)} ({os.path.getsize(path)} bytes) of {name!r} cannot be read: "
            f"{reason}. It is damaged or was not written to its end: fetch it again."
        ) from error
