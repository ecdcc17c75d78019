"""Structural similarity (Wang et al., TIP 2004) on features (de Rijk et al., NeurIPS 2022, arXiv 2211.13133)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .mean_similarity import filter_maps, mean_similarity
from .precision import in_float32
from .pyramid import check_pyramids

SCALES = ("own_minmax", "minmax", "standard", "none")


@in_float32
def structural_similarity(
    x: Tensor,
    y: Tensor,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float | Tensor = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    exponents: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Structural similarity (SSIM) of two stacks of maps, window by window, every channel as an image of its own.

    With means, variances and covariance under a normalised Gaussian window, C1 = (k1 L)² and C2 = (k2 L)²,
    SSIM = (2 μx μy + C1)(2 σxy + C2) / ((μx² + μy² + C1)(σx² + σy² + C2)). Wang, Bovik, Sheikh, Simoncelli, *Image
    Quality Assessment*, IEEE TIP 2004, equation 13; arXiv 2211.13133, section 3.

    Args:
        x: ``Tensor[N, C, H, W]``.
        y: a tensor of the same shape.
        window_size: side of the square window in cells, odd. On a smaller map it shrinks to the largest odd size that
            fits; a window of one cell compares luminance alone.
        sigma: standard deviation of the Gaussian, in cells.
        data_range: L, the range of the values; a number, or a tensor that broadcasts to ``[N, C, 1, 1]``.
        k1: keeps the luminance's quotient stable.
        k2: keeps the other quotient stable.
        exponents: α, β, γ of luminance, contrast and structure, see :func:`structural_similarity_terms`. A term t with
            another exponent than 1 is sign(t) |t|^γ, so that opposite structure never counts as alike.

    Returns:
        ``Tensor[N, C, H - w + 1, W - w + 1]``, w the window's size: the similarity at each window that lies inside the
        map, from -1 to 1 where x and y are not negative.

    Raises:
        ValueError: the shapes differ, are not 4-dimensional or empty, or the window's size is not odd.
    """
    if tuple(exponents) != (1.0, 1.0, 1.0):
        terms = structural_similarity_terms(x, y, window_size, sigma, data_range, k1, k2)
        powers = [_signed_power(term, exponent) for term, exponent in zip(terms, exponents, strict=True) if exponent]
        return torch.stack(powers).prod(0) if powers else torch.ones_like(terms[0])
    window = _gaussian_window(x, y, window_size, sigma)
    c1, c2 = _constants(x, data_range, k1, k2)
    (x, shift_x), (y, shift_y) = _centred(x), _centred(y)
    # only the sum of the two variances is needed: four maps to filter instead of five
    mean_x, mean_y, mean_squares, mean_xy = _filter([x, y, x.square() + y.square(), x * y], window)
    variances = (mean_squares - mean_x.square() - mean_y.square()).clamp(min=0)
    covariance = mean_xy - mean_x * mean_y
    return _luminance(mean_x + shift_x, mean_y + shift_y, c1) * (2 * covariance + c2) / (variances + c2)


@in_float32
def structural_similarity_terms(
    x: Tensor,
    y: Tensor,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float | Tensor = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms whose product structural similarity is.

    Luminance (2 μx μy + C1) / (μx² + μy² + C1), contrast (2 σx σy + C2) / (σx² + σy² + C2), structure
    (σxy + C2/2) / (σx σy + C2/2). Wang et al., IEEE TIP 2004, equations 6, 9 and 10.

    Args:
        x, y, window_size, sigma, data_range, k1, k2: see :func:`structural_similarity`.

    Returns:
        Luminance, contrast and structure, each ``Tensor[N, C, H - w + 1, W - w + 1]``.

    Raises:
        ValueError: see :func:`structural_similarity`.
    """
    window = _gaussian_window(x, y, window_size, sigma)
    c1, c2 = _constants(x, data_range, k1, k2)
    (x, shift_x), (y, shift_y) = _centred(x), _centred(y)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _filter([x, y, x.square(), y.square(), x * y], window)
    luminance = _luminance(mean_x + shift_x, mean_y + shift_y, c1)
    # the root has no gradient at zero, where rounding puts flat windows
    tiny = torch.finfo(mean_x.dtype).tiny ** 0.5
    var_x, var_y = ((m - mean.square()).clamp(min=tiny) for m, mean in ((mean_xx, mean_x), (mean_yy, mean_y)))
    deviations = (var_x * var_y).sqrt()
    contrast = (2 * deviations + c2) / (var_x + var_y + c2)
    structure = (mean_xy - mean_x * mean_y + c2 / 2) / (deviations + c2 / 2)
    return luminance, contrast, structure


@in_float32
def structural_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scale: str = "none",
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    exponents: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """(1 - SSIM) / 2, averaged over channels and windows of a level, summed over the levels.

    Args:
        student: a ``Tensor[N, C, H, W]`` for each level.
        teacher: tensors of the same shapes.
        scale: how both sides of a level come to one scale. "own_minmax": the minimum and maximum of each side over the
            batch become 0 and 1, and L is 1. The others go by the teacher's statistics: "minmax" (its minimum and
            maximum over the batch become 0 and 1, L is 1), "standard" (mean and deviation of each channel become 0 and
            1, L is the channel's range), or "none" (L is the range of the level over the batch).
        window_size, sigma, k1, k2, exponents: see :func:`structural_similarity`.

    Returns:
        ``Tensor[]``, a scalar.

    Raises:
        ValueError: the shapes differ, there is no level, ``scale`` is unknown, or see :func:`structural_similarity`.
    """
    check_pyramids(student, teacher)
    losses = []
    for x, y in zip(student, teacher):
        scales, data_range = _common_scale(x, y, scale)
        if tuple(exponents) == (1.0, 1.0, 1.0) and not y.requires_grad:
            window = _gaussian_window(x, y, window_size, sigma)
            constants = _constants(x, data_range.expand_as(scales[0][0]), k1, k2)
            similarity = mean_similarity(x, y, *scales, window, *constants, own_extent=scale == "own_minmax")
        else:
            x, y = ((side - low) / spread for side, (low, spread) in zip((x, y), scales))
            similarity = structural_similarity(x, y, window_size, sigma, data_range, k1, k2, exponents).mean()
        losses.append((1 - similarity) / 2)
    return torch.stack(losses).sum()


def _common_scale(
    x: Tensor, y: Tensor, scale: str
) -> tuple[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor]:
    """What each map is to be shifted and divided by, ``Tensor[1, 1, 1, 1]`` or ``Tensor[1, C, 1, 1]``, and the range of
    the values then. It is that of the second map, unless each has its own."""
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    if scale == "standard":
        mean, low, high = (f(y, (0, 2, 3), keepdim=True) for f in (torch.mean, torch.amin, torch.amax))
        deviation = _at_least_tiny((y - mean).square().mean((0, 2, 3), keepdim=True).sqrt(), mean)
        own = mean, deviation
        return (own, own), _at_least_tiny(high - low, mean) / deviation
    one = y.new_ones(1, 1, 1, 1)
    if scale == "own_minmax":
        return (_extent(x), _extent(y)), one
    own = _extent(y)
    return ((own, own), one) if scale == "minmax" else (((torch.zeros_like(one), one),) * 2, own[1])


def _extent(x: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum of a map over the batch, and how far its maximum is from it."""
    low, high = (value.view(1, 1, 1, 1) for value in x.aminmax())
    return low, _at_least_tiny(high - low, high)


def _at_least_tiny(spread: Tensor, values: Tensor) -> Tensor:
    """Keeps a division by the spread of a constant map finite."""
    return spread.maximum(1e-6 * values.abs()).clamp(min=1e-6)


def _gaussian_window(x: Tensor, y: Tensor, window_size: int, sigma: float) -> Tensor:
    if x.dim() != 4 or x.shape != y.shape or 0 in x.shape:
        raise ValueError(f"expected two maps of one shape [N, C, H, W], got {tuple(x.shape)} and {tuple(y.shape)}")
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size is {window_size}, expected an odd number of cells, such as 11")
    fitting = min(window_size, *x.shape[2:])
    fitting -= 1 - fitting % 2
    offsets = torch.arange(fitting, dtype=x.dtype, device=x.device) - fitting // 2
    window = torch.exp(-(offsets / sigma).square() / 2)
    return window / window.sum()


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """A map minus its mean, and the mean. Variances do not change by it, and their rounding errors stay small. The mean
    is a constant to the gradient, which it does not change either."""
    mean = x.detach().mean((2, 3), keepdim=True)
    return x - mean, mean


def _luminance(mean_x: Tensor, mean_y: Tensor, c1: float | Tensor) -> Tensor:
    return (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)


def _filter(maps: Sequence[Tensor], window: Tensor) -> tuple[Tensor, ...]:
    """Weighted means of each map under the window."""
    # one by one: stacking them would copy them all
    return tuple(filter_maps(x.flatten(0, 1), window).unflatten(0, x.shape[:2]) for x in maps)


def _constants(x: Tensor, data_range: float | Tensor, k1: float, k2: float) -> tuple[float | Tensor, float | Tensor]:
    if isinstance(data_range, Tensor):
        data_range = data_range.to(x)
    return (k1 * data_range) ** 2, (k2 * data_range) ** 2


def _signed_power(term: Tensor, exponent: float) -> Tensor:
    if exponent == 1:
        return term
    return term.sign() * term.abs().clamp(min=1e-6) ** exponent
