"""Owns what einops needs to work on proxies: it looks up a backend by the type of its argument."""

from __future__ import annotations

from typing import Any

import torch

from .proxy import Proxy

try:
    from einops._backends import TorchBackend
except ImportError:  # einops is optional
    pass
else:

    class ProxyBackend(TorchBackend):
        """The torch backend: what it calls on tensors, proxies record.

        einops finds it among the subclasses of its own backends.
        """

        framework_name = __name__

        def __init__(self) -> None:
            self.torch = torch

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, Proxy)
