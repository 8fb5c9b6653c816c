"""Names for places: the module tree as the user writes it."""

from .envoy import Alias, AliasEnvoy, Envoy, Root

__all__ = ["Alias", "AliasEnvoy", "Envoy", "Root"]
