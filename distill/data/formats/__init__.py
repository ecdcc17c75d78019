"""Readers of annotations as tools write them, one file a format."""

from .coco import read_coco
from .source import Fault, Source
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["Fault", "Source", "read_coco", "read_voc", "read_yolo"]
