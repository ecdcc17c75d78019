"""TorchScript and ONNX files find what the detector in PyTorch does, at the traced size and at others."""

import json
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from detectron2.modeling import build_model

from distill.errors import DistillError
from distill.export import (
    DeployedDetector,
    FileMetadata,
    eager_detector,
    load_deployed,
    output_names,
    pad_image,
)
from distill.export import deployed as deployed_module
from distill.export.tracing import write_onnx, write_torchscript
from tests.helpers import DETECTORS, detector_cfg

FORMATS = {"ts": write_torchscript, "onnx": write_onnx}
THRESHOLDS = {
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.2,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.02,
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.08,
    "MODEL.FCOS.NORM": "",
    "MODEL.PIXEL_STD": [58.0, 57.0, 57.0],  # by noise, a random ResNet gives values that saturate every score
    "depth": 18,  # a tracer takes its time by the layer
}
TRACED, OTHERS = (75, 90), [(75, 90), (64, 64), (130, 101)]


def image_of(height, width):
    """Noise, the same for the same size."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def describe_file(outputs, size=None, **others):
    fields = {
        "class_names": ["a", "é", "c"],
        "pixel_mean": [103.5, 116.3, 123.7],
        "pixel_std": [58.0, 57.0, 57.0],
        "channel_order": "BGR",
        "short_edge": 96,
        "max_size": None,
    }
    return FileMetadata(outputs=outputs, size=size, **{**fields, **others})


def box_predictors(model):
    """Those of a detector with a box head, by stage."""
    predictors = model.roi_heads.box_predictor
    return list(predictors) if isinstance(predictors, torch.nn.ModuleList) else [predictors]


def finding_detector(kind, **overrides):
    """A random detector that finds something in noise."""
    torch.manual_seed(0)
    model = build_model(detector_cfg(kind, **{**THRESHOLDS, **overrides})).eval().requires_grad_(False)
    if kind in ("retinanet", "fcos"):  # the last layers' small weights make all scores alike
        model.head.cls_score.weight.mul_(20)
    else:
        for predictor in box_predictors(model):
            predictor.cls_score.weight.mul_(3)
            predictor.bbox_pred.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def models():
    return {kind: finding_detector(kind) for kind in DETECTORS}


def write(model, path, size=None, traced=TRACED):
    outputs = output_names(model, image_of(*traced))
    metadata = describe_file(outputs, size)
    FORMATS[path.suffix[1:]](model, pad_image(image_of(*traced), metadata), path, metadata)
    assert not any(module.training for module in model.modules())
    return load_deployed(path)


@torch.no_grad()
def assert_same(model, detector, item, exactly):
    """The whole way of a Detectron2 detector, pasted masks and the size of the result included."""
    (expected,), (found,) = model([item]), detector([item])
    expected, found = expected["instances"], found["instances"]
    assert found.image_size == expected.image_size
    assert found.get_fields().keys() == expected.get_fields().keys()
    assert len(found) == len(expected)
    # by equal scores, the order is anyone's
    distances = (expected.pred_boxes.tensor[:, None] - found.pred_boxes.tensor).abs().sum(2)
    distances += 1e6 * (expected.pred_classes[:, None] != found.pred_classes)
    order = distances.argmin(1) if len(found) else torch.zeros(0, dtype=torch.int64)
    assert sorted(order.tolist()) == list(range(len(found)))
    found = found[order]
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-2}
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, **tolerance)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0 if exactly else 1e-4)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    if expected.has("pred_masks"):
        differing = int((found.pred_masks != expected.pred_masks).sum())
        assert found.pred_masks.dtype == torch.bool
        assert differing <= (0 if exactly else 1e-3 * expected.pred_masks.sum())
    return len(expected)


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_finds_what_the_detector_finds(tmp_path, models, kind, suffix):
    detector = write(models[kind], tmp_path / f"model.{suffix}")
    for height, width in OTHERS:
        item = {"image": image_of(height, width), "height": height * 2, "width": width * 2}
        assert assert_same(models[kind], detector, item, exactly=suffix == "ts") > 4
        assert assert_same(models[kind], detector, {"image": item["image"]}, exactly=suffix == "ts") > 4


@pytest.mark.parametrize("kind", ["mask_rcnn", "fcos"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_fixed_size_pads_below_and_to_the_right(tmp_path, models, kind, suffix):
    detector = write(models[kind], tmp_path / f"model.{suffix}", size=[96, 128])
    reference = eager_detector(models[kind], detector.metadata)
    for height, width in [(96, 128), (75, 61)]:
        item = {"image": image_of(height, width), "height": height * 2, "width": width * 2}
        assert assert_same(reference, detector, item, exactly=suffix == "ts") > 4
        found = detector([item])[0]["instances"]
        assert found.pred_boxes.tensor[:, 2].max() <= 2 * width and found.pred_boxes.tensor[:, 3].max() <= 2 * height
    # what is not padded is as in plain Detectron2
    assert assert_same(models[kind], detector, {"image": image_of(96, 128)}, exactly=suffix == "ts") > 4
    with pytest.raises(DistillError, match="image of 97x64 pixels does not fit into the file's input of 96x128"):
        detector([{"image": image_of(97, 64)}])


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_the_number_of_candidates_is_not_that_of_the_traced_image(tmp_path, kind):
    """v0.6 takes min(limit, candidates) in Python: few in a small image, more than the limit in a larger one."""
    node = {"retinanet": "RETINANET", "fcos": "FCOS"}[kind]
    limits = {f"MODEL.{node}.TOPK_CANDIDATES_TEST": 5}
    model = finding_detector(kind, **limits)
    for suffix in FORMATS:
        detector = write(model, tmp_path / f"model.{suffix}", traced=(16, 16))
        assert assert_same(model, detector, {"image": image_of(130, 101)}, exactly=suffix == "ts") > 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_without_detections(tmp_path, suffix):
    model = build_model(detector_cfg("mask_rcnn", **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1.0})).eval()
    detector = write(model, tmp_path / f"model.{suffix}")
    found = detector([{"image": image_of(64, 64), "height": 32, "width": 48}])[0]["instances"]
    assert len(found) == 0 and found.pred_masks.shape == (0, 32, 48)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_image_with_detections_after_a_traced_one_without_and_the_reverse(tmp_path, suffix):
    model = finding_detector("mask_rcnn")
    images = [image_of(64, 64), torch.full((3, 64, 64), 128, dtype=torch.uint8)]
    highest = [model([{"image": image}])[0]["instances"].scores.max().item() for image in images]
    model.roi_heads.box_predictor.test_score_thresh = sum(highest) / 2  # one of them has detections
    for traced in images:
        metadata = describe_file(output_names(model, traced))
        FORMATS[suffix](model, pad_image(traced, metadata), tmp_path / f"model.{suffix}", metadata)
        detector = load_deployed(tmp_path / f"model.{suffix}")
        found = [assert_same(model, detector, {"image": image}, exactly=suffix == "ts") for image in images]
        assert min(found) == 0 < max(found)


def test_a_mask_that_ends_in_the_padding_is_not_squeezed():
    grid = torch.zeros(1, 1, 28, 28)
    grid[..., :14] = 1
    found = torch.tensor([[40.0, 10, 100, 30]]), torch.tensor([0]), grid, torch.tensor([0.9])
    metadata = describe_file(["pred_boxes", "pred_classes", "pred_masks", "scores"], size=[96, 128])
    detector = DeployedDetector(lambda image: found, metadata)
    for width, first, last in ((80, 40, 70), (160, 80, 140)):  # of the result: the image's, and twice that
        (result,) = detector([{"image": image_of(60, 80), "height": 60, "width": width}])
        (mask,) = result["instances"].pred_masks
        columns = mask.any(0).nonzero()[:, 0].tolist()
        assert columns == list(range(first, last)) and mask.shape == (60, width)
        assert result["instances"].pred_boxes.tensor[0, 2] == width  # clipped


def test_metadata_is_read_without_this_package(tmp_path, models):
    detector = write(models["mask_rcnn"], tmp_path / "model.onnx", size=[96, 128])
    expected = {
        "class_names": ["a", "é", "c"],
        "pixel_mean": [103.5, 116.3, 123.7],
        "pixel_std": [58.0, 57.0, 57.0],
        "channel_order": "BGR",
        "size": [96, 128],
        "short_edge": 96,
        "max_size": None,
        "outputs": ["pred_boxes", "pred_classes", "pred_masks", "scores"],
        "device": "cpu",
    }
    written = onnx.load(str(tmp_path / "model.onnx"))
    assert {prop.key: json.loads(prop.value) for prop in written.metadata_props} == expected
    onnx.checker.check_model(written)
    assert "RoiAlign" in {node.op_type for node in written.graph.node}
    (image,) = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", [3, 96, 128])

    write(models["mask_rcnn"], tmp_path / "model.ts", size=[96, 128])
    extra = {"metadata.json": ""}
    torch.jit.load(str(tmp_path / "model.ts"), _extra_files=extra)
    assert json.loads(extra["metadata.json"]) == expected
    assert load_deployed(tmp_path / "model.ts").metadata == detector.metadata

    write(models["retinanet"], tmp_path / "any.onnx")
    (image,) = onnxruntime.InferenceSession(str(tmp_path / "any.onnx")).get_inputs()
    assert image.shape == [3, "height", "width"]


def test_files_that_cannot_be_loaded(tmp_path, monkeypatch, models):
    with pytest.raises(DistillError, match=r"model\.onnx does not exist"):
        load_deployed(tmp_path / "model.onnx")
    with pytest.raises(DistillError, match=r"model\.pth is no exported file: expected the suffix \.ts or \.onnx"):
        load_deployed(tmp_path / "model.pth")
    for name, kind in (("model.ts", "TorchScript"), ("model.onnx", "ONNX")):
        (tmp_path / name).write_bytes(b"no model")
        with pytest.raises(DistillError, match=f"{name} cannot be loaded as {kind}: .*Is the file complete"):
            load_deployed(tmp_path / name)
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), str(tmp_path / "other.ts"))
    with pytest.raises(DistillError, match=r"other\.ts lacks the metadata class_names, .*tools/export_student\.py"):
        load_deployed(tmp_path / "other.ts")
    write(models["retinanet"], tmp_path / "damaged.onnx")
    damaged = onnx.load(str(tmp_path / "damaged.onnx"))
    onnx.helper.set_model_props(damaged, {**describe_file([]).to_strings(), "size": "[1,"})
    onnx.save(damaged, str(tmp_path / "damaged.onnx"))
    with pytest.raises(DistillError, match=r"metadata of .*damaged\.onnx is damaged"):
        load_deployed(tmp_path / "damaged.onnx")

    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(deployed_module, "importlib", SimpleNamespace(import_module=absent))
    with pytest.raises(DistillError, match="need the package onnxruntime.*pip install -c constraints.txt onnx"):
        load_deployed(tmp_path / "damaged.onnx")
    with pytest.raises(DistillError, match="need the package onnx,"):
        write_onnx(models["retinanet"], image_of(64, 64), tmp_path / "x.onnx", describe_file([]))


def test_what_cannot_be_exported(tmp_path, models):
    panoptic = build_model(detector_cfg("mask_rcnn", **{"MODEL.META_ARCHITECTURE": "PanopticFPN"})).eval()
    with pytest.raises(DistillError, match="A PanopticFPN that returns .*panoptic_seg, sem_seg cannot be exported"):
        output_names(panoptic, image_of(64, 64))

    class Untraceable(torch.nn.Module):
        def forward(self, inputs):
            raise RuntimeError("Unknown operator\nand a trace")

    for suffix, kind in (("ts", "TorchScript"), ("onnx", "ONNX")):
        with pytest.raises(DistillError, match=f"cannot be written as {kind}: RuntimeError: Unknown operator Use"):
            FORMATS[suffix](Untraceable(), image_of(8, 8), tmp_path / f"model.{suffix}", describe_file([]))
        with pytest.raises(DistillError, match=r"an image of 8x9 pixels .*: Unknown operator Set DATASETS\.TEST"):
            output_names(Untraceable(), image_of(8, 9))
