"""What a file says of its input and its classes, from yaml and Python configs."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from distill.errors import DistillError
from distill.export import build_input_mapper, class_names, describe
from distill.recipes import LazyRecipe, YamlRecipe
from tests.export.test_files import describe_file
from tests.helpers import ROOT, detector_cfg


class Normalising(torch.nn.Module):
    pixel_mean, pixel_std = torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1), torch.ones(3, 1, 1)


@pytest.mark.parametrize(
    "sizes, expected", [((96, 160), (96, 160)), ((0, 160), (0, None))], ids=["resized", "as they are"]
)
def test_a_yaml_config_says_how_images_are_resized(sizes, expected):
    values = dict(zip(("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"), sizes))
    metadata = describe(YamlRecipe(detector_cfg("retinanet", **{"INPUT.FORMAT": "RGB", **values})), Normalising())
    assert (metadata.short_edge, metadata.max_size) == expected and metadata.channel_order == "RGB"
    assert (metadata.pixel_mean, metadata.pixel_std) == ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert metadata.knows_resizing and metadata.size is None


@pytest.mark.parametrize(
    "augmentations, expected",
    [
        ("[L(T.ResizeShortestEdge)(short_edge_length=100)]", (100, None)),
        ("[]", (0, None)),
        ("[L(T.ResizeShortestEdge)(short_edge_length=[100, 200], sample_style='choice')]", (None, None)),
        ("[L(T.ResizeShortestEdge)(short_edge_length=100), L(T.RandomFlip)()]", (None, None)),
        ("[L(T.ResizeShortestEdge)(short_edge_length=100, interp=3)]", (None, None)),  # bicubic
        (None, (None, None)),
    ],
)
def test_a_python_config_says_it_or_not(tmp_path, augmentations, expected):
    path = tmp_path / "config.py"
    text = "from detectron2 import model_zoo\nfrom detectron2.config import LazyCall as L\n"
    text += "import detectron2.data.transforms as T\nfrom detectron2.data import DatasetMapper\n"
    text += "model = model_zoo.get_config('common/models/retinanet.py').model\n"
    if augmentations is not None:
        mapper = f"L(DatasetMapper)(is_train=False, augmentations={augmentations}, image_format='RGB')"
        text += f"dataloader = dict(test=dict(mapper={mapper}))\n"
    path.write_text(text)
    metadata = describe(LazyRecipe(str(path)), Normalising())
    assert (metadata.short_edge, metadata.max_size) == expected
    assert metadata.channel_order == ("BGR" if augmentations is None else "RGB")
    assert metadata.knows_resizing == (expected[0] is not None)
    assert metadata.class_names == [str(index) for index in range(80)]


def test_classes_have_the_names_of_a_data_set_with_as_many():
    for name, classes in (("export_two", ["x", "y"]), ("export_three", ["x", "y", "z"])):
        MetadataCatalog.get(name).thing_classes = classes
    cfg = detector_cfg("retinanet", **{"DATASETS.TEST": ["export_two"], "DATASETS.TRAIN": ["export_three"]})
    assert class_names(YamlRecipe(cfg)) == ["x", "y", "z"]
    cfg.DATASETS.TRAIN = ["export_nowhere"]
    assert class_names(YamlRecipe(cfg)) == ["0", "1", "2"]


def test_a_detector_that_does_not_normalise_is_refused():
    with pytest.raises(DistillError, match="A Identity has no pixel_mean and pixel_std"):
        describe(YamlRecipe(detector_cfg("retinanet")), torch.nn.Identity())


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"short_edge": 32}, (32, 64)),
        ({"short_edge": 32, "max_size": 48}, (24, 48)),
        ({"short_edge": 0}, (50, 100)),
        ({"short_edge": None}, (50, 100)),
        ({"size": [40, 60]}, (30, 60)),
        ({"size": [100, 300]}, (100, 200)),
    ],
)
def test_images_are_read_as_the_metadata_says(tmp_path, fields, expected):
    Image.new("RGB", (100, 50), (10, 20, 30)).save(tmp_path / "image.png")
    item = build_input_mapper(describe_file([], **fields))({"file_name": str(tmp_path / "image.png")})
    assert item["image"].shape == (3, *expected) and item["image"][:, 0, 0].tolist() == [30, 20, 10]
    assert (item["height"], item["width"]) == (50, 100)


def test_the_page_names_every_field():
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert all(f"`{name}`" in page for name in describe_file([]).to_strings())
