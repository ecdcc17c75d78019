"""Fusion of a pyramid with that of the same image at half size: Qi, Kuen, Gu et al., CVPR 2021, arXiv 2109.04875."""

import torch
from torch import Tensor, nn


class CrossFeatureFusion(nn.Module):
    """Crossing feature-level fusion: a weighted sum of two aligned maps, whose weights depend on both.

    With the global averages of both maps, concatenated, as x: (w_h, w_l) = softmax(B relu(A x)), and the fused map is
    w_h high + w_l low. A has 2 C / reduction rows, B two; neither has a bias. One module serves all levels. arXiv
    2109.04875, section 3.2.

    Args:
        channels: C, channels of each map.
        reduction: how much smaller the hidden layer is.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, 2 * channels // reduction)
        self.squeeze = nn.Linear(2 * channels, hidden, bias=False)
        self.weigh = nn.Linear(hidden, 2, bias=False)

    def weights(self, high: Tensor, low: Tensor) -> Tensor:
        """The weights of both maps.

        Args:
            high: ``Tensor[N, C, H, W]``.
            low: ``Tensor[N, C, H, W]``.

        Returns:
            ``Tensor[N, 2]``, positive, summing to 1.
        """
        pooled = torch.cat([high.mean((2, 3)), low.mean((2, 3))], dim=1)
        return self.weigh(self.squeeze(pooled).relu()).softmax(dim=1)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """
        Args:
            high: ``Tensor[N, C, H, W]``, a level of the image at full size.
            low: ``Tensor[N, C, H, W]``, the aligned level of the image at half size.

        Returns:
            ``Tensor[N, C, H, W]``, the fused map.

        Raises:
            ValueError: the shapes differ.
        """
        if high.shape != low.shape:
            raise ValueError(f"expected two aligned maps of one shape, got {tuple(high.shape)} and {tuple(low.shape)}")
        weights = self.weights(high, low)[:, :, None, None, None]
        return weights[:, 0] * high + weights[:, 1] * low
