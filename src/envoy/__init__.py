"""Names for places: the module tree as the user writes it."""

from .envoy import Alias, AliasEnvoy, Envoy, Root
from .rename import Names, names_of

__all__ = ["Alias", "AliasEnvoy", "Envoy", "Names", "Root", "names_of"]
