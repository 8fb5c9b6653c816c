"""The lens's functions against the same formulas written out on dense tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.lens.functions import (
    HEAD_DETECTION_PATTERNS,
    Slice,
    composition_scores,
    compute_head_attention_similarity_score,
    gelu_fast,
    gelu_new,
    get_corner,
    get_cumsum_along_dim,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
    is_lower_triangular,
    lm_accuracy,
    lm_cross_entropy_loss,
    relu2,
    remove_batch_dim,
    repeat_along_head_dimension,
    sample_logits,
    solu,
    to_numpy,
    transpose,
)
from graftwork.models.factored_matrix import FactoredMatrix
from graftwork.tracing.errors import GraftworkError, InputError, ShapeError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Shapes


def test_transpose_exchanges_the_last_two_dimensions() -> None:
    tensor = random(2, 3, 4)
    assert torch.equal(transpose(tensor), tensor.permute(0, 2, 1))


def test_batch_dimension_is_removed_only_if_it_is_one() -> None:
    assert torch.equal(remove_batch_dim(torch.ones(1, 3)), torch.ones(3))
    for tensor in (torch.ones(2, 3), torch.tensor(1.0)):
        assert remove_batch_dim(tensor) is tensor


def test_corner_of_tensors_and_of_factored_matrices() -> None:
    A, B = random(4, 5, 2), random(4, 2, 6, seed=1)
    assert torch.equal(get_corner(A), A[:3, :3, :3])
    torch.testing.assert_close(get_corner(FactoredMatrix(A, B), 2), (A @ B)[:2, :2, :2])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1.5, 2.0], requires_grad=True), np.array([1.5, 2.0], dtype=np.float32)),
        (torch.tensor([1.5], dtype=torch.bfloat16), np.array([1.5], dtype=np.float32)),
        (torch.tensor([1 + 2j]).conj(), np.array([1 - 2j], dtype=np.complex64)),
        (torch.nn.Parameter(torch.ones(2)), np.ones(2, dtype=np.float32)),
        ([1, 2], np.array([1, 2])),
        ((1.0, 2), np.array([1.0, 2.0])),
        ([torch.ones(2), torch.zeros(2)], np.array([[1, 1], [0, 0]], dtype=np.float32)),
        ([[1], [2]], np.array([[1], [2]])),
        (np.arange(3), np.arange(3)),
        (np.float32(2), np.float32(2)),
        (3, np.array(3)),
        (2.5, np.array(2.5)),
        (True, np.array(True)),
        ("a", np.array("a")),
    ],
)
def test_to_numpy(value: Any, expected: Any) -> None:
    found = to_numpy(value)
    assert isinstance(found, np.ndarray) and found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("reverse", [False, True])
def test_cumulative_sums(dim: int, reverse: bool) -> None:
    tensor = random(3, 4)
    expected = tensor.numpy()
    expected = (
        np.flip(np.cumsum(np.flip(expected, dim), dim), dim) if reverse else expected.cumsum(dim)
    )
    np.testing.assert_allclose(get_cumsum_along_dim(tensor, dim, reverse), expected)


def test_heads_have_memory_of_their_own_unless_asked() -> None:
    tensor = random(2, 3, 4)
    heads = repeat_along_head_dimension(tensor, 5)
    assert torch.equal(heads, torch.stack([tensor] * 5, dim=2))
    heads[:, :, 0] = 0
    assert torch.equal(heads[:, :, 1], tensor) and tensor.abs().min() > 0
    shared = repeat_along_head_dimension(tensor, 5, clone_tensor=False)
    assert shared.data_ptr() == tensor.data_ptr() and shared.shape == (2, 3, 5, 4)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(3, 3).tril(), True),
        (torch.eye(2, dtype=torch.int64), True),
        (torch.ones(3, 3), False),
        (torch.zeros(2, 3), False),
        (torch.zeros(1, 2, 2), False),
        (torch.zeros(2), False),
    ],
)
def test_lower_triangular(tensor: torch.Tensor, expected: bool) -> None:
    assert is_lower_triangular(tensor) is expected


# Slices

TENSOR = torch.arange(2 * 6 * 3).reshape(2, 6, 3)


@pytest.mark.parametrize(
    ("given_slice", "plain", "mode"),
    [
        (None, slice(None), "identity"),
        (2, 2, "int"),
        (-1, -1, "int"),
        (np.int64(2), 2, "int"),
        (torch.tensor(2), 2, "int"),
        ((4,), slice(4), "slice"),
        ((1, 5), slice(1, 5), "slice"),
        ((1, 5, 2), slice(1, 5, 2), "slice"),
        ((None, -1), slice(None, -1), "slice"),
        (slice(2, None), slice(2, None), "slice"),
        ([4, 1, 1], [4, 1, 1], "array"),
        ([], [], "array"),
        (torch.tensor([0, -1]), [0, -1], "array"),
        (np.array([3]), [3], "array"),
        ([True, False, True, False, False, False], [0, 2], "array"),
    ],
)
def test_slices_take_what_plain_indices_take(given_slice: Any, plain: Any, mode: str) -> None:
    one = Slice(given_slice)
    assert one.mode == mode
    assert torch.equal(one.apply(TENSOR, dim=1), TENSOR[:, plain])
    assert torch.equal(one.apply(TENSOR, dim=-2), TENSOR[:, plain])
    assert torch.equal(one.apply(TENSOR[0]), TENSOR[0][plain])
    indices = one.indices(6)
    assert isinstance(indices, np.ndarray) and indices.ndim == 1
    np.testing.assert_array_equal(indices, torch.arange(6)[plain].reshape(-1))
    kept = Slice.unwrap(given_slice).apply(TENSOR, dim=1)
    assert torch.equal(kept, TENSOR[:, [plain] if mode == "int" else plain])
    assert Slice.unwrap(one) is one


def test_index_of_a_slice_without_a_size() -> None:
    np.testing.assert_array_equal(Slice(4).indices(), [4])


def test_repr_of_a_slice_tells_its_mode() -> None:
    assert repr(Slice((1, 3))) == "Slice: slice(1, 3, None) Mode: slice"


# Composition


def dense_score(left: torch.Tensor, right: torch.Tensor) -> float:
    def norm(matrix: torch.Tensor) -> float:
        return math.sqrt(sum(entry**2 for entry in matrix.flatten().tolist()))

    return norm(left @ right) / (norm(left) * norm(right))


@pytest.mark.parametrize(("rank", "other"), [(2, 2), (2, 3), (9, 2), (2, 9)])
@pytest.mark.parametrize(
    ("left_dims", "right_dims"), [((), ()), ((3,), ()), ((), (3,)), ((2, 3), (4,)), ((2,), (2,))]
)
def test_each_left_matrix_is_composed_with_each_right_one(
    rank: int, other: int, left_dims: tuple[int, ...], right_dims: tuple[int, ...]
) -> None:
    left = FactoredMatrix(random(*left_dims, 7, rank), random(*left_dims, rank, 5, seed=1))
    right = FactoredMatrix(
        random(*right_dims, 5, other, seed=2), random(*right_dims, other, 6, seed=3)
    )
    found = composition_scores(left, right)
    assert found.shape == (*left_dims, *right_dims)
    expected = [
        dense_score(one, two)
        for one in (left.A @ left.B).reshape(-1, 7, 5)
        for two in (right.A @ right.B).reshape(-1, 5, 6)
    ]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_without_broadcasting_matrices_are_composed_one_with_one() -> None:
    left = FactoredMatrix(random(3, 1, 5, 2), random(3, 1, 2, 5, seed=1))
    right = FactoredMatrix(random(4, 5, 2, seed=2), random(4, 2, 5, seed=3))
    found = composition_scores(left, right, broadcast_dims=False)
    assert found.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            expected = dense_score(left.AB[i, 0], right.AB[j])
            assert abs(found[i, j].item() - expected) < 1e-12


def test_scores_of_half_precision_and_of_no_matrices() -> None:
    half = FactoredMatrix(random(3, 5, 2), random(3, 2, 5, seed=1)).to(torch.bfloat16)
    found = composition_scores(half, half.T)
    assert found.dtype == torch.bfloat16
    whole = half.to(torch.float32)
    expected = [[dense_score(a.AB, b.AB.T) for b in whole] for a in whole]  # type: ignore[attr-defined]
    torch.testing.assert_close(found.float(), torch.tensor(expected), rtol=1e-2, atol=1e-2)
    assert composition_scores(half[:0], half).shape == (0, 3)
    assert composition_scores(half[:2] * 0, half).isnan().all()


def test_gradients_of_composition_scores() -> None:
    factors = [random(2, 5, 2), random(2, 2, 4, seed=1), random(3, 4, 2, seed=2), random(3, 2, 5)]
    leaves = [factor.requires_grad_() for factor in factors]

    def scores(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
        return composition_scores(FactoredMatrix(A, B), FactoredMatrix(C, D))

    left, right = leaves[0] @ leaves[1], leaves[2] @ leaves[3]
    norm = torch.linalg.matrix_norm
    dense = norm(left[:, None] @ right) / (norm(left)[:, None] * norm(right))
    found = torch.autograd.grad(scores(*leaves).sin().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(dense.sin().sum(), leaves))


# Heads

TOKENS = torch.tensor([7, 1, 2, 7, 1, 1])


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[None]])
def test_detection_patterns(tokens: torch.Tensor) -> None:
    marks: dict[str, set[tuple[int, int]]] = {
        "previous_token_head": {(i, i - 1) for i in range(1, 6)},
        "duplicate_token_head": {(3, 0), (4, 1), (5, 1), (5, 4)},
        "induction_head": {(3, 1), (4, 2), (5, 2), (5, 5)},
    }
    assert set(HEAD_DETECTION_PATTERNS) == set(marks)
    for name, build in HEAD_DETECTION_PATTERNS.items():
        pattern = build(tokens)
        assert pattern.shape == (6, 6) and pattern.dtype == torch.float32
        assert {tuple(pair) for pair in pattern.nonzero().tolist()} == marks[name]
        assert set(pattern.unique().tolist()) == {0.0, 1.0} and is_lower_triangular(pattern)


def test_patterns_by_their_own_names() -> None:
    assert list(HEAD_DETECTION_PATTERNS.values()) == [
        get_previous_token_head_detection_pattern,
        get_duplicate_token_head_detection_pattern,
        get_induction_head_detection_pattern,
    ]
    assert get_previous_token_head_detection_pattern(TOKENS[:1]).tolist() == [[0.0]]


@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
@pytest.mark.parametrize("error_measure", ["mul", "abs"])
def test_similarity_of_attention_and_pattern(
    exclude_bos: bool, exclude_current_token: bool, error_measure: Any
) -> None:
    attention = random(6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf).softmax(-1)
    detection = get_induction_head_detection_pattern(TOKENS).double()
    before = attention.clone(), detection.clone()
    found = compute_head_attention_similarity_score(
        attention,
        detection,
        exclude_bos=exclude_bos,
        exclude_current_token=exclude_current_token,
        error_measure=error_measure,
    )
    pairs = [
        (attention[i, j].item(), detection[i, j].item())
        for i in range(6)
        for j in range(i + 1)
        if not (exclude_bos and j == 0) and not (exclude_current_token and i == j)
    ]
    if error_measure == "mul":
        assert found == pytest.approx(sum(a * d for a, d in pairs) / sum(a for a, _ in pairs))
    else:
        assert found == pytest.approx(1 - sum(abs(a - d) for a, d in pairs) / 6, abs=5.1e-4)
    assert isinstance(found, float)
    assert torch.equal(attention, before[0]) and torch.equal(detection, before[1])


def test_similarity_of_a_perfect_match() -> None:
    pattern = get_previous_token_head_detection_pattern(TOKENS)
    assert compute_head_attention_similarity_score(pattern, pattern) == 1
    found = compute_head_attention_similarity_score(pattern, pattern, error_measure="abs")
    assert found == 1


# Predictions


def plain_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """−log softmax of the next token, entry by entry."""
    batch, pos = tokens.shape
    rows = [
        [
            math.log(sum(math.exp(x) for x in logits[b, p].tolist()))
            - logits[b, p, int(tokens[b, p + 1])].item()
            for p in range(pos - 1)
        ]
        for b in range(batch)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@settings(deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), pos=st.integers(2, 5), seed=st.integers(0, 99), data=st.data())
def test_loss_is_the_mean_over_predictions_between_tokens(
    batch: int, pos: int, seed: int, data: st.DataObject
) -> None:
    logits = random(batch, pos, 7, seed=seed)
    tokens = random(batch, pos, 7, seed=seed + 1).argmax(-1)
    losses = plain_losses(logits, tokens)
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens), losses.mean())
    torch.testing.assert_close(lm_cross_entropy_loss(logits, tokens, per_token=True), losses)
    bits = st.lists(st.integers(0, 1), min_size=pos, max_size=pos)
    mask = torch.tensor(data.draw(st.lists(bits, min_size=batch, max_size=batch)))
    kept = mask[:, :-1] * mask[:, 1:]
    for one in (mask, mask.bool(), mask.float()):
        found = lm_cross_entropy_loss(logits, tokens, attention_mask=one)
        expected = (losses * kept).sum() / kept.sum()
        torch.testing.assert_close(found, expected, equal_nan=True)
        each = lm_cross_entropy_loss(logits, tokens, one, per_token=True)
        torch.testing.assert_close(each, losses * kept)


def test_masked_positions_have_neither_loss_nor_gradient() -> None:
    logits = random(2, 4, 5).requires_grad_()
    tokens = torch.tensor([[1, 2, 3, 4], [0, 1, -1, 50]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    (grad,) = torch.autograd.grad(lm_cross_entropy_loss(logits, tokens, mask), logits)
    assert grad[1, 1:].eq(0).all() and grad[:, -1].eq(0).all()
    assert grad[0, :-1].ne(0).all() and grad[1, 0].ne(0).all()
    broken = logits.detach().clone()
    broken[1, 1:] = torch.nan
    found = lm_cross_entropy_loss(broken, tokens, mask)
    assert torch.equal(found, lm_cross_entropy_loss(logits.detach(), tokens, mask))


def test_loss_of_one_prompt_without_batch_and_of_half_precision() -> None:
    logits, tokens = random(1, 4, 5), torch.tensor([[1, 2, 3, 4]])
    found = lm_cross_entropy_loss(logits[0], tokens[0], per_token=True)
    torch.testing.assert_close(found, plain_losses(logits, tokens)[0])
    half = logits.half()
    found = lm_cross_entropy_loss(half, tokens.int())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_losses(half.double(), tokens).mean())


def test_gradient_of_the_loss() -> None:
    logits, tokens = random(2, 4, 5).requires_grad_(), torch.tensor([[1, 2, 3, 4], [0, 0, 1, 1]])
    (found,) = torch.autograd.grad(lm_cross_entropy_loss(logits, tokens), logits)
    onehot = torch.nn.functional.one_hot(tokens[:, 1:], 5)
    expected = torch.zeros(2, 4, 5, dtype=torch.float64)
    expected[:, :-1] = (logits[:, :-1].softmax(-1) - onehot).detach() / 6
    torch.testing.assert_close(found, expected)


def test_accuracy_is_that_of_next_tokens() -> None:
    tokens = torch.tensor([[1, 2, 0], [0, 0, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 1, 0], [0, 1, 1]]), 3).float()
    found = lm_accuracy(logits, tokens, per_token=True)
    assert found.tolist() == [[True, False], [True, True]]
    assert lm_accuracy(logits, tokens).item() == 0.75


# Sampling

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def drawn(logits: torch.Tensor = LOGITS, count: int = 4000, **options: Any) -> list[float]:
    """How often each token is drawn."""
    torch.manual_seed(0)
    counts = Counter(sample_logits(logits.expand(count, -1), **options).tolist())
    return [counts[token] / count for token in range(logits.shape[-1])]


def close(found: list[float], probabilities: torch.Tensor) -> bool:
    """Exactly zero where the probability is, and elsewhere within five standard deviations."""
    return all(
        (f == 0) if p == 0 else abs(f - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-9
        for f, p in zip(found, probabilities.tolist(), strict=True)
    )


def keeping(tokens: list[int], logits: torch.Tensor = LOGITS) -> torch.Tensor:
    probabilities = torch.zeros_like(logits)
    probabilities[tokens] = logits[tokens].exp()
    return probabilities / probabilities.sum()


def test_temperature_zero_takes_the_most_likely_token() -> None:
    tokens = torch.full((1, 9), 1)
    assert sample_logits(LOGITS[None], temperature=0.0).tolist() == [1]
    found = sample_logits(LOGITS[None], temperature=0.0, freq_penalty=9.0, tokens=tokens)
    assert found.tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_from_the_softmax(temperature: float) -> None:
    assert close(drawn(temperature=temperature), (LOGITS / temperature).softmax(-1))


def test_top_k_keeps_the_most_likely_and_those_as_likely_as_the_last() -> None:
    assert close(drawn(top_k=1), keeping([1]))
    assert close(drawn(top_k=2), keeping([1, 2]))
    assert close(drawn(top_k=99), LOGITS.softmax(-1))
    ties = torch.tensor([0.0, 0.0, -1.0])
    assert close(drawn(ties, top_k=1), keeping([0, 1], ties))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.63, [1]), (0.64, [1, 2]), (0.9, [0, 1, 2]), (0.99, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    # Probabilities in falling order: 0.636, 0.234, 0.086, 0.032, 0.012.
    assert close(drawn(top_p=top_p), keeping(kept))


def test_top_p_of_one_keeps_every_token() -> None:
    assert close(drawn(top_p=1.0), LOGITS.softmax(-1))


def test_top_k_wins_over_top_p() -> None:
    assert close(drawn(top_k=3, top_p=0.1), keeping([0, 1, 2]))


def test_penalty_counts_each_row_after_the_temperature() -> None:
    logits = torch.stack([LOGITS, LOGITS]).repeat_interleave(4000, dim=0)
    rows = torch.tensor([[1, 1, 2], [0, 0, 0]])
    torch.manual_seed(0)
    found = sample_logits(
        logits, temperature=2.0, freq_penalty=0.7, tokens=rows.repeat_interleave(4000, dim=0)
    ).view(2, -1)
    for row, counts in zip(found, ([0, 2, 1, 0, 0], [3, 0, 0, 0, 0]), strict=True):
        expected = (LOGITS / 2 - 0.7 * torch.tensor(counts)).softmax(-1)
        shares = torch.bincount(row, minlength=5) / 4000
        assert close(shares.tolist(), expected)


def test_penalty_comes_before_the_filters() -> None:
    assert close(drawn(top_k=1, freq_penalty=5.0, tokens=torch.full((4000, 1), 1)), keeping([2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_not_changed_and_every_dtype_draws_in_float32(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)[None]
    torch.manual_seed(1)
    found = sample_logits(logits, freq_penalty=1.0, top_k=3, tokens=torch.tensor([[1, 2]]))
    torch.manual_seed(1)
    single = sample_logits(LOGITS[None], freq_penalty=1.0, top_k=3, tokens=torch.tensor([[1, 2]]))
    assert torch.equal(logits, LOGITS.to(dtype)[None])
    assert found.shape == (1,) and torch.equal(found, single)
    many = random(50, 1000).to(dtype)
    torch.manual_seed(1)
    found = sample_logits(many, temperature=0.7)
    torch.manual_seed(1)
    assert torch.equal(found, sample_logits(many.float(), temperature=0.7))


def test_one_row_without_batch() -> None:
    assert sample_logits(LOGITS, top_k=1, freq_penalty=0.1, tokens=torch.tensor([1, 1])).item() == 1


# Activation functions


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (gelu_new, lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        (gelu_fast, lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))),
        (solu, lambda x: x * np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
        (relu2, lambda x: np.where(x > 0, x, 0) ** 2),
    ],
    ids=["gelu_new", "gelu_fast", "solu", "relu2"],
)
def test_activation_functions(
    function: Callable[[torch.Tensor], torch.Tensor], formula: Callable[[Any], Any]
) -> None:
    values = random(2, 3, 9) * 3
    np.testing.assert_allclose(function(values), formula(values.numpy()), rtol=1e-10, atol=1e-12)
    assert function(values.half()).dtype == torch.float16
    assert torch.autograd.gradcheck(function, values[:1].requires_grad_())


# Errors


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: to_numpy({1}), InputError, "type set"),
        (lambda: Slice("a"), InputError, "is no slice"),  # type: ignore[arg-type]
        (lambda: Slice(True), InputError, "is no slice"),
        (lambda: Slice(()), InputError, "is no slice"),
        (lambda: Slice((1, 2, 3, 4)), InputError, "is no slice"),
        (lambda: Slice([1.5]), InputError, "whole numbers"),  # type: ignore[list-item]
        (lambda: Slice([[1], [2]]), InputError, "whole numbers"),  # type: ignore[list-item]
        (lambda: Slice(1).apply(torch.ones(3), 1), ShapeError, "no dimension 1"),
        (lambda: Slice((1, 2)).indices(), InputError, "give `max_ctx`"),
        (lambda: Slice(-1).indices(), InputError, "give `max_ctx`"),
        (
            lambda: composition_scores(*2 * [FactoredMatrix(torch.ones(3, 1), torch.ones(1, 2))]),
            ShapeError,
            "cannot be composed",
        ),
        (
            lambda: composition_scores(
                FactoredMatrix(torch.ones(2, 3, 1), torch.ones(2, 1, 3)),
                FactoredMatrix(torch.ones(4, 3, 1), torch.ones(4, 1, 3)),
                broadcast_dims=False,
            ),
            ShapeError,
            "leading dimensions",
        ),
        (lambda: get_induction_head_detection_pattern(torch.ones(2, 3)), ShapeError, "one prompt"),
        (
            lambda: compute_head_attention_similarity_score(torch.ones(2, 2), torch.eye(2)),
            ShapeError,
            "attention pattern is no square matrix with zeros",
        ),
        (
            lambda: compute_head_attention_similarity_score(torch.eye(2), torch.ones(2, 3)),
            ShapeError,
            "detection pattern is no square",
        ),
        (
            lambda: compute_head_attention_similarity_score(torch.eye(2), torch.eye(3)),
            ShapeError,
            "attention pattern has shape",
        ),
        (
            lambda: compute_head_attention_similarity_score(
                torch.eye(2),
                torch.eye(2),
                error_measure="square",  # type: ignore[arg-type]
            ),
            InputError,
            "'mul' or 'abs'",
        ),
        (
            lambda: lm_cross_entropy_loss(torch.ones(2, 3, 4), torch.ones(2, 4)),
            ShapeError,
            "and tokens of shape",
        ),
        (
            lambda: lm_cross_entropy_loss(
                torch.ones(2, 3, 4), torch.ones(2, 3), attention_mask=torch.ones(3)
            ),
            ShapeError,
            "and attention mask of shape",
        ),
        (lambda: lm_accuracy(torch.ones(4), torch.ones(())), ShapeError, "do not belong together"),
        (lambda: sample_logits(LOGITS, temperature=-1.0), InputError, "0 or more, found -1.0"),
        (lambda: sample_logits(LOGITS, top_k=0), InputError, "`top_k` is 1 or more"),
        (lambda: sample_logits(LOGITS, top_p=0.0), InputError, "`top_p` is above 0"),
        (lambda: sample_logits(LOGITS, top_p=1.5), InputError, "`top_p` is above 0"),
        (lambda: sample_logits(LOGITS, freq_penalty=1.0), InputError, "give `tokens`"),
    ],
)
def test_what_does_not_fit_is_refused(
    wrong: Callable[[], object], error: type[GraftworkError], message: str
) -> None:
    with pytest.raises(error, match=message):
        wrong()


@pytest.mark.parametrize("out", [6, -7, [0, 6], torch.tensor([-7])])
def test_indices_out_of_range(out: Any) -> None:
    with pytest.raises(IndexError):
        Slice(out).apply(TENSOR, dim=1)
    with pytest.raises(IndexError):
        Slice(out).indices(6)
