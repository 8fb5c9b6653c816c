"""What can be wrapped: several wrappers on one module, and modules that are compiled."""

import threading

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


def test_two_wrappers_run_in_two_threads_without_seeing_each_other() -> None:
    module, x = net(), torch.randn(2, 3)
    wanted, errors = module(x).detach(), []

    def work(number: int) -> None:
        model = Model(module)
        for _ in range(100):
            with model.trace(x):
                if number:
                    model[1].output[:] = 0
                found = model[2].output.save()
            zero = module[2].bias.detach().expand(2, 2)
            if not torch.allclose(found.value, zero if number else wanted):
                errors.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    held, own = Model(module), Model(module)
    with held._lock:
        other = threading.Thread(target=lambda: errors.append(own._lock.acquire(blocking=False)))
        other.start()
        other.join()
    assert errors == [False]


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
