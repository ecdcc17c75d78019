"""The review module against a literal transcription in numpy."""

import numpy as np
import pytest
import torch

from distill.distillers.review import AttentionBasedFusion, ReviewModule


def conv(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Stride 1, zero padding that keeps the size, no bias."""
    size = weight.shape[2]
    pad = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    for i in range(size):
        for j in range(size):
            window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            out += np.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
    return out


def batch_norm(x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Batch norm in training, with its initial affine weights (1 and 0)."""
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + eps)


def nearest(x: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * x.shape[2] // height
    columns = np.arange(width) * x.shape[3] // width
    return x[:, :, rows][:, :, :, columns]


def literal_review(module: ReviewModule, features: list[np.ndarray]) -> list[np.ndarray]:
    outputs, coarser = [], None
    for fusion, level in reversed(list(zip(module.fusions, features))):
        weights = {name: p.detach().numpy() for name, p in fusion.named_parameters()}
        x = batch_norm(conv(level, weights["reduce.weight"]))
        if coarser is not None:
            y = nearest(coarser, *x.shape[2:])
            scores = conv(np.concatenate([x, y], 1), weights["attention.weight"])
            z = 1 / (1 + np.exp(-scores - weights["attention.bias"][:, None, None]))
            x = x * z[:, 0:1] + y * z[:, 1:2]
        outputs.insert(0, batch_norm(conv(x, weights["project.weight"])))
        coarser = x
    return outputs


def test_equals_the_literal_formula():
    rng = np.random.default_rng()
    in_channels, out_channels = [6, 5, 4], [7, 8, 9]
    module = ReviewModule(in_channels, out_channels, 3).double()
    shapes = [(13, 18), (7, 9), (3, 5)]  # neither square nor halved exactly
    features = [rng.normal(size=(2, c, *shape)) for c, shape in zip(in_channels, shapes)]
    expected = literal_review(module, features)
    got = module([torch.from_numpy(x) for x in features])
    assert [tuple(x.shape) for x in got] == [(2, c, *shape) for c, shape in zip(out_channels, shapes)]
    for mine, theirs in zip(got, expected):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=1e-9, atol=1e-9)


def test_every_weight_gets_a_gradient():
    module = ReviewModule([4, 4, 4], [6, 6, 6], 5)
    features = [torch.randn(2, 4, size, size) for size in (16, 8, 4)]
    sum((out * torch.randn_like(out)).sum() for out in module(features)).backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not without


def test_convolutions_start_as_published():
    fusion = AttentionBasedFusion(64, 256, 128, fuse=True)
    for conv, gain in ((fusion.reduce, 1), (fusion.project, 1), (fusion.attention, 5)):  # torch's own start has a² = 5
        fan_in = conv.weight[0].numel()
        bound = (6 / ((1 + gain) * fan_in)) ** 0.5
        assert bound * 0.95 < conv.weight.abs().max().item() <= bound * (1 + 1e-6)
    assert fusion.reduce.bias is None and fusion.project.bias is None
    assert 0 < fusion.attention.bias.abs().max().item() <= (2 * 256) ** -0.5


@pytest.mark.parametrize("norm, expected", [("BN", torch.nn.BatchNorm2d), ("GN", torch.nn.GroupNorm), ("", None)])
def test_norm_is_configurable(norm, expected):
    norms = [m for m in ReviewModule([32], [32], 32, norm=norm).modules() if "Norm" in type(m).__name__]
    assert [type(m) for m in norms] == ([expected] * 2 if expected else [])
