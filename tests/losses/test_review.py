"""The hierarchical context loss against a literal transcription of its definition."""

import numpy as np
import pytest
import torch

from distill.losses import hierarchical_context_loss


def adaptive_average_pool(x: np.ndarray, size: int) -> np.ndarray:
    """Cell i averages rows floor(i H / size) to ceil((i + 1) H / size), and columns alike."""
    height, width = x.shape[2:]
    out = np.empty((*x.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, -(-(i + 1) * height // size))
            columns = slice(j * width // size, -(-(j + 1) * width // size))
            out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


def literal_loss(student: list[np.ndarray], teacher: list[np.ndarray], pool_sizes: tuple[int, ...]) -> float:
    total = 0.0
    for s, t in zip(student, teacher):
        loss, weight, weights = ((s - t) ** 2).mean(), 1.0, 1.0
        for size in pool_sizes:
            if size >= s.shape[2]:
                continue
            weight /= 2
            loss += weight * ((adaptive_average_pool(s, size) - adaptive_average_pool(t, size)) ** 2).mean()
            weights += weight
        total += loss / weights
    return total


@pytest.mark.parametrize("pool_sizes", [(4, 2, 1), (5, 3), ()])
def test_equals_the_literal_formula(pool_sizes):
    rng = np.random.default_rng()
    shapes = [(2, 3, 13, 17), (2, 5, 6, 7), (2, 3, 4, 5), (2, 4, 3, 9), (2, 4, 1, 2)]
    student = [rng.normal(size=shape) for shape in shapes]
    teacher = [rng.normal(size=shape) for shape in shapes]
    loss = hierarchical_context_loss(*[[torch.from_numpy(x) for x in side] for side in (student, teacher)], pool_sizes)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(literal_loss(student, teacher, pool_sizes), rel=1e-10)


def test_is_zero_with_zero_gradient_for_equal_features():
    features = [torch.randn(1, 2, 8, 8, requires_grad=True)]
    loss = hierarchical_context_loss(features, [features[0].detach().clone()])
    loss.backward()
    assert loss.item() == 0 and features[0].grad.abs().max() == 0


def test_gradient_is_that_of_finite_differences():
    teacher = [torch.randn(1, 2, 5, 6, dtype=torch.float64)]
    student = [torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda x: hierarchical_context_loss([x], teacher), student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_float32_for_half_precision_features_and_under_autocast(dtype):
    # In half precision the square of 300 overflows float16, and bfloat16 keeps 8 bits of it.
    student, teacher = torch.full((1, 4, 8, 8), 300.0, dtype=dtype), torch.zeros(1, 4, 8, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hierarchical_context_loss([student], [teacher])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(student[0, 0, 0, 0].double().item() ** 2, rel=1e-5)


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 8\).*\(1, 2, 4, 8\)"):
        hierarchical_context_loss([torch.zeros(1, 2, 8, 8)], [torch.zeros(1, 2, 4, 8)])
    with pytest.raises(ValueError, match="at least one"):
        hierarchical_context_loss([], [])
