"""Factored matrices against the same formulas on dense tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.models.factored_matrix import FactoredMatrix
from graftwork.tracing.errors import GraftworkError, InputError, OperationError, ShapeError

LEADING = [(), (3,), (2, 3)]


def factors(
    leading: tuple[int, ...] = (), ldim: int = 5, mdim: int = 2, rdim: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*leading, ldim, mdim, generator=generator, dtype=torch.float64),
        torch.randn(*leading, mdim, rdim, generator=generator, dtype=torch.float64),
    )


def pair(*args: Any, **kwargs: Any) -> tuple[FactoredMatrix, torch.Tensor]:
    """A factored matrix and the dense tensor that it stands for."""
    A, B = factors(*args, **kwargs)
    return FactoredMatrix(A, B), A @ B


def check(found: object, dense: torch.Tensor) -> FactoredMatrix:
    assert isinstance(found, FactoredMatrix)
    assert found.shape == dense.shape
    torch.testing.assert_close(found.A @ found.B, dense)
    return found


# Shapes and broadcasting


@pytest.mark.parametrize("leading", LEADING)
def test_shape_and_factors(leading: tuple[int, ...]) -> None:
    A, B = factors(leading, 5, 2, 7)
    matrix = FactoredMatrix(A, B)
    assert matrix.shape == (A @ B).shape and isinstance(matrix.shape, torch.Size)
    assert (matrix.ldim, matrix.mdim, matrix.rdim) == (5, 2, 7)
    assert matrix.ndim == len(leading) + 2
    assert matrix.has_leading_dims == bool(leading)
    assert torch.equal(matrix.A, A) and torch.equal(matrix.B, B)
    assert torch.equal(matrix.pair[0], A) and torch.equal(matrix.pair[1], B)
    assert torch.equal(matrix.AB, A @ B)
    check(matrix.T, (A @ B).transpose(-1, -2))


def test_leading_dimensions_are_broadcast_as_views() -> None:
    A, _ = factors((4, 1))
    _, B = factors((3,), seed=1)
    matrix = check(FactoredMatrix(A, B), A @ B)
    assert matrix.A.shape == (4, 3, 5, 2) and matrix.B.shape == (4, 3, 2, 5)
    assert matrix.A.data_ptr() == A.data_ptr() and matrix.B.data_ptr() == B.data_ptr()


def test_product_in_the_other_order() -> None:
    A, B = factors((3,))
    torch.testing.assert_close(FactoredMatrix(A, B).BA, B @ A)


def test_repr_tells_shape_and_inner_dimension() -> None:
    assert repr(pair((3,))[0]) == "FactoredMatrix: Shape((3, 5, 5)), Hidden Dim(2)"


# Algebra

sizes = st.integers(1, 5)
leadings = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3)])


@settings(deadline=None, derandomize=True)
@given(l=sizes, m=sizes, r=sizes, n=sizes, k=sizes, first=leadings, second=leadings)
def test_products_are_those_of_dense_matrices(
    l: int,  # noqa: E741
    m: int,
    r: int,
    n: int,
    k: int,
    first: tuple[int, ...],
    second: tuple[int, ...],
) -> None:
    matrix, dense = pair(first, l, m, r)
    right, dense_right = pair(second, r, k, n, seed=1)
    left, dense_left = pair(second, n, k, l, seed=2)
    products = [
        check(matrix @ right, dense @ dense_right),
        check(matrix @ dense_right, dense @ dense_right),
        check(left @ matrix, dense_left @ dense),
        check(dense_left @ matrix, dense_left @ dense),
    ]
    assert [one.mdim for one in products] == [min(m, r, k), min(m, r), min(k, l, m), min(m, l)]
    column, row = torch.randn(r, dtype=torch.float64), torch.randn(l, dtype=torch.float64)
    torch.testing.assert_close(matrix @ column, dense @ column)
    torch.testing.assert_close(row @ matrix, row @ dense)


@settings(deadline=None, derandomize=True)
@given(l=sizes, m=sizes, k=sizes, r=sizes, first=leadings, second=leadings)
def test_sums_are_those_of_dense_matrices(
    l: int,  # noqa: E741
    m: int,
    k: int,
    r: int,
    first: tuple[int, ...],
    second: tuple[int, ...],
) -> None:
    one, dense_one = pair(first, l, m, r)
    two, dense_two = pair(second, l, k, r, seed=1)
    assert check(one + two, dense_one + dense_two).mdim == m + k
    check(one - two, dense_one - dense_two)
    check(-one, -dense_one)
    for found, expected in [
        (one + dense_two, dense_one + dense_two),
        (dense_two + one, dense_two + dense_one),
        (one - dense_two, dense_one - dense_two),
        (dense_two - one, dense_two - dense_one),
    ]:
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize(
    "scalar",
    [
        3,
        -0.5,
        torch.tensor(2.0),
        torch.tensor([[[[2.0]]]]),
        np.float32(2),
        np.float64(2),
        np.int64(2),
    ],
    ids=repr,
)
def test_scalars_multiply_from_both_sides(leading: tuple[int, ...], scalar: Any) -> None:
    matrix, dense = pair(leading)
    number = float(scalar)
    check(matrix * scalar, dense * number)
    check(scalar * matrix, dense * number)


def test_a_chain_with_small_inner_dimension_never_has_a_large_factor() -> None:
    wide, _ = pair((), 40, 2, 40)
    thin = torch.randn(40, 3, dtype=torch.float64)
    assert (wide @ wide).A.shape == (40, 2) and (wide @ wide).B.shape == (2, 40)
    assert (wide @ thin).pair[1].shape == (2, 3)
    assert (thin.T @ wide).pair[0].shape == (3, 2)


# Parts


@pytest.mark.parametrize(
    ("part", "dense"),
    [
        (lambda m: m[1], lambda d: d[1]),
        (lambda m: m[-1, 0], lambda d: d[-1, 0]),
        (lambda m: m[:, 1:], lambda d: d[:, 1:]),
        (lambda m: m[..., 2], lambda d: d[..., 2:3]),
        (lambda m: m[..., -1, :], lambda d: d[..., -1:, :]),
        (lambda m: m[..., -1, -1], lambda d: d[..., -1:, -1:]),
        (lambda m: m[0, 1, 2, 3], lambda d: d[0, 1, 2:3, 3:4]),
        (lambda m: m[0, :, 1:3, ::2], lambda d: d[0, :, 1:3, ::2]),
        (lambda m: m[None], lambda d: d[None]),
        (lambda m: m[:, None, 0], lambda d: d[:, None, 0]),
        (lambda m: m[0, 0, None], lambda d: d[0, 0, None]),
        (lambda m: m[0, ..., None, 1, :], lambda d: d[0, :, None, 1:2, :]),
        (lambda m: m[[1, 0]], lambda d: d[[1, 0]]),
        (lambda m: m[torch.tensor([True, False])], lambda d: d[:1]),
        (lambda m: m[torch.eye(2, 3, dtype=torch.bool)], lambda d: d[[0, 1], [0, 1]]),
        (lambda m: m[[0, 1], [2, 0]], lambda d: d[[0, 1], [2, 0]]),
        (lambda m: m[..., [0, 2], :], lambda d: d[..., [0, 2], :]),
        (lambda m: m[..., torch.tensor([3, 0])], lambda d: d[..., [3, 0]]),
        (lambda m: m[..., [0, 2], [1, 3]], lambda d: d[..., [0, 2], :][..., [1, 3]]),
        (lambda m: m[..., torch.arange(5) > 2, :], lambda d: d[..., 3:, :]),
        (lambda m: m[...], lambda d: d),
        (lambda m: m[np.int64(1), np.int64(0), np.int64(2)], lambda d: d[1, 0, 2:3]),
    ],
)
def test_parts_are_those_of_the_dense_matrix(
    part: Callable[[Any], FactoredMatrix], dense: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    matrix, product = pair((2, 3))
    check(part(matrix), dense(product))


def test_iteration_ends() -> None:
    matrix, dense = pair((3,))
    heads: list[FactoredMatrix] = list(matrix)  # type: ignore[call-overload]
    assert len(heads) == 3
    check(heads[2], dense[2])
    rows: list[FactoredMatrix] = list(matrix[0])  # type: ignore[call-overload]
    assert [row.shape for row in rows] == [(1, 5)] * 5


@pytest.mark.parametrize("k", [0, 1, 2, -3, -4, -5])
def test_unsqueeze_adds_a_leading_dimension(k: int) -> None:
    matrix, dense = pair((2, 3))
    check(matrix.unsqueeze(k), dense.unsqueeze(k))


def test_corner_is_dense_and_cuts_each_dimension() -> None:
    matrix, dense = pair((4, 2))
    torch.testing.assert_close(matrix.get_corner(), dense[:3, :3, :3, :3])
    torch.testing.assert_close(matrix.get_corner(2), dense[:2, :2, :2, :2])


# Decompositions

SHAPES = [(6, 2, 6), (6, 2, 4), (3, 5, 4), (6, 4, 3), (2, 4, 6), (4, 4, 4), (1, 1, 1)]


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_value_decomposition(
    leading: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    matrix, dense = pair(leading, *shape)
    rank = min(shape)
    U, S, V = matrix.svd()
    assert U.shape == (*leading, shape[0], rank) and V.shape == (*leading, shape[2], rank)
    torch.testing.assert_close(S, torch.linalg.svdvals(dense)[..., :rank])
    torch.testing.assert_close(U @ torch.diag_embed(S) @ V.mT, dense)
    eye = torch.eye(rank, dtype=torch.float64).expand(*leading, -1, -1)
    torch.testing.assert_close(U.mT @ U, eye)
    torch.testing.assert_close(V.mT @ V, eye)
    torch.testing.assert_close(matrix.norm(), torch.linalg.matrix_norm(dense))
    _, _, Vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(matrix.Vh.abs(), Vh.mT[..., :rank].abs())


def test_decomposition_is_kept() -> None:
    matrix, _ = pair()
    assert matrix.U is matrix.U and matrix.svd()[1] is matrix.S
    assert matrix.Vh is matrix.V


def test_kept_decomposition_hides_no_gradient() -> None:
    A, B = factors()
    A.requires_grad_()
    matrix = FactoredMatrix(A, B)
    with torch.no_grad():
        kept = matrix.S
    assert matrix.S.requires_grad and not kept.requires_grad
    for _ in range(2):
        matrix.S.sum().backward()
    with torch.no_grad():
        assert matrix.S is kept


def test_decomposition_of_inference_mode_is_not_kept_for_training() -> None:
    matrix, _ = pair()
    with torch.inference_mode():
        _ = matrix.S
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (matrix.S * weight).sum().backward()


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("mdim", [2, 5, 7])
def test_eigenvalues_are_those_of_the_product(leading: tuple[int, ...], mdim: int) -> None:
    matrix, dense = pair(leading, 5, mdim, 5)
    found = matrix.eigenvalues
    assert found.shape == (*leading, mdim) and found.dtype == torch.complex128
    expected = torch.linalg.eigvals(dense)
    # Order is not defined: symmetric functions of the eigenvalues are compared.
    for power in range(1, 5):
        torch.testing.assert_close((found**power).sum(-1), (expected**power).sum(-1))


def test_norm_of_nearly_orthogonal_factors_has_small_error() -> None:
    A = torch.cat([torch.eye(4), torch.eye(4)], dim=1).double().mT
    B = torch.cat([torch.eye(8)[:4, :4], torch.zeros(4, 4)], dim=1).double()
    tiny = FactoredMatrix(torch.cat([A, A], 1), torch.cat([B, -B * (1 + 1e-12)], 0))
    assert abs(tiny.norm().item() / (1e-12 * 8**0.5) - 1) < 1e-2


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("shape", SHAPES)
def test_other_factorisations_of_the_same_matrix(
    leading: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    matrix, dense = pair(leading, *shape)
    even = check(matrix.make_even(), dense)
    torch.testing.assert_close(even.A.mT @ even.A, even.B @ even.B.mT)
    left, right = matrix.collapse_l(), matrix.collapse_r()
    rank = min(shape)
    assert left.shape == (*leading, rank, shape[2]) and right.shape == (*leading, shape[0], rank)
    torch.testing.assert_close(left.mT @ left, dense.mT @ dense)
    torch.testing.assert_close(right @ right.mT, dense @ dense.mT)
    torch.testing.assert_close(matrix.U @ left, dense)
    torch.testing.assert_close(right @ matrix.V.mT, dense)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decompositions_keep_the_dtype(dtype: torch.dtype) -> None:
    matrix, _ = pair((3,))
    matrix = matrix.to(dtype)
    dense = matrix.A.float() @ matrix.B.float()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    U, S, V = matrix.svd()
    assert {U.dtype, S.dtype, V.dtype, matrix.norm().dtype, matrix.make_even().A.dtype} == {dtype}
    product = (U.float() * S.float().unsqueeze(-2)) @ V.float().mT
    torch.testing.assert_close(product, dense, **close)
    torch.testing.assert_close(matrix.norm().float(), torch.linalg.matrix_norm(dense), **close)
    found = matrix.eigenvalues
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found.sum(-1).real, dense.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_to_moves_both_factors() -> None:
    matrix, _ = pair()
    moved = matrix.to("meta", torch.float32)
    assert {moved.A.device.type, moved.B.device.type} == {"meta"}
    assert (moved.A.dtype, moved.B.dtype) == (torch.float32, torch.float32)


# Gradients


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("shape", [(6, 2, 5), (3, 4, 3), (5, 3, 2)])
@pytest.mark.parametrize(
    ("of_factors", "of_dense"),
    [
        (lambda m: m.norm(), torch.linalg.matrix_norm),
        (lambda m: m.S.sum(-1), lambda d: torch.linalg.svdvals(d).sum(-1)),
        (lambda m: m.AB.sin().sum(), lambda d: d.sin().sum()),
        (lambda m: (m + m).AB.sin().sum(), lambda d: (2 * d).sin().sum()),
        (lambda m: (m @ m.T).AB.sin().sum(), lambda d: (d @ d.mT).sin().sum()),
        (lambda m: m.make_even().AB.sin().sum(), lambda d: d.sin().sum()),
    ],
    ids=["norm", "S", "AB", "sum", "product", "make_even"],
)
def test_gradients_are_those_of_the_dense_formula(
    leading: tuple[int, ...],
    shape: tuple[int, int, int],
    of_factors: Callable[[FactoredMatrix], torch.Tensor],
    of_dense: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    A, B = (factor.requires_grad_() for factor in factors(leading, *shape))
    found = torch.autograd.grad(of_factors(FactoredMatrix(A, B)).sum(), (A, B))
    expected = torch.autograd.grad(of_dense(A @ B).sum(), (A, B))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 2, 5), (3, 4, 3), (5, 3, 2)])
def test_gradients_of_singular_vectors(shape: tuple[int, int, int]) -> None:
    A, B = (factor.requires_grad_() for factor in factors((2,), *shape))

    def first_vectors(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """u vᵀ of the largest singular value, which has no sign."""
        matrix = FactoredMatrix(A, B)
        return matrix.U[..., :1] @ matrix.V[..., :1].mT

    assert torch.autograd.gradcheck(first_vectors, (A, B))


def test_gradient_of_the_norm_is_finite_where_factors_lack_full_rank() -> None:
    A, B = (factor.requires_grad_() for factor in factors())
    twice = FactoredMatrix(A, B) + FactoredMatrix(A, B)
    found = torch.autograd.grad(twice.norm(), (A, B))
    expected = torch.autograd.grad(torch.linalg.matrix_norm(2 * A @ B), (A, B))
    torch.testing.assert_close(found, expected)
    zero = FactoredMatrix(A * 0, B)
    assert all(torch.equal(g, g * 0) for g in torch.autograd.grad(zero.norm(), (A, B)))


def test_second_derivatives_of_the_norm() -> None:
    A, B = (factor.requires_grad_() for factor in factors((2,), 4, 2, 3))
    assert torch.autograd.gradgradcheck(lambda A, B: FactoredMatrix(A, B).norm(), (A, B))


def test_norm_under_transforms_of_torch() -> None:
    A, B = factors((3,), 4, 2, 3)

    def norm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return FactoredMatrix(A, B).norm()

    dense = torch.linalg.matrix_norm(A @ B)
    torch.testing.assert_close(torch.func.vmap(norm)(A, B), dense)
    found = torch.func.vmap(torch.func.grad(norm))(A, B)
    torch.testing.assert_close(found, (A @ B @ B.mT) / dense[:, None, None])


# Errors


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda m: FactoredMatrix(torch.ones(3), m.B), ShapeError, "two dimensions or more"),
        (lambda m: FactoredMatrix(m.A, m.A), ShapeError, "inner dimensions differ: A is"),
        (
            lambda m: FactoredMatrix(torch.ones(4, 5, 2), torch.ones(3, 2, 5)),
            ShapeError,
            "leading dimensions of",
        ),
        (lambda m: m @ torch.ones(4, 5), ShapeError, "differ: 6 and 4"),
        (lambda m: m @ torch.ones(5), ShapeError, "differ: 6 and 5"),
        (lambda m: torch.ones(6) @ m, ShapeError, "differ: 6 and 5"),
        (lambda m: torch.ones(5, 6) @ m, ShapeError, "differ: 6 and 5"),
        (lambda m: m @ m, ShapeError, "differ: 6 and 5"),
        (lambda m: m @ torch.ones(4, 6, 2), ShapeError, "leading dimensions"),
        (lambda m: m @ torch.tensor(2.0), ShapeError, "found a number"),
        (lambda m: torch.tensor(2.0) @ m, ShapeError, "found a number"),
        (lambda m: m * torch.ones(2), OperationError, "takes a number"),
        (lambda m: torch.ones(3, 5, 6) * m, OperationError, "takes a number"),
        (lambda m: m + m.T, ShapeError, "cannot be added"),
        (lambda m: m - torch.ones(6), ShapeError, "cannot be added"),
        (lambda m: torch.tensor(1.0) + m, ShapeError, "cannot be added"),
        (lambda m: m + torch.ones(4, 5, 6), ShapeError, "leading dimensions"),
        (lambda m: m.BA, ShapeError, "`BA` needs a square matrix"),
        (lambda m: m.eigenvalues, ShapeError, "`eigenvalues` needs a square matrix"),
        (lambda m: m[0, 0, 0, 0], InputError, "too long an index"),
        (lambda m: m[..., 0, ...], InputError, "too long an index"),
        (lambda m: m[:, 0, None], InputError, "no new axis"),
        (lambda m: m[0, torch.ones(5, 6, dtype=torch.bool)], InputError, "one index each"),
        (lambda m: m[torch.ones(3, 5, dtype=torch.bool)], InputError, "may not reach"),
        (lambda m: m.unsqueeze(2), InputError, "give 0 to 1"),
        (lambda m: m.unsqueeze(-2), InputError, "give 0 to 1"),
        (lambda m: m.unsqueeze(-5), InputError, "give 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    wrong: Callable[[FactoredMatrix], object], error: type[GraftworkError], message: str
) -> None:
    matrix, _ = pair((3,), 5, 2, 6)
    with pytest.raises(error, match=message):
        wrong(matrix)


@pytest.mark.parametrize("index", [3, (0, 5), (0, 0, 6), (0, -6)])
def test_indices_out_of_range(index: Any) -> None:
    with pytest.raises(IndexError):
        pair((3,), 5, 2, 6)[0][index]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m @ 2,
        lambda m: [1.0] @ m,
        lambda m: m + 1,
        lambda m: 1 + m,
        lambda m: m - "a",
        lambda m: 1 - m,
        lambda m: m * "a",
        lambda m: np.ones(2) * m,
        lambda m: np.ones((5, 5)) @ m,
        lambda m: m * m,
    ],
)
def test_operands_of_other_kinds_are_type_errors(wrong: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError):
        wrong(pair()[0])
