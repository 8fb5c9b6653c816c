"""What can be wrapped: several wrappers on one module, and modules that are compiled."""

import threading

import pytest
import torch

from graftwork import LanguageModel, Model
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


def is_free(model: Model) -> bool:
    """Whether another thread may run on a model now."""
    found: list[bool] = []

    def try_it() -> None:
        found.append(model._lock.acquire(blocking=False))
        if found[0]:
            model._lock.release()

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    return found[0]


def test_a_module_and_what_is_inside_it_take_turns() -> None:
    module, other = net(), net()
    first, last, alone = Model(module[0]), Model(module[2]), Model(other)
    with first._lock:
        assert is_free(last) and is_free(alone) and not is_free(first)
    whole = Model(module)
    with first._lock:
        assert not is_free(whole) and not is_free(last) and is_free(alone)
        with whole._lock:
            assert not is_free(last)
        assert not is_free(whole)
    assert is_free(whole) and is_free(first)
    shared = Model(torch.nn.Sequential(other[0], module[0]))
    with alone._lock:
        assert not is_free(shared) and not is_free(last)


def test_a_lazy_model_and_a_wrapper_of_what_it_loaded_take_turns() -> None:
    lazy = LanguageModel("graftwork/tiny")
    inner = Model(lazy.load().transformer.h[0])
    with inner._lock:
        assert not is_free(lazy)
    assert is_free(lazy)


def test_a_part_and_the_whole_in_two_threads() -> None:
    module, x = net(), torch.randn(2, 3)
    wanted, first = module(x).detach(), module[0](x).detach()
    part, whole = Model(module[0]), Model(module)
    errors: list[str] = []

    def edit() -> None:
        for _ in range(150):
            with part.trace(x) as tracer:
                part.output[:] = 0
                found = tracer.output.save()
            if bool(found.value.any()):
                errors.append("part")

    def read() -> None:
        for _ in range(150):
            with whole.trace(x):
                hidden, found = whole[0].output.save(), whole[2].output.save()
            if not (torch.allclose(found.value, wanted) and torch.allclose(hidden.value, first)):
                errors.append("whole")

    threads = [threading.Thread(target=work) for work in (edit, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


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
