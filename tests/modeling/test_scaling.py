"""Half-size images, their annotations, and which level lies on which."""

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeTransform
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes

from distill.errors import DistillError
from distill.modeling.scaling import Scaling, downsample


@pytest.mark.parametrize("factor", [2, 4])
def test_nearest_takes_the_first_pixel_of_each_cell(factor):
    image = torch.randint(256, (3, 21, 14), dtype=torch.uint8)
    small = downsample(image, factor, "nearest")
    rows, columns = -(-21 // factor), -(-14 // factor)
    assert small.shape == (3, rows, columns)
    for y in range(rows):
        for x in range(columns):
            assert torch.equal(small[:, y, x], image[:, y * factor, x * factor])


@pytest.mark.parametrize("size", [(40, 64), (38, 50)])
def test_bilinear_is_detectron2s_resize(size):
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    resized = ResizeTransform(*size, size[0] // 2, size[1] // 2).apply_image(image.permute(1, 2, 0).numpy())
    small = downsample(image, 2)
    np.testing.assert_allclose(small.permute(1, 2, 0).numpy(), resized, atol=1.01)  # it rounds twice to whole numbers
    batch = downsample(image.expand(2, -1, -1, -1), 2)
    torch.testing.assert_close(batch[1], small)


def test_odd_sizes_keep_the_scale_by_repeating_the_last_pixels():
    image = torch.rand(1, 7, 9)
    even = torch.cat([image, image[:, -1:]], 1)
    even = torch.cat([even, even[:, :, -1:]], 2)
    torch.testing.assert_close(downsample(image, 2), downsample(even, 2))
    assert downsample(image, 2).shape == (1, 4, 5)


def test_annotations_of_all_kinds_shrink_with_the_image():
    instances = Instances((40, 31))
    instances.gt_boxes = Boxes(torch.tensor([[2.0, 4.0, 30.0, 38.0]]))
    instances.gt_classes = torch.tensor([7])
    instances.gt_masks = PolygonMasks([[np.array([2.0, 4.0, 30.0, 4.0, 30.0, 38.0])]])
    instances.gt_keypoints = Keypoints(torch.tensor([[[6.0, 8.0, 2.0]]]))
    instances.gt_rotated = RotatedBoxes(torch.tensor([[16.0, 12.0, 8.0, 4.0, 0.0]]))
    mask = torch.zeros(1, 40, 31, dtype=torch.bool)
    mask[:, 10:20, 6:16] = True
    instances.gt_bits = BitMasks(mask)
    record = {"image": torch.zeros(3, 40, 31), "instances": instances, "height": 80, "width": 62, "file_name": "x"}
    record["proposals"] = Instances((40, 31), proposal_boxes=Boxes(torch.tensor([[4.0, 6.0, 20.0, 30.0]])))

    (scaled,) = Scaling(0.5).batch([record])
    assert scaled["image"].shape == (3, 20, 16)
    assert (scaled["height"], scaled["width"], scaled["file_name"]) == (80, 62, "x")
    assert scaled["proposals"].proposal_boxes.tensor.tolist() == [[2.0, 3.0, 10.0, 15.0]]
    small = scaled["instances"]
    assert small.image_size == (20, 16)
    assert small.gt_boxes.tensor.tolist() == [[1.0, 2.0, 15.0, 19.0]]
    assert small.gt_classes.tolist() == [7]
    assert small.gt_masks.polygons[0][0].tolist() == [1.0, 2.0, 15.0, 2.0, 15.0, 19.0]
    assert small.gt_keypoints.tensor.tolist() == [[[3.0, 4.0, 2.0]]]
    assert small.gt_rotated.tensor.tolist() == [[8.0, 6.0, 4.0, 2.0, 0.0]]
    assert small.gt_bits.tensor.shape == (1, 20, 16) and small.gt_bits.tensor[0, 5:10, 3:8].all()
    assert small.gt_bits.tensor.sum() == 25
    # what came in is as it was
    assert instances.gt_boxes.tensor.tolist() == [[2.0, 4.0, 30.0, 38.0]] and record["image"].shape == (3, 40, 31)
    assert instances.gt_keypoints.tensor.tolist() == [[[6.0, 8.0, 2.0]]]
    assert Scaling().batch([record])[0] is record


@pytest.mark.parametrize("scale", [0.3, 0.75, 0.0, -0.5, 2.0])
def test_only_powers_of_a_half_shift_by_whole_levels(scale):
    with pytest.raises(DistillError, match=f"INPUT_SCALE is {scale}: expected 1.0, 0.5, 0.25"):
        Scaling(scale)


def test_unknown_downsampling_is_named():
    with pytest.raises(DistillError, match="DOWNSAMPLING is 'area': expected one of bilinear, nearest"):
        Scaling(0.5, "area")
    with pytest.raises(DistillError, match="DOWNSAMPLING is 'area'"):
        downsample(torch.zeros(1, 4, 4), 2, "area")


def pyramid(first, last, channels=8):
    return {f"p{level}": ShapeSpec(channels=channels, stride=2**level) for level in range(first, last + 1)}


@pytest.mark.parametrize("levels_shifted", [0, 1, 2])
def test_a_scale_of_two_to_the_minus_k_shifts_by_k_levels(levels_shifted):
    student, teacher = pyramid(3 - levels_shifted, 8, 4), pyramid(3, 7)
    names = Scaling(0.5**levels_shifted).levels(student, teacher)
    assert [(own, names[own]) for own in names if names[own] in teacher] == [
        (f"p{level - levels_shifted}", f"p{level}") for level in range(3, 8)
    ]
    shape = Scaling(0.5**levels_shifted).shape(student, teacher)
    assert all(shape[name].stride == teacher[name].stride and shape[name].channels == 4 for name in teacher)


def test_pyramids_without_a_common_level_are_refused():
    with pytest.raises(DistillError, match=r"stride s lies on one of the teacher of stride 2 s.*p5: 32.*p3: 8"):
        Scaling(0.5).levels(pyramid(5, 6), pyramid(3, 4))


@pytest.mark.parametrize("size", [(40, 62), (39, 61)])
def test_segmentations_shrink_with_the_image(size):
    labels = torch.randint(9, size)
    (scaled,) = Scaling(0.5).batch([{"image": torch.zeros(3, *size), "sem_seg": labels}])
    assert scaled["sem_seg"].shape == scaled["image"].shape[1:]
    assert torch.equal(scaled["sem_seg"], labels[::2, ::2])
