"""What can be wrapped: several wrappers on one module, and modules that are compiled."""

import pytest
import torch

from graftwork import Model
from graftwork.tracing.errors import LoadError


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).eval()


def test_two_wrappers_of_one_module_do_not_see_each_other() -> None:
    module, x = net(), torch.randn(2, 3)
    first, second, inner = Model(module), Model(module), Model(module[0])
    with first.trace(x):
        first[1].output[:] = 0
        edited = first[2].output.save()
    with second.trace(x):
        second[2].output[:] += edited
        both = second[2].output.save()
    with inner.trace(x) as tracer:
        whole = tracer.output.save()
    torch.testing.assert_close(edited.value, module[2].bias.detach().expand(2, 2))
    torch.testing.assert_close(both.value, (module(x) + module[2].bias).detach())
    torch.testing.assert_close(whole.value, module[0](x).detach())


# torch warns of its own use of TorchScript, which it deprecates, when it compiles.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["whole", "inner", "in place", "script"])
def test_compiled_modules_are_refused_with_what_to_do(way) -> None:
    module = net()
    if way == "whole":
        module = torch.compile(module)
    elif way == "inner":
        module[1] = torch.compile(module[1])
    elif way == "in place":
        module[1].compile()
    else:
        module = torch.jit.trace(module, torch.randn(2, 3))
    with pytest.raises(LoadError, match="before it was compiled"):
        Model(module)
