"""Owns the errors of pruning: named constructors that build the message."""

from __future__ import annotations

from collections.abc import Iterable

from ..tracing.errors import GraftworkError, near


class PruningError(GraftworkError):
    """A pruning run that cannot be carried out as it was configured."""

    @classmethod
    def unknown(cls, what: str, name: object, known: Iterable[str]) -> PruningError:
        """A name that is not one of those known."""
        names = list(known)
        hint = near(str(name), names).removeprefix("It has ")
        hint = hint if hint.startswith("Did you mean") else f"Known are {hint}"
        return cls(f"`{name}` is no {what}. {hint}")

    @classmethod
    def bad_value(cls, field: str, value: object, wanted: str) -> PruningError:
        return cls(f"PruningConfig.{field} is {value!r}; {wanted}.")

    @classmethod
    def missing_package(cls, package: str, what: str) -> PruningError:
        return cls(f"{what} needs the package `{package}`: pip install {package}")

    @classmethod
    def other_run(cls, folder: object, fields: Iterable[str]) -> PruningError:
        return cls(
            f"`{folder}` holds a run of another configuration: {', '.join(sorted(fields))} differ. "
            "Give another output_folder, or the configuration that it was begun with."
        )
