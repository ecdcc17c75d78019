"""An exported file as a Detectron2 detector."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, ROIMasks
from torch import Tensor, nn

from ..errors import DistillError
from .metadata import FileMetadata

Run = Callable[[Tensor], Sequence[Tensor]]


class FileFault(DistillError):
    """An exported file is not what the detector in PyTorch is."""


class DeployedDetector(nn.Module):
    """What Detectron2's evaluators and its Visualizer take, from a function of one image.

    Args:
        run: takes a uint8 Tensor[3, H, W] and returns the tensors that ``metadata.outputs`` names.
        metadata: of the file.
        is_file: whether ``run`` is an exported file, rather than the student that it is compared with.
    """

    def __init__(self, run: Run, metadata: FileMetadata, is_file: bool = True) -> None:
        super().__init__()
        self.run = run
        self.metadata = metadata
        self.is_file = is_file

    def forward(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: Detectron2's, one dict an image: ``image`` Tensor[3, H, W] in the metadata's order of
                channels and, for the size of the results, ``height`` and ``width``.

        Returns:
            For each image its ``instances``, masks pasted, as a detector of Detectron2 returns them.

        Raises:
            DistillError: the file has a fixed size, and an image is larger.
        """
        results = []
        for item in batched_inputs:
            instances = self.detect(item["image"])
            height, width = (item.get(key, side) for key, side in zip(("height", "width"), instances.image_size))
            results.append({"instances": _postprocess(instances, height, width)})
        return results

    @torch.no_grad()
    def detect(self, image: Tensor) -> Instances:
        """What the file finds, in pixels of its input.

        Args:
            image: uint8 Tensor[3, H, W].

        Returns:
            The instances; masks are those inside the boxes, Tensor[N, 1, M, M].

        Raises:
            DistillError: the file has a fixed size, and the image is larger; or it cannot be run on the image, which of
                a file is a :class:`FileFault`.
        """
        padded = pad_image(image, self.metadata).to(self.metadata.device)
        try:
            outputs = self.run(padded)
        except DistillError:
            raise
        except Exception as error:  # whatever a runtime raises
            what, kind = ("The file", FileFault) if self.is_file else ("The student", DistillError)
            raise kind(
                f"{what} cannot be run on an image of {image.shape[1]}x{image.shape[2]} pixels: {first_line(error)} "
                "Does the student compute with fixed sizes? Give --size HEIGHT WIDTH."
            ) from error
        fields = dict(zip(self.metadata.outputs, outputs))
        fields["pred_boxes"] = Boxes(fields["pred_boxes"])
        return Instances(tuple(image.shape[-2:]), **fields)


def _postprocess(instances: Instances, height: int, width: int) -> Instances:
    """Detectron2's, with masks pasted into boxes as the file has them: of a fixed size, both may end in the padding."""
    if not instances.has("pred_masks"):
        return detector_postprocess(instances, height, width)
    own_height, own_width = instances.image_size
    boxes, masks = instances.pred_boxes.clone(), ROIMasks(instances.pred_masks[:, 0])
    boxes.scale(width / own_width, height / own_height)
    instances.remove("pred_masks")
    instances.number = torch.arange(len(instances), device=boxes.device)
    found = detector_postprocess(instances, height, width)  # boxes without an area are dropped
    found.pred_masks = masks[found.number].to_bitmasks(boxes[found.number], height, width).tensor
    found.remove("number")
    return found


def pad_image(image: Tensor, metadata: FileMetadata) -> Tensor:
    """An image as a file of fixed size takes it.

    Args:
        image: uint8 Tensor[3, H, W].
        metadata: of the file; without a size, the image stays as it is.

    Returns:
        The image with the file's size, filled up below and to the right by the mean, which becomes zero in the file.

    Raises:
        DistillError: the image is larger.
    """
    if metadata.size is None:
        return image
    height, width = image.shape[-2:]
    full_height, full_width = metadata.size
    if height > full_height or width > full_width:
        raise DistillError(
            f"An image of {height}x{width} pixels does not fit into the file's input of {full_height}x{full_width} "
            "(height x width): resize it first, as distill.export.build_input_mapper does."
        )
    mean = torch.tensor(metadata.pixel_mean, device=image.device).round().to(image.dtype)
    padded = mean.view(-1, 1, 1).repeat(1, full_height, full_width)
    padded[:, :height, :width] = image
    return padded


def load_deployed(path: str | Path) -> DeployedDetector:
    """Loads what ``tools/export_student.py`` wrote.

    Args:
        path: a TorchScript file (.ts) or an ONNX file (.onnx).

    Returns:
        The detector.

    Raises:
        DistillError: there is no such file, it is neither, it cannot be read, it lacks its metadata, it is for a GPU
            that is not there, or onnxruntime is missing.
    """
    path = Path(path)
    loaders = {".ts": _load_torchscript, ".onnx": _load_onnx}
    if path.suffix not in loaders:
        raise DistillError(f"{path} is no exported file: expected the suffix {' or '.join(loaders)}.")
    if not path.is_file():
        raise DistillError(f"The exported file {path} does not exist. Write it by tools/export_student.py.")
    return DeployedDetector(*loaders[path.suffix](path))


def _load_torchscript(path: Path) -> tuple[Run, FileMetadata]:
    extra = {"metadata.json": ""}
    try:
        # where it was traced is where it runs: constants inside are on that device
        script = torch.jit.load(str(path), _extra_files=extra)
        strings = {key: json.dumps(value) for key, value in json.loads(extra["metadata.json"] or "{}").items()}
    except (RuntimeError, ValueError) as error:
        raise _unreadable(path, "TorchScript", error) from error
    return script, FileMetadata.from_strings(strings, str(path))


def _load_onnx(path: Path) -> tuple[Run, FileMetadata]:
    runtime = import_onnx("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has an exception for each of its status codes, without a common base
        raise _unreadable(path, "ONNX", error) from error
    metadata = FileMetadata.from_strings(session.get_modelmeta().custom_metadata_map, str(path))

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(metadata.outputs, {"image": image.cpu().numpy()})]

    return run, metadata


def _unreadable(path: Path, kind: str, error: Exception) -> DistillError:
    return DistillError(f"{path} cannot be loaded as {kind}: {first_line(error)} Is the file complete?")


def first_line(error: Exception) -> str:
    """What an error says, in a line; runtimes append traces of their own.

    Args:
        error: any.

    Returns:
        Its first line, or its type where it has none.
    """
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def import_onnx(name: str) -> ModuleType:
    """Imports a package of the extra ``onnx``.

    Args:
        name: "onnx" or "onnxruntime".

    Returns:
        The package.

    Raises:
        DistillError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DistillError(
            f"ONNX files need the package {name}, which cannot be imported ({error}). Install both that are needed: "
            "pip install -c constraints.txt onnx onnxruntime"
        ) from error
