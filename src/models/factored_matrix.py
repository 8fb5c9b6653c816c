"""Owns matrices that are kept as a product of two factors, such as the QK and OV circuits of heads.

Where the inner dimension is small, no operation here forms the product, save the ones that return it.
Which weights become which circuit is not decided here.
"""

from __future__ import annotations

import numbers
from typing import Any, TypeAlias

import torch

from ..tracing.errors import InputError, OperationError, ShapeError

HALF = (torch.float16, torch.bfloat16)

Scalar: TypeAlias = "complex | torch.Tensor"
Svd: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FactoredMatrix:
    """The matrix A @ B of shape [..., ldim, rdim], kept as its factors.

    The leading dimensions of the factors are broadcast against each other, as views. The factors must
    not be changed in place after the decomposition was asked for, because it is kept.

    Attributes:
        A: left factor, [..., ldim, mdim].
        B: right factor, [..., mdim, rdim].
        ldim, mdim, rdim: rows, inner dimension and columns.
        shape: [..., ldim, rdim].

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (QK and OV circuits);
    the surface is that of TransformerLens, FactoredMatrix.py.
    """

    # numpy leaves `array_scalar * matrix` to the methods below.
    __array_ufunc__ = None

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """
        Args:
            A: [..., ldim, mdim].
            B: [..., mdim, rdim].

        Raises:
            ShapeError: a factor is no matrix, or inner or leading dimensions do not fit.
        """
        if A.ndim < 2 or B.ndim < 2:
            raise ShapeError(
                f"The factors must have two dimensions or more, found {list(A.shape)} and "
                f"{list(B.shape)}."
            )
        if A.shape[-1] != B.shape[-2]:
            raise ShapeError(
                f"The inner dimensions differ: A is {list(A.shape)} and B is {list(B.shape)}, so "
                f"{A.shape[-1]} columns meet {B.shape[-2]} rows."
            )
        leading = _leading(A.shape, B.shape)
        self.A = A.expand(*leading, -1, -1)
        self.B = B.expand(*leading, -1, -1)
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self._svd: Svd | None = None

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({tuple(self.shape)}), Hidden Dim({self.mdim})"

    @property
    def ndim(self) -> int:
        """How many dimensions the product has."""
        return len(self.shape)

    @property
    def has_leading_dims(self) -> bool:
        """Whether there are dimensions before the rows and columns."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors (A, B)."""
        return self.A, self.B

    @property
    def AB(self) -> torch.Tensor:
        """The product, [..., ldim, rdim]; large where the inner dimension is small."""
        return self.A @ self.B

    @property
    def BA(self) -> torch.Tensor:
        """The product in the other order, [..., mdim, mdim].

        Raises:
            ShapeError: the matrix is not square.
        """
        self._check_square("BA")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose, [..., rdim, ldim]."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def to(self, *args: Any, **kwargs: Any) -> FactoredMatrix:
        """Both factors on another device or in another dtype: the arguments of `torch.Tensor.to`."""
        return FactoredMatrix(self.A.to(*args, **kwargs), self.B.to(*args, **kwargs))

    # Products and sums

    def __matmul__(self, other: torch.Tensor | FactoredMatrix) -> Any:
        """The product with a vector (a tensor, [..., ldim]) or a matrix (factored).

        The inner dimension of the result is the smallest that the factors allow.

        Raises:
            ShapeError: the columns of this matrix are not the rows of `other`.
        """
        if isinstance(other, FactoredMatrix):
            _check_inner(self.shape, other.shape)
            return (self @ other.A) @ other.B
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        _check_inner(self.shape, other.shape)
        if other.ndim == 1:
            return (self.A @ (self.B @ other).unsqueeze(-1)).squeeze(-1)
        if self.mdim <= self.rdim:
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: torch.Tensor) -> Any:
        """The product of a vector (a tensor, [..., rdim]) or a matrix (factored) with this one.

        Raises:
            ShapeError: the columns of `other` are not the rows of this matrix.
        """
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        _check_inner(other.shape, self.shape)
        if other.ndim == 1:
            return ((other @ self.A).unsqueeze(-2) @ self.B).squeeze(-2)
        if self.mdim <= self.ldim:
            return FactoredMatrix(other @ self.A, self.B)
        return FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: Scalar) -> FactoredMatrix:
        """The matrix times a number or a tensor of one element.

        Raises:
            OperationError: a tensor of more elements.
        """
        if isinstance(scalar, torch.Tensor):
            if scalar.numel() != 1:
                raise OperationError(
                    f"`*` takes a number, found a tensor of shape {list(scalar.shape)}; write `@` for "
                    "the product of matrices."
                )
            scalar = scalar.reshape(())
        elif not isinstance(scalar, numbers.Number):
            return NotImplemented
        return FactoredMatrix(self.A * scalar, self.B)

    def __rmul__(self, scalar: Scalar) -> FactoredMatrix:
        return self * scalar

    def __neg__(self) -> FactoredMatrix:
        return FactoredMatrix(-self.A, self.B)

    def __add__(self, other: torch.Tensor | FactoredMatrix) -> Any:
        """The sum with a factored matrix (factored, [A1 A2] [B1; B2]) or a matrix (dense).

        Raises:
            ShapeError: rows, columns or leading dimensions differ.
        """
        if not isinstance(other, torch.Tensor | FactoredMatrix):
            return NotImplemented
        if self.shape[-2:] != other.shape[-2:]:
            raise ShapeError(
                f"Matrices of shapes {list(self.shape)} and {list(other.shape)} cannot be added: rows "
                "and columns must be the same."
            )
        leading = _leading(self.shape, other.shape)
        if isinstance(other, torch.Tensor):
            return self.AB + other
        return FactoredMatrix(
            torch.cat([one.A.expand(*leading, -1, -1) for one in (self, other)], dim=-1),
            torch.cat([one.B.expand(*leading, -1, -1) for one in (self, other)], dim=-2),
        )

    def __radd__(self, other: torch.Tensor) -> Any:
        return self + other

    def __sub__(self, other: torch.Tensor | FactoredMatrix) -> Any:
        """The difference: factored or dense, as the sum."""
        if not isinstance(other, torch.Tensor | FactoredMatrix):
            return NotImplemented
        return self + (-other)

    def __rsub__(self, other: torch.Tensor) -> Any:
        return -self + other

    # Parts

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """A part: leading dimensions first, then rows, then columns.

        Numbers remove leading dimensions, but keep rows and columns as dimensions of size 1. Rows and
        columns are chosen independently: `matrix[[0, 2], [1, 3]]` has two rows and two columns.

        Raises:
            InputError: more indices than dimensions, or a new axis among rows and columns.
            IndexError: an index out of range.
        """
        leading, inner = self._split(index if isinstance(index, tuple) else (index,))
        A, B = self.A[leading], self.B[leading]
        if inner:
            A = _take(A, inner[0], dim=-2)
        if len(inner) == 2:
            B = _take(B, inner[1], dim=-1)
        return FactoredMatrix(A, B)

    def _split(self, index: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
        """The indices of the leading dimensions, and those of rows and columns."""
        used = sum(_axes(one) for one in index)
        if used > self.ndim or sum(one is Ellipsis for one in index) > 1:
            raise InputError(
                f"{index} is too long an index for a matrix of shape {list(self.shape)}."
            )
        leading: list[Any] = []
        inner: list[Any] = []
        left = self.ndim - 2
        for one in index:
            parts = [slice(None)] * (self.ndim - used) if one is Ellipsis else [one]
            for part in parts:
                if left > 0 or (part is None and not inner):
                    leading.append(part)
                    left -= _axes(part)
                elif part is None or _axes(part) > 1:
                    raise InputError(
                        f"{index} does not fit a matrix of shape {list(self.shape)}: rows and columns "
                        "take one index each, and no new axis."
                    )
                else:
                    inner.append(part)
        if left < 0:
            raise InputError(
                f"{index} does not fit a matrix of shape {list(self.shape)}: a mask may not reach from "
                "the leading dimensions into the rows."
            )
        return tuple(leading), inner

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """A new leading dimension of size 1 at position k of the shape.

        Raises:
            InputError: k is not a position before the rows.
        """
        if not (0 <= k <= self.ndim - 2 or -self.ndim - 1 <= k <= -3):
            raise InputError(
                f"A dimension cannot be added at {k} of the shape {list(self.shape)}: give 0 to "
                f"{self.ndim - 2}."
            )
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def get_corner(self, k: int = 3) -> torch.Tensor:
        """The first k entries of each dimension, as a dense tensor."""
        return self[(slice(k),) * self.ndim].AB

    # Decompositions

    def svd(self) -> Svd:
        """The singular value decomposition (U, S, V), with U @ diag(S) @ V.T equal to the product.

        It is computed from QR decompositions of the factors that are taller than the inner dimension.
        Half precision is computed in float32. It is kept if no gradient is recorded. Gradients are
        those of `torch.linalg.svd` and `torch.linalg.qr`: finite where the factors have full rank and,
        for U and V, where the singular values differ from each other and from zero.

        Returns:
            U [..., ldim, k], S [..., k] in falling order, V [..., rdim, k] (singular vectors are
            columns in both), with k = min(ldim, mdim, rdim).
        """
        recorded = torch.is_grad_enabled() and (self.A.requires_grad or self.B.requires_grad)
        if self._svd is not None and not recorded:
            return self._svd
        left, middle, right = _reduced(at_least_single(self.A), at_least_single(self.B))
        U, S, Vh = torch.linalg.svd(middle, full_matrices=False)
        U = U if left is None else left @ U
        V = Vh.mT if right is None else right @ Vh.mT
        found = (U.to(self.A.dtype), S.to(self.A.dtype), V.to(self.A.dtype))
        if not recorded and not S.is_inference():
            self._svd = found
        return found

    @property
    def U(self) -> torch.Tensor:
        """Left singular vectors as columns, [..., ldim, k]; see `svd`."""
        return self.svd()[0]

    @property
    def S(self) -> torch.Tensor:
        """Singular values in falling order, [..., k]; see `svd`."""
        return self.svd()[1]

    @property
    def V(self) -> torch.Tensor:
        """Right singular vectors as columns, [..., rdim, k]; see `svd`."""
        return self.svd()[2]

    @property
    def Vh(self) -> torch.Tensor:
        """The same as `V`, under the name that TransformerLens gives it; it is not transposed."""
        return self.V

    @property
    def eigenvalues(self) -> torch.Tensor:
        """The eigenvalues of BA, complex, [..., mdim], in no order: half precision as complex64.

        They are those of the product, up to how many are zero: if BAv = λv, then AB(Av) = λ(Av).

        Raises:
            ShapeError: the matrix is not square.
        """
        self._check_square("eigenvalues")
        product = at_least_single(self.B) @ at_least_single(self.A)
        values: torch.Tensor = torch.linalg.eigvals(product)
        return values

    def norm(self) -> torch.Tensor:
        """The Frobenius norm, [...]. Its gradient is finite for factors of any rank."""
        A, B = at_least_single(self.A), at_least_single(self.B)
        norm: torch.Tensor = _FrobeniusNorm.apply(A, B)  # type: ignore[no-untyped-call]
        return norm.to(self.A.dtype)

    def make_even(self) -> FactoredMatrix:
        """The same matrix with the factors U @ diag(√S) and diag(√S) @ V.T."""
        U, S, V = self.svd()
        root = S.sqrt().unsqueeze(-2)
        return FactoredMatrix(U * root, (V * root).mT)

    def collapse_l(self) -> torch.Tensor:
        """diag(S) @ V.T, [..., k, rdim]: the matrix without its left orthogonal factor U."""
        _, S, V = self.svd()
        return (V * S.unsqueeze(-2)).mT

    def collapse_r(self) -> torch.Tensor:
        """U @ diag(S), [..., ldim, k]: the matrix without its right orthogonal factor V."""
        U, S, _ = self.svd()
        return U * S.unsqueeze(-2)

    def _check_square(self, what: str) -> None:
        if self.ldim != self.rdim:
            raise ShapeError(f"`{what}` needs a square matrix, found shape {list(self.shape)}.")


class _FrobeniusNorm(torch.autograd.Function):
    """‖AB‖ for A [..., ldim, mdim] and B [..., mdim, rdim].

    The value comes from QR decompositions, whose own gradient is infinite for factors that lack full
    rank, such as those of a sum in which a factor occurs twice. That of the norm is ABBᵀ/‖AB‖.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = torch.linalg.matrix_norm(_reduced(A, B)[1])
        return norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        A, B, norm = ctx.saved_tensors
        # A norm of zero has no gradient; zero is among its subgradients, as in torch.linalg.norm.
        scale = (grads[0] / norm.masked_fill(norm == 0, torch.inf))[..., None, None]
        return A @ (B @ B.mT) * scale, (A.mT @ A) @ B * scale


def triangular(factor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The QR decomposition of a matrix that is taller than wide; others are left as they are.

    Args:
        factor: [..., row, column].

    Returns:
        Orthonormal columns [..., row, column] and a triangular matrix [..., column, column]; or None
        and `factor`.
    """
    if factor.shape[-2] <= factor.shape[-1]:
        return None, factor
    orthogonal, rest = torch.linalg.qr(factor)
    return orthogonal, rest


def _reduced(
    A: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """AB as left @ middle @ right.T; left and right have orthonormal columns, None is no factor."""
    left, upper = triangular(A)
    right, lower = triangular(B.mT)
    return left, upper @ lower.mT, right


def at_least_single(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: decompositions are not implemented for it."""
    return tensor.float() if tensor.dtype in HALF else tensor


def _check_inner(left: torch.Size, right: torch.Size) -> None:
    """Refuse a product whose inner or leading dimensions do not fit."""
    if not left or not right:
        raise ShapeError(
            "`@` takes a vector or a matrix, found a number; write `*` for its product."
        )
    rows = right[0] if len(right) == 1 else right[-2]
    if left[-1] != rows:
        raise ShapeError(
            f"The inner dimensions of {list(left)} @ {list(right)} differ: {left[-1]} and {rows}."
        )
    _leading(left, right)


def _leading(left: torch.Size, right: torch.Size) -> torch.Size:
    """The leading dimensions of two matrices together."""
    try:
        leading: torch.Size = torch.broadcast_shapes(left[:-2], right[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ShapeError(
            f"The leading dimensions of {list(left)} and {list(right)} cannot be broadcast against "
            "each other."
        ) from None
    return leading


def _axes(index: Any) -> int:
    """How many dimensions an index chooses from."""
    if index is None or index is Ellipsis:
        return 0
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        return index.ndim
    return 1


def _take(tensor: torch.Tensor, index: Any, dim: int) -> torch.Tensor:
    """Entries along the row dimension (-2) or the column dimension (-1), which stays."""
    if isinstance(index, numbers.Integral):
        return tensor.select(dim, int(index)).unsqueeze(dim)
    return tensor[(..., index, slice(None))] if dim == -2 else tensor[..., index]


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> torch.Tensor:
    """How strongly one circuit writes into what another one reads: ‖LR‖ / (‖L‖ ‖R‖), Frobenius norms.

    Args:
        left: [*left_dims, l, d].
        right: [*right_dims, d, r].
        broadcast_dims: whether each left matrix meets each right one. Without, the leading dimensions
            are broadcast against each other.

    Returns:
        [*left_dims, *right_dims], or the leading dimensions broadcast: from 0 to 1, and NaN where a
        matrix is zero.

    Raises:
        ShapeError: the columns of `left` are not the rows of `right`, or leading dimensions do not fit.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Composition".
    """
    if left.rdim != right.ldim:
        raise ShapeError(
            f"Matrices of shapes {list(left.shape)} and {list(right.shape)} cannot be composed: the "
            "columns of the first must be the rows of the second."
        )
    # Factors with orthonormal columns do not change a norm, so only the small ones are multiplied.
    upper = triangular(at_least_single(left.A))[1] @ at_least_single(left.B)
    lower = at_least_single(right.A) @ triangular(at_least_single(right.B).mT)[1].mT
    norms_left, norms_right = at_least_single(left.norm()), at_least_single(right.norm())
    if broadcast_dims:
        norms_left = norms_left.reshape([*norms_left.shape, *[1] * norms_right.ndim])
        products = _norms_of_all_products(upper, lower)
    else:
        FactoredMatrix(upper, lower)  # refuses leading dimensions that do not fit
        products = torch.linalg.matrix_norm(upper @ lower)
    scores: torch.Tensor = products / (norms_left * norms_right)
    return scores.to(left.A.dtype)


def _norms_of_all_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """‖LR‖ of each left matrix and each right one, [*left_dims, *right_dims]."""
    rows, columns = left.shape[-2], right.shape[-1]
    shape = (*left.shape[:-2], *right.shape[:-2])
    if 0 in shape:
        return left.new_zeros(shape)
    # All right matrices side by side: [d, n · columns]. One left matrix at a time bounds the memory.
    beside = right.flatten(0, -3).transpose(0, 1).flatten(1) if right.ndim > 2 else right
    norms = [
        torch.linalg.vector_norm((one @ beside).view(rows, -1, columns), dim=(0, 2))
        for one in left.reshape(-1, rows, left.shape[-1])
    ]
    return torch.stack(norms).reshape(shape)
