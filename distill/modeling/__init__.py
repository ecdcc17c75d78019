"""Student, teacher and what a distiller sees of them; backbones and meta-architectures."""

from .aligned_teacher import AlignedBackbone, AlignedTeacher
from .backbones import build_slimmable_resnet_fpn_backbone
from .distillation_model import DistillationModel
from .fusion import CrossFeatureFusion
from .meta_arch import FCOS
from .teacher import Teacher, build_teacher
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone
from .views import DetectorView

__all__ = [
    "FCOS",
    "AlignedBackbone",
    "AlignedTeacher",
    "CrossFeatureFusion",
    "DetectorView",
    "DistillationModel",
    "Teacher",
    "TimmBackbone",
    "build_slimmable_resnet_fpn_backbone",
    "build_teacher",
    "build_timm_fpn_backbone",
]
