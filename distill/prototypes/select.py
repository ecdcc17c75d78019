"""Prototype generation (PGM): Tang, Zhang, Cheng et al., ECCV 2022, arXiv 2210.09022, section 3.2."""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024  # rows of the matrix of cosines that are held at once


@torch.no_grad()
def select_prototypes(
    student: Tensor,
    teacher: Tensor,
    num_prototypes: int = 10,
    alpha: float = 10.0,
    density_sigma: float = 0.1,
    density_quantile: float = 0.4,
) -> Tensor:
    """Picks the instances that represent all others best, in the student's and the teacher's space at once.

    Rows are normalised. Candidates are the instances that are denser than the quantile in both spaces
    (:func:`dense_instances`). Then, greedily, with residuals r that start as the rows, candidate γ approximates each
    instance n by w_s γ_s and w_t γ_t, with i_s = <γ_s, r_s>, i_t = <γ_t, r_t>,
    w_s = (α (i_s + i_t) + i_s) / (1 + 2α) and w_t alike. Picked is the γ with the least
    Σ_n |w_s γ_s - r_s|² + |w_t γ_t - r_t|² + α (w_s - w_t)², its part is subtracted from all residuals, and so on.

    With these w the sum is Σ_n |r_s|² + |r_t|² - ((i_s + i_t)² + (i_s - i_t)² / (1 + 2α)) / 2, and the sums of i_s²,
    i_t² and i_s i_t over the instances are quadratic forms of γ in the residuals' second moments. So no matrix of
    candidates by instances is needed at all: O(N D²) time and O(N D) memory for a pick.

    Args:
        student: ``Tensor[N, Ds]``, instances of one class at one level.
        teacher: ``Tensor[N, Dt]``, the same instances.
        num_prototypes: how many to pick at most.
        alpha: how strongly the weights in both spaces are to agree.
        density_sigma: width of the kernel of the density, in 1 - cosine.
        density_quantile: share of the instances that are too sparse to be candidates, from 0 to below 1.

    Returns:
        ``LongTensor[P]``, P <= ``num_prototypes``: rows, in the order of the picks, no row twice. Computed in float64.
        Fewer than about four instances have no candidate, so no prototype.

    Raises:
        ValueError: the tensors are not two matrices with as many rows, or not finite; or the quantile is out of range.
    """
    if not 0 <= density_quantile < 1:
        raise ValueError(f"density_quantile is {density_quantile}, expected a share from 0 to below 1")
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(f"expected two matrices of as many rows, got {tuple(student.shape)}, {tuple(teacher.shape)}")
    if not (student.isfinite().all() and teacher.isfinite().all()):
        raise ValueError("the instances' features are not all finite: has the training diverged?")
    residuals = [F.normalize(side.double()) for side in (student, teacher)]
    candidates = dense_instances(residuals[0], density_sigma, density_quantile)
    candidates &= dense_instances(residuals[1], density_sigma, density_quantile)
    rows = candidates.nonzero()[:, 0]
    atoms = [side[rows] for side in residuals]
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    picks = []
    for _ in range(min(num_prototypes, len(rows))):
        r_s, r_t = residuals
        sum_ss, sum_tt, sum_st = (
            ((left @ (a.T @ b)) * right).sum(1)
            for left, a, b, right in (
                (atoms[0], r_s, r_s, atoms[0]),
                (atoms[1], r_t, r_t, atoms[1]),
                (atoms[0], r_s, r_t, atoms[1]),
            )
        )
        total, apart = sum_ss + sum_tt + 2 * sum_st, sum_ss + sum_tt - 2 * sum_st
        gain = total + apart / (1 + 2 * alpha)
        pick = int(gain.masked_fill(~free, -torch.inf).argmax())
        free[pick] = False
        picks.append(pick)
        i_s, i_t = (side @ atom[pick] for side, atom in zip(residuals, atoms))
        weights = [(alpha * (i_s + i_t) + own) / (1 + 2 * alpha) for own in (i_s, i_t)]
        residuals = [side - torch.outer(w, atom[pick]) for side, w, atom in zip(residuals, weights, atoms)]
    return rows[picks]


def dense_instances(rows: Tensor, sigma: float, quantile: float) -> Tensor:
    """Which instances lie in denser surroundings than a share of all.

    An instance's density is Σ_m exp(-((1 - cos(n, m)) / sigma)²) over all instances m.

    Args:
        rows: ``Tensor[N, D]`` of unit length.
        sigma: width of the kernel.
        quantile: from 0 to below 1.

    Returns:
        ``BoolTensor[N]``: density strictly above the one at rank int(N * quantile) of the ascending order.
    """
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool, device=rows.device)
    cosines = (chunk @ rows.T for chunk in rows.split(_CHUNK))
    density = torch.cat([x.sub_(1).div_(sigma).square_().neg_().exp_().sum(1) for x in cosines])
    return density > density.sort().values[int(len(rows) * quantile)]
