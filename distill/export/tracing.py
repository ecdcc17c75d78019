"""Writes a detector as TorchScript or ONNX, by Detectron2's ``TracingAdapter``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.modeling.meta_arch import dense_detector
from detectron2.modeling.roi_heads import cascade_rcnn
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

from ..errors import DistillError
from .deployed import DeployedDetector, first_line, import_onnx
from .metadata import FileMetadata

OPSET = 18  # from 16 on, ONNX has RoIAlign as Detectron2 computes it
_FIELDS = {"pred_boxes", "pred_classes", "pred_masks", "scores"}


@torch.no_grad()
def raw_outputs(model: nn.Module, inputs: list[dict]) -> dict[str, Tensor]:
    """What a detector finds on one image, as Detectron2's deployment has it: masks are not pasted into the image.

    Args:
        model: the detector, in evaluation mode.
        inputs: the image, in Detectron2's format, without ``height`` and ``width``.

    Returns:
        The fields of Detectron2's ``Instances``, sorted by name: ``pred_boxes`` Tensor[N, 4] (x0, y0, x1, y1 in pixels
        of the input), ``pred_classes`` int64 Tensor[N], ``scores`` Tensor[N], and, of a Mask R-CNN, ``pred_masks``
        Tensor[N, 1, M, M], probabilities inside the box.

    Raises:
        DistillError: the detector returns anything else.
    """
    if isinstance(model, GeneralizedRCNN) and not isinstance(model, PanopticFPN):  # which returns more
        found = model.inference(inputs, do_postprocess=False)[0].get_fields()
    else:
        output = model(inputs)[0]
        found = output["instances"].get_fields() if output.keys() == {"instances"} else output
    others = found.keys() - _FIELDS
    if others:
        raise DistillError(
            f"A {type(model).__name__} that returns {', '.join(sorted(others))} cannot be exported: boxes, scores, "
            "classes and masks can. Use --format detectron2."
        )
    return {name: getattr(found[name], "tensor", found[name]) for name in sorted(found)}


def output_names(model: nn.Module, image: Tensor) -> list[str]:
    """The outputs of a detector, in order.

    Args:
        model: the detector, in evaluation mode.
        image: uint8 Tensor[3, H, W], on its device.

    Returns:
        Their names.

    Raises:
        DistillError: the detector cannot run on the image, or returns what cannot be exported.
    """
    try:
        return list(raw_outputs(model, [{"image": image}]))
    except DistillError:
        raise
    except Exception as error:  # whatever a detector raises for a size that it is not made for
        raise DistillError(
            f"The student cannot run on an image of {image.shape[1]}x{image.shape[2]} pixels (height x width): "
            f"{first_line(error)} Set DATASETS.TEST and how its images are resized, or give --size HEIGHT WIDTH."
        ) from error


def eager_detector(model: nn.Module, metadata: FileMetadata) -> DeployedDetector:
    """The detector in PyTorch, called in the same way as a file of it: an image of the file's size, raw outputs.

    Args:
        model: the detector, in evaluation mode.
        metadata: of the file.

    Returns:
        What the file is compared with.
    """

    def run(image: Tensor) -> tuple[Tensor, ...]:
        return tuple(raw_outputs(model, [{"image": image}]).values())

    return DeployedDetector(run, metadata, is_file=False)


@contextlib.contextmanager
def nms_of_files() -> Iterator[None]:
    """Runs Detectron2's NMS as traced files have it, for a comparison with one.

    torchvision's keeps classes apart by offsets when it is traced, whose rounding can tip an IoU at the threshold, and
    exactly when it is not and there are many boxes (on the CPU more than 1000).
    """

    def by_offsets(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
        if not boxes.numel():
            return classes.new_empty(0, dtype=torch.int64)
        offsets = classes.to(boxes) * (boxes.max() + 1)
        return box_ops.nms(boxes + offsets[:, None], scores, threshold)

    with mock.patch.object(box_ops, "batched_nms", by_offsets):
        yield


def write_torchscript(model: nn.Module, image: Tensor, path: Path, metadata: FileMetadata) -> None:
    """Writes a TorchScript file; the metadata is its extra file ``metadata.json``.

    Args:
        model: the detector, in evaluation mode.
        image: uint8 Tensor[3, H, W], an image to trace with; for a fixed size, of that size.
        path: the file to write.
        metadata: what the file says of itself.

    Raises:
        DistillError: the detector cannot be traced.
    """
    extra = {"metadata.json": json.dumps(dataclasses.asdict(metadata))}
    with _tracing("TorchScript"):
        script = torch.jit.trace(_adapter(model, image), (image,), check_trace=False)
        torch.jit.save(script, str(path), _extra_files=extra)


def write_onnx(model: nn.Module, image: Tensor, path: Path, metadata: FileMetadata) -> None:
    """Writes an ONNX file; the metadata is in its ``metadata_props``.

    Args:
        model: the detector, in evaluation mode.
        image: uint8 Tensor[3, H, W], an image to trace with; for a fixed size, of that size.
        path: the file to write.
        metadata: what the file says of itself. With a size, the input has that size; without one, any.

    Raises:
        DistillError: the package onnx is missing, or the detector cannot be traced.
    """
    onnx = import_onnx("onnx")
    axes = {name: {0: "detections"} for name in metadata.outputs}
    if metadata.size is None:
        axes["image"] = {1: "height", 2: "width"}
    with _tracing("ONNX"):
        torch.onnx.export(
            _adapter(model, image),
            (image,),
            str(path),
            opset_version=OPSET,
            dynamo=False,  # the newer exporter cannot follow the shapes in Detectron2's code
            input_names=["image"],
            output_names=metadata.outputs,
            dynamic_axes=axes,
        )
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, metadata.to_strings())
    onnx.save(written, str(path))


def _adapter(model: nn.Module, image: Tensor) -> TracingAdapter:
    # in evaluation mode itself, or torch's exporter leaves the model in training mode
    return TracingAdapter(model, [{"image": image}], raw_outputs).eval()


@contextlib.contextmanager
def _tracing(kind: str) -> Iterator[None]:
    """Keeps the tracer from warning of what the check of the file is for, and explains its errors."""
    with warnings.catch_warnings(), _traceable_v06():
        for category in (torch.jit.TracerWarning, UserWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        try:
            yield
        except Exception as error:  # whatever an operator that cannot be traced raises
            reason = first_line(error)
            raise DistillError(
                f"The student cannot be written as {kind}: {type(error).__name__}: {reason} Use --format detectron2, "
                "or the other one of torchscript and onnx."
            ) from error


@contextlib.contextmanager
def _traceable_v06() -> Iterator[None]:
    """Two of Detectron2's main branch's changes, for v0.6: without them, a dense detector's trace holds the number of
    candidates of the traced image, where there were few, and a cascade's a Python function for the backward pass."""

    def traceable_min(limit: int, number: int | Tensor) -> int | Tensor:
        return number.clamp(max=limit) if isinstance(number, Tensor) else min(limit, number)

    class SameInForward:
        @staticmethod
        def apply(features: Tensor, scale: float) -> Tensor:
            return features

    with (
        mock.patch.object(dense_detector, "min", traceable_min, create=True),
        mock.patch.object(cascade_rcnn, "_ScaleGradient", SameInForward, create=True),
    ):
        yield
