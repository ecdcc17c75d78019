"""The mean of structural similarity with a backward pass of its own, which keeps one map for it instead of a dozen."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# How many values are worked on at once: on the CPU what fits into its cache, on a GPU what keeps it busy
_CHUNK = {"cpu": 2**20}
_CHUNK_ELSEWHERE = 2**24

Scale = tuple[Tensor, Tensor]


def mean_similarity(
    x: Tensor, y: Tensor, x_scale: Scale, y_scale: Scale, window: Tensor, c1: Tensor, c2: Tensor, own_extent: bool
) -> Tensor:
    """Mean over channels and windows of the structural similarity of two stacks of maps, each shifted and scaled first.

    With u = (x - low) / spread for both sides, it is the mean of :func:`distill.losses.structural_similarity` of them.
    The gradient is computed beside the value, a few channels at a time, so that neither needs the whole stack's means,
    variances and covariances at once.

    Args:
        x: ``Tensor[N, C, H, W]``, with a gradient.
        y: a tensor of the same shape, without.
        x_scale: low and spread of x, ``Tensor[1, 1, 1, 1]`` or ``Tensor[1, C, 1, 1]``.
        y_scale: the same of y.
        window: ``Tensor[w]``, the weights of the window's rows and columns.
        c1: keeps the luminance's quotient stable, shaped as the scales.
        c2: keeps the other quotient stable, shaped alike.
        own_extent: whether x's scale is its own minimum and range over the whole stack. The gradient flows through
            both of them then; otherwise scales are constants to it.

    Returns:
        ``Tensor[]``, a scalar.
    """
    return _MeanSimilarity.apply(x, y, *x_scale, *y_scale, window, c1, c2, own_extent)


class _MeanSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *settings: Any) -> Tensor:
        *scales, window, c1, c2, own_extent = settings
        num_maps, (height, width) = x.shape[0] * x.shape[1], x.shape[2:]
        # a row for each map, whatever the scales are shared by
        rows = [t.expand(*x.shape[:2], 1, 1).reshape(num_maps, 1, 1) for t in (*scales, c1, c2)]
        given, target = (t.reshape(num_maps, height, width) for t in (x, y))
        gradient = torch.empty(given.shape, dtype=given.dtype, device=given.device) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // (height * width))
        num_windows = num_maps * (height - len(window) + 1) * (width - len(window) + 1)
        total, by_low, by_spread = x.new_zeros(3)
        for first in range(0, num_maps, step):
            here = slice(first, first + step)
            low_x, spread_x, low_y, spread_y, *stable = (t[here] for t in rows)
            u, v = (given[here] - low_x).div_(spread_x), (target[here] - low_y).div_(spread_y)
            value, slope = _similarity(u, v, window, *stable, with_gradient=gradient is not None)
            total += value
            if slope is not None:
                torch.div(slope, spread_x * num_windows, out=gradient[here])
                if own_extent:
                    by_low -= gradient[here].sum()
                    by_spread -= gradient[here].mul(u).sum()
        if gradient is not None:
            if own_extent:  # spread = high - low; both are single values of x
                flat, own = gradient.view(-1), given.reshape(-1)
                spreads = (own.amax() - own.amin() == scales[1].view(())).to(x.dtype)  # a flat map has a constant one
                for index, slope in ((own.argmin(), by_low - by_spread * spreads), (own.argmax(), by_spread * spreads)):
                    flat.index_add_(0, index.view(1), slope.view(1))
            ctx.save_for_backward(gradient.view_as(x))
        return total / num_windows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return (outer * ctx.saved_tensors[0], *[None] * 9)


def _similarity(
    u: Tensor, v: Tensor, window: Tensor, c1: Tensor, c2: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum of the similarities of maps ``[M, H, W]``, and its gradient at the first."""
    shift_u, shift_v = (t.mean((1, 2), keepdim=True) for t in (u, v))
    u, v = u - shift_u, v - shift_v  # the variances' rounding errors stay small
    mean_u, mean_v = filter_maps(u, window), filter_maps(v, window)
    raw = filter_maps(u.square().addcmul_(v, v), window).addcmul_(mean_u, mean_u, value=-1)
    raw = raw.addcmul_(mean_v, mean_v, value=-1)
    below = c2 + raw.clamp(min=0)
    above = filter_maps(u * v, window).addcmul_(mean_u, mean_v, value=-1).mul_(2).add_(c2)
    level_u, level_v = mean_u + shift_u, mean_v + shift_v
    top = (level_u * level_v).mul_(2).add_(c1)
    bottom = level_u.square().addcmul_(level_v, level_v).add_(c1)
    luminance = top.div_(bottom)
    rest = above.div_(below)
    similarity = luminance * rest
    total = similarity.sum()
    if not with_gradient:
        return total, None
    by_covariance = luminance.div(below).mul_(2)
    by_variance = similarity.div_(below).neg_().mul_(raw >= 0)
    # the luminance's slope, and what variance and covariance owe to the means
    by_mean = level_v.addcmul_(level_u, luminance, value=-1).mul_(rest).div_(bottom).mul_(2)
    by_mean.addcmul_(mean_v, by_covariance, value=-1).addcmul_(mean_u, by_variance, value=-2)
    slope = filter_maps(by_mean, window, transposed=True)
    slope.addcmul_(u, filter_maps(by_variance, window, transposed=True), value=2)
    return total, slope.addcmul_(v, filter_maps(by_covariance, window, transposed=True))


def filter_maps(maps: Tensor, window: Tensor, transposed: bool = False) -> Tensor:
    """Weighted means of maps under a window that slides over rows, then over columns.

    Args:
        maps: ``Tensor[M, H, W]``.
        window: ``Tensor[w]``, symmetric.
        transposed: the transposed operator, from ``[M, H - w + 1, W - w + 1]`` back to ``[M, H, W]``.

    Returns:
        ``Tensor[M, H - w + 1, W - w + 1]``.
    """
    size, padding = len(window), len(window) - 1 if transposed else 0
    if maps.device.type != "cpu":
        kernel = window.expand(len(maps), 1, 1, size)
        rows = F.conv2d(maps[None], kernel, padding=(0, padding), groups=len(maps))
        return F.conv2d(rows, kernel.transpose(2, 3), padding=(padding, 0), groups=len(maps))[0]
    # sums of shifted maps: torch's convolution of single channels takes twice as long on the CPU
    if transposed:
        maps = F.pad(maps, (padding, padding, padding, padding))
    for dim in (2, 1):
        length, shifted = maps.shape[dim] - size + 1, maps
        maps = shifted.narrow(dim, 0, length) * window[0]
        for offset in range(1, size):
            maps = maps.add_(shifted.narrow(dim, offset, length), alpha=float(window[offset]))
    return maps
