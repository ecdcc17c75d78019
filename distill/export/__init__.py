"""Detectors as files that run without Detectron2, TorchScript and ONNX, and such a file as a detector again."""

from .check import (
    TOLERANCE,
    Difference,
    compare,
    compare_on,
    evaluate_both,
    random_inputs,
    read_test_inputs,
    register_test_sets,
)
from .deployed import DeployedDetector, FileFault, import_onnx, load_deployed, pad_image
from .metadata import FileMetadata, build_input_mapper, class_names, describe
from .tracing import eager_detector, nms_of_files, output_names, raw_outputs, write_onnx, write_torchscript

__all__ = [
    "TOLERANCE",
    "DeployedDetector",
    "Difference",
    "FileFault",
    "FileMetadata",
    "build_input_mapper",
    "class_names",
    "compare",
    "compare_on",
    "describe",
    "eager_detector",
    "evaluate_both",
    "import_onnx",
    "load_deployed",
    "nms_of_files",
    "output_names",
    "pad_image",
    "random_inputs",
    "raw_outputs",
    "read_test_inputs",
    "register_test_sets",
    "write_onnx",
    "write_torchscript",
]
