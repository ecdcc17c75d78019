"""Prototype selection against a literal float64 transcription of the rule."""

import numpy as np
import pytest
import torch

from distill.prototypes import dense_instances, select_prototypes


def normalized(rows):
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths == 0, 1, lengths)


def literal_candidates(rows, sigma, quantile):
    density = np.array([sum(np.exp(-(((1 - a @ b) / sigma) ** 2)) for b in rows) for a in rows])
    return density > np.sort(density)[int(len(rows) * quantile)]


def literal_select(student, teacher, num=10, alpha=10.0, sigma=0.1, quantile=0.4, repeats=False):
    """Every sum written out as it is defined; residuals and all differences are held as they are."""
    student, teacher = (normalized(np.asarray(x, dtype=np.float64)) for x in (student, teacher))
    dense = literal_candidates(student, sigma, quantile) & literal_candidates(teacher, sigma, quantile)
    candidates = [k for k in range(len(student)) if dense[k]]
    r_s, r_t = student.copy(), teacher.copy()
    picks = []
    while len(picks) < num and len(picks) < len(candidates):
        errors = {}
        for k in candidates:
            if k in picks and not repeats:
                continue
            i_s, i_t = r_s @ student[k], r_t @ teacher[k]
            w_s = (alpha * (i_s + i_t) + i_s) / (1 + 2 * alpha)
            w_t = (alpha * (i_s + i_t) + i_t) / (1 + 2 * alpha)
            errors[k] = (
                ((w_s[:, None] * student[k] - r_s) ** 2).sum()
                + ((w_t[:, None] * teacher[k] - r_t) ** 2).sum()
                + alpha * ((w_s - w_t) ** 2).sum()
            )
        k = min(errors, key=errors.get)
        i_s, i_t = r_s @ student[k], r_t @ teacher[k]
        w_s = (alpha * (i_s + i_t) + i_s) / (1 + 2 * alpha)
        w_t = (alpha * (i_s + i_t) + i_t) / (1 + 2 * alpha)
        r_s = r_s - w_s[:, None] * student[k]
        r_t = r_t - w_t[:, None] * teacher[k]
        picks.append(k)
    return picks


def clustered(rng, n, dim, clusters=5, spread=0.3):
    centres = rng.normal(size=(clusters, dim))
    return centres[rng.integers(clusters, size=n)] + spread * rng.normal(size=(n, dim))


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0}, {"alpha": 1.5, "num": 4}, {"sigma": 0.3, "quantile": 0.7}])
def test_picks_equal_the_literal_rule(attempt, settings):
    rng = np.random.default_rng()
    expected = []
    while not expected:  # some draws have no instance that is dense among both
        n = int(rng.integers(30, 120))
        student = clustered(rng, n, 12)
        teacher = np.concatenate([student @ rng.normal(size=(12, 9)), clustered(rng, n, 7)], 1)
        expected = literal_select(student, teacher, **settings)
    names = {"num": "num_prototypes", "sigma": "density_sigma", "quantile": "density_quantile"}
    picks = select_prototypes(
        torch.from_numpy(student), torch.from_numpy(teacher), **{names.get(k, k): v for k, v in settings.items()}
    )
    assert picks.tolist() == expected
    assert len(set(picks.tolist())) == len(picks)


def test_picks_on_random_data_and_in_float32_input_equal_the_literal_rule():
    rng = np.random.default_rng()
    student, teacher = (rng.normal(size=(90, 6)).astype(np.float32) for _ in range(2))
    # random directions of many dimensions have no neighbours: a wide kernel makes densities that differ
    picks = select_prototypes(torch.from_numpy(student), torch.from_numpy(teacher), density_sigma=0.5)
    assert picks.tolist() == literal_select(student, teacher, sigma=0.5)


def test_density_in_chunks_equals_the_literal_one(monkeypatch):
    monkeypatch.setattr("distill.prototypes.select._CHUNK", 7)
    rows = normalized(clustered(np.random.default_rng(), 50, 5))
    got = dense_instances(torch.from_numpy(rows), 0.1, 0.4)
    assert got.tolist() == literal_candidates(rows, 0.1, 0.4).tolist()


def test_an_instance_is_never_picked_twice_though_it_may_be_the_best_again():
    rng = np.random.default_rng(0)
    student, teacher = clustered(rng, 60, 3), clustered(rng, 60, 3)
    assert len(set(literal_select(student, teacher, repeats=True))) < 10
    picks = select_prototypes(torch.from_numpy(student), torch.from_numpy(teacher))
    assert len(picks) == len(set(picks.tolist())) == 10


@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
def test_fewer_instances_than_prototypes_give_fewer(n):
    student, teacher = torch.randn(n, 4), torch.randn(n, 6)
    picks = select_prototypes(student, teacher)
    assert picks.dtype == torch.int64 and len(picks) < max(n, 1) and len(set(picks.tolist())) == len(picks)


def test_identical_instances_and_zero_vectors():
    same = torch.randn(1, 5).expand(30, 5)
    assert len(select_prototypes(same, same)) == 0  # none is denser than the others
    assert len(select_prototypes(torch.zeros(30, 5), torch.zeros(30, 5))) == 0
    some = torch.cat([torch.zeros(10, 5), torch.rand(30, 5) + 1])
    picks = select_prototypes(some, some)
    assert 0 < len(picks) <= 10 and (picks >= 10).all()


def test_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"as many rows, got \(3, 2\), \(4, 2\)"):
        select_prototypes(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="density_quantile is 1.0, expected a share"):
        select_prototypes(torch.zeros(3, 2), torch.zeros(3, 2), density_quantile=1.0)
    with pytest.raises(ValueError, match="not all finite"):
        select_prototypes(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
