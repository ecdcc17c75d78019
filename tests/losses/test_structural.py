"""Structural similarity against scikit-image and against a literal transcription of its definition."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity as skimage_similarity

from distill.losses import mean_similarity, structural_loss, structural_similarity, structural_similarity_terms
from distill.losses.structural import SCALES


def literal_terms(x, y, size=11, sigma=1.5, data_range=1.0, k1=0.01, k2=0.03):
    """Luminance, contrast and structure of two images, window by window, in float64."""
    size = min(size, *x.shape)
    size -= 1 - size % 2
    r = size // 2
    grid = np.exp(-(np.arange(-r, r + 1) ** 2) / (2 * sigma**2))
    w = np.outer(grid, grid)
    w /= w.sum()
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    out = np.empty((3, x.shape[0] - size + 1, x.shape[1] - size + 1))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            a, b = x[i : i + size, j : j + size], y[i : i + size, j : j + size]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
            cov = (w * (a - ma) * (b - mb)).sum()
            out[0, i, j] = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
            out[1, i, j] = (2 * np.sqrt(va * vb) + c2) / (va + vb + c2)
            out[2, i, j] = (cov + c2 / 2) / (np.sqrt(va * vb) + c2 / 2)
    return out


def random_maps(n=2, c=3, h=17, w=23):
    """Maps of which one resembles the other."""
    rng = np.random.default_rng()
    x = rng.random((n, c, h, w))
    return x, 0.6 * x + 0.4 * rng.random((n, c, h, w))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("data_range", [1.0, 7.5])
def test_equals_scikit_image_in_the_interior(dtype, data_range):
    x, y = (a.astype(dtype) for a in random_maps(h=31, w=40))
    ours = structural_similarity(torch.from_numpy(x), torch.from_numpy(y), data_range=data_range).numpy()
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            _, theirs = skimage_similarity(
                x[n, c].astype(np.float64),
                y[n, c].astype(np.float64),
                data_range=data_range,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                full=True,
            )
            np.testing.assert_allclose(ours[n, c], theirs[5:-5, 5:-5], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "size, sigma, shape", [(11, 1.5, (12, 17)), (7, 0.8, (9, 8)), (5, 3.0, (5, 5)), (1, 1.5, (4, 3))]
)
def test_terms_and_their_product_equal_the_literal_formula(size, sigma, shape):
    x, y = random_maps(2, 3, *shape)
    x -= 0.5  # of either sign
    expected = np.array(
        [[literal_terms(x[n, c], y[n, c], size, sigma, 2.0, 0.02, 0.05) for c in range(3)] for n in range(2)]
    )
    args = torch.from_numpy(x), torch.from_numpy(y), size, sigma, 2.0, 0.02, 0.05
    terms = structural_similarity_terms(*args)
    for index, term in enumerate(terms):
        np.testing.assert_allclose(term.numpy(), expected[:, :, index], rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(structural_similarity(*args).numpy(), expected.prod(2), rtol=1e-7, atol=1e-8)
    powers = (2.0, 0.5, 3.0)  # the luminance crosses zero, where a root has no derivative
    got = structural_similarity(*args, exponents=powers).numpy()
    literal = np.prod([np.sign(expected[:, :, i]) * np.abs(expected[:, :, i]) ** powers[i] for i in range(3)], axis=0)
    np.testing.assert_allclose(got, literal, rtol=1e-6, atol=1e-7)
    without = structural_similarity(*args, exponents=(0.0, 1.0, 0.0))
    np.testing.assert_allclose(without.numpy(), expected[:, :, 1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape, window", [((8, 30), 7), ((2, 5), 1), ((1, 1), 1), ((3, 2), 1), ((9, 5), 5)])
def test_a_small_map_shrinks_the_window_to_the_largest_odd_size(shape, window):
    x, y = random_maps(1, 2, *shape)
    ours = structural_similarity(torch.from_numpy(x), torch.from_numpy(y))
    assert ours.shape == (1, 2, shape[0] - window + 1, shape[1] - window + 1)
    literal = np.array([[literal_terms(x[0, c], y[0, c], window).prod(0) for c in range(2)]])
    np.testing.assert_allclose(ours.numpy(), literal, rtol=1e-9)
    if window == 1:
        np.testing.assert_allclose(ours.numpy(), (2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4), rtol=1e-9)


@pytest.mark.parametrize("exponents", [(1.0, 1.0, 1.0), (1.0, 1.0, 1.001)])
def test_an_offset_many_times_the_contrast_costs_no_accuracy_in_float32(exponents):
    x, y = (torch.from_numpy(a) for a in random_maps(1, 2, 16, 16))
    x = 0.1 * x + 70
    exact = structural_similarity(x, y, exponents=exponents)
    got = structural_similarity(x.float(), y.float(), exponents=exponents)
    torch.testing.assert_close(got.double(), exact, atol=1e-3, rtol=0)


def test_data_range_may_differ_by_channel():
    x, y = (torch.from_numpy(a) for a in random_maps())
    ranges = [1.0, 2.0, 5.0]
    together = structural_similarity(x, y, data_range=torch.tensor(ranges).view(1, 3, 1, 1))
    for c, data_range in enumerate(ranges):
        alone = structural_similarity(x[:, c : c + 1], y[:, c : c + 1], data_range=data_range)
        torch.testing.assert_close(together[:, c : c + 1], alone)


def test_is_one_for_equal_maps_and_lower_for_others():
    x = torch.rand(1, 2, 20, 20)
    torch.testing.assert_close(structural_similarity(x, x), torch.ones(1, 2, 10, 10))
    assert structural_similarity(x, 1 - x).max() < 0.5


def test_gradient_is_that_of_finite_differences():
    x, y = (torch.from_numpy(a).requires_grad_() for a in random_maps(1, 2, 6, 7))
    y = y.detach()
    assert torch.autograd.gradcheck(lambda x: structural_similarity(x, y, 5), x)
    assert torch.autograd.gradcheck(lambda x: structural_similarity(x, y, 5, exponents=(1.0, 2.0, 0.5)), x)


@pytest.mark.parametrize("exponents", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5)])
def test_flat_maps_have_a_finite_gradient(exponents):
    x = torch.zeros(1, 2, 16, 16, requires_grad=True)
    for y in (torch.zeros(1, 2, 16, 16), torch.full((1, 2, 16, 16), 3.0)):
        for scale in SCALES:
            loss = structural_loss([x], [y], scale, exponents=exponents)
            (gradient,) = torch.autograd.grad(loss, x)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all(), scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_float32_for_half_precision_features_and_under_autocast(dtype):
    x, y = (torch.from_numpy(a).to(dtype) for a in random_maps())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = structural_similarity(x, y)
        loss = structural_loss([x], [y])
    assert similarity.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(similarity.double(), structural_similarity(x.double(), y.double()), atol=1e-5, rtol=0)


def literal_loss(student, teacher, scale):
    losses = []
    for x, y in zip(student, teacher):
        data_range = np.ones(x.shape[1])
        if scale == "own_minmax":
            x, y = ((a - a.min()) / (a.max() - a.min()) for a in (x, y))
        elif scale == "minmax":
            x, y = ((a - y.min()) / (y.max() - y.min()) for a in (x, y))
        elif scale == "none":
            data_range *= y.max() - y.min()
        else:
            mean, std = y.mean((0, 2, 3), keepdims=True), y.std((0, 2, 3), keepdims=True)
            x, y = (x - mean) / std, (y - mean) / std
            data_range = y.max((0, 2, 3)) - y.min((0, 2, 3))
        maps = [
            literal_terms(x[n, c], y[n, c], data_range=data_range[c]).prod(0)
            for n in range(x.shape[0])
            for c in range(x.shape[1])
        ]
        losses.append((1 - np.mean(maps)) / 2)
    return np.sum(losses)


@pytest.mark.parametrize("scale", SCALES)
def test_loss_equals_the_literal_formula(scale):
    rng = np.random.default_rng()
    pairs = [[8 * a - 3 + rng.normal() for a in random_maps(2, 3, *shape)] for shape in ((14, 13), (6, 7), (1, 2))]
    student, teacher = zip(*pairs)
    loss = structural_loss([torch.from_numpy(x) for x in student], [torch.from_numpy(x) for x in teacher], scale)
    assert loss.item() == pytest.approx(literal_loss(student, teacher, scale), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7 * 300, 2**24])
@pytest.mark.parametrize("scale", SCALES)
def test_the_losss_own_backward_pass_is_that_of_its_formula(scale, chunk, monkeypatch):
    monkeypatch.setitem(mean_similarity._CHUNK, "cpu", chunk)  # all at once, or map by map
    rng = np.random.default_rng()
    pairs = [
        [torch.from_numpy(4 * a - rng.normal()) for a in random_maps(2, 3, *s)] for s in ((14, 20), (6, 7), (1, 3))
    ]
    student, teacher = zip(*pairs)
    student = [x.requires_grad_() for x in student]
    others = [y.clone().requires_grad_() for y in teacher]  # which the function refuses: autograd follows the formula
    loss, expected = structural_loss(student, teacher, scale), structural_loss(student, others, scale)
    assert "MeanSimilarity" in _names(loss.grad_fn) and "MeanSimilarity" not in _names(expected.grad_fn)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    got, wanted = (torch.autograd.grad(3 * x, student, retain_graph=True) for x in (loss, expected))
    for ours, theirs in zip(got, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    again = torch.autograd.grad(loss, student)  # the graph was kept
    torch.testing.assert_close(again[0] * 3, got[0])


@pytest.mark.parametrize("scale", SCALES)
def test_maps_in_another_order_of_memory_have_the_same_loss(scale):
    x, y = (torch.from_numpy(8 * a) for a in random_maps(1, 3, 14, 20))
    results = []
    for order in (torch.contiguous_format, torch.channels_last):  # which Detectron2's FPN has on an MViT
        own = x.clone(memory_format=order).requires_grad_()
        loss = structural_loss([own], [y.clone(memory_format=order)], scale)
        results.append((loss, *torch.autograd.grad(loss, own)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def _names(node):
    """The names of all nodes of a graph."""
    if node is None:
        return ""
    return node.name() + "".join(_names(other) for other, _ in node.next_functions)


def test_the_loss_keeps_one_map_for_its_backward_pass():
    x, y = (torch.from_numpy(a).float() for a in random_maps(2, 4, 32, 40))
    x.requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        structural_loss([x], [y], "own_minmax")
    kept.pop(x.untyped_storage().data_ptr(), None)  # which is there in any case
    assert sum(kept.values()) < 1.2 * x.nbytes


def test_refuses_what_it_cannot_compare():
    x = torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"one shape .*\(1, 2, 8, 8\) and \(1, 2, 4, 8\)"):
        structural_similarity(x, torch.zeros(1, 2, 4, 8))
    with pytest.raises(ValueError, match="window_size is 4, expected an odd"):
        structural_similarity(x, x, window_size=4)
    with pytest.raises(ValueError, match="scale is 'max'"):
        structural_loss([x], [x], "max")
    with pytest.raises(ValueError, match="at least one level"):
        structural_loss([], [])
