"""What a graph may name when it is sent: computation, and nothing else."""

import re
from typing import Any

import pytest
import torch

from graftwork import Model
from graftwork.tracing import allow_list
from graftwork.tracing.operations import APPLY, METHODS, OPERATORS, function_operation
from graftwork.tracing.structure import leaves

# Written without a look at the deny set: what none of the names may be or contain.
DANGEROUS = re.compile(
    r"(^|\.)_|ptr|storage|hook|backward|pickle|dlpack|share|pin_|empty|resize|strided|sparse"
    r"|quantize|fbgemm|cudnn|miopen|mkldnn|autocast|load|save|from_|compile|script|jit|\beval\b"
    r"|file|open|exec|import|seed|rng|thread|profil|deterministic|set_(?!item)|batch_norm|^sym_"
)
DANGEROUS_NAMES = frozenset(
    "item tolist numpy new apply_ map_ map2_ as_subclass module_load record_stream lobpcg is_shared "
    "is_pinned untyped_storage retain_grad vmap fork wait frombuffer as_tensor asarray set_ "
    "handle_torch_function instance_norm triplet_margin_with_distance_loss".split()
)


def test_no_allowed_name_is_dangerous() -> None:
    names = list(allow_list.operations())
    assert len(names) > 1000
    # Those of the package itself have no dot; each is listed by hand.
    of_torch = [name for name in names if "." in name]
    bad = [name for name in of_torch if DANGEROUS.search(name.removeprefix("operator.i"))]
    assert bad == []
    assert [name for name in names if name.rpartition(".")[2] in DANGEROUS_NAMES] == []


def test_every_allowed_function_is_of_torch_itself() -> None:
    for name, function in allow_list.functions().items():
        module = getattr(function, "__module__", None) or "torch"
        assert module.startswith("torch") or module == "boltons.funcutils", name
        assert not isinstance(function, type), name


def test_every_name_leads_to_its_operation_and_back() -> None:
    table = allow_list.operations()
    for name, operation in table.items():
        back = allow_list.name_of(operation)
        assert back is not None
        # Some functions have several names; each leads to what runs the same.
        assert table[back].function is operation.function, name
    assert table["take"] is not table["getitem"]
    assert allow_list.name_of(table["take"]) == "take"


def test_what_users_record_most_is_allowed() -> None:
    for name in "sum mean norm add_ clamp_ softmax to cpu cuda detach view reshape float".split():
        assert allow_list.name_of(METHODS[name]) == f"Tensor.{name}"
    for name, operation in OPERATORS.items():
        assert allow_list.name_of(operation) == f"operator.{operation.name}", name
    for function, name in [
        (torch.softmax, "torch.softmax"),
        (torch.relu, "torch.relu"),
        (torch.relu_, "torch.relu_"),
        (torch.einsum, "torch.einsum"),
        (torch.nn.functional.gelu, "torch.nn.functional.gelu"),
        (torch.nn.functional.linear, "torch.nn.functional.linear"),
        (torch.linalg.svd, "torch.linalg.svd"),
        (torch.fft.rfft, "torch.fft.rfft"),
        (torch.special.expit, "torch.special.expit"),
        (torch.Tensor.add, "Tensor.add"),
    ]:
        assert allow_list.name_of(function_operation(function)) == name


@pytest.mark.parametrize(
    "name", ["data_ptr", "numpy", "register_hook", "backward", "share_memory_"]
)
def test_methods_that_reach_memory_have_no_name(name: str) -> None:
    assert allow_list.name_of(METHODS[name]) is None


def refused(operation: Any, *args: Any, **kwargs: Any) -> list[str]:
    name = allow_list.name_of(operation)
    assert name is not None
    return list(allow_list.complaints(operation, name, args, kwargs))


def test_no_call_writes_into_what_it_is_given() -> None:
    relu = function_operation(torch.nn.functional.relu)
    x = torch.ones(2)
    assert refused(relu, x) == refused(relu, x, inplace=False) == refused(relu, x, False) == []
    assert refused(relu, x, inplace=True) and refused(relu, x, True)
    assert refused(METHODS["add"], x, 1, out=x)
    dropout = function_operation(torch.nn.functional.dropout)
    assert refused(dropout, x, 0.5, True, True) and not refused(dropout, x, 0.5, True)
    embedding = function_operation(torch.nn.functional.embedding)
    assert refused(embedding, x, x, None, 1.0) and not refused(embedding, x, x, None, None)
    normalize = function_operation(torch.nn.functional.normalize)
    assert refused(normalize, x, 2.0, 1, 1e-12, x)
    # `apply` runs a function as it is: `relu_` would change the model's weights.
    assert refused(APPLY, torch.relu_, x) and refused(APPLY, torch.Tensor.copy_, x, x)
    assert refused(APPLY, torch.nn.functional.relu, x, True)
    assert not refused(APPLY, torch.relu, x)


def arguments() -> list[list[Any]]:
    """Arguments that one or the other function of torch takes, by position."""
    a, b, row, index = torch.rand(3, 3), torch.rand(3, 3), torch.rand(3), torch.tensor([0, 2, 1])
    image = torch.rand(2, 3, 4, 4)
    return [
        [a],
        [a, b],
        [a, b, torch.rand(3, 3)],
        [a, 1],
        [a, 0, 1],
        [a, 0, index[:2], torch.rand(2, 3)],
        [image, 3],
        [image, row, row.clone()],
        [a, row, row.clone(), row.clone(), row.clone(), True, 0.1, 1e-5, False],
        [a, 0.5, True],
        [a, 0.5, True, True],
        [a, 0.0, 1.0, True, True],
        [[a, b]],
        [a, index, 0.1],
        [index, a],
        [index, a, None, 0.1],
        [a, 2.0, 1, 1e-12, b],
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_allowed_operation_changes_its_arguments() -> None:
    ran = 0
    for name, operation in allow_list.operations().items():
        if name in ("apply", "put", "again"):
            continue
        for args in arguments():
            if list(allow_list.complaints(operation, name, tuple(args), {})):
                continue
            tensors = [leaf for leaf in leaves(args) if isinstance(leaf, torch.Tensor)]
            before = [tensor.clone() for tensor in tensors]
            try:
                operation.function(*args)
            except Exception:  # most functions take only some of these arguments
                continue
            ran += 1
            assert all(map(torch.equal, tensors, before)), (name, args)
            assert [tensor._version for tensor in tensors] == [0] * len(tensors), (name, args)
    assert ran > 1500


@pytest.mark.parametrize(
    "name", ["__class__", "_version", "gi_frame", "f_globals", "tb_frame", "a.b", "", 3, None]
)
def test_a_field_leads_into_no_internals(name: Any) -> None:
    field = allow_list.operations()["field"]
    put = allow_list.operations()["put"]
    assert refused(field, torch.ones(1), name)
    assert refused(put, torch.ones(1), torch.ones(1), field, (name,), {})
    assert not refused(field, torch.ones(1), "logits")


def test_put_takes_views_alone() -> None:
    put, x = allow_list.operations()["put"], torch.ones(1)
    assert not refused(put, x, x, METHODS["view"], (1,), {})
    for operation in (APPLY, METHODS["add"], METHODS["add_"], put, torch.relu, "getitem", None):
        assert refused(put, x, x, operation, (1,), {})


@pytest.mark.parametrize(
    "path", ["__class__", "h.__class__", "_private.x", "h..0", ".", "h.0 x", 7]
)
def test_paths_hold_no_private_names(path: Any) -> None:
    assert not allow_list.is_path(path)


@pytest.mark.parametrize("path", ["", "transformer.h.0.attn", "layer-1.conv_2", "Блок.0"])
def test_paths_of_modules(path: str) -> None:
    assert allow_list.is_path(path)


def test_a_method_is_chosen_by_its_name_alone(toy: Model, x: torch.Tensor) -> None:
    # The name was an argument once, so that a keyword could choose another method.
    with pytest.raises(TypeError):
        METHODS["sum"].function(x, _name="data_ptr")


def test_a_field_of_a_value_is_data_not_a_function(toy: Model, x: torch.Tensor) -> None:
    field = allow_list.operations()["field"]
    with pytest.raises(AttributeError, match="is a function, no data"):
        field.function(range(3), "index")
    assert field.function(range(3), "stop") == 3
    with pytest.raises(AttributeError, match="no method"):
        METHODS["half"].function(torch.nn.Linear(2, 2))
