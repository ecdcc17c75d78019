"""Where the prototypes of all classes and levels are kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn


class LevelPrototypes(nn.Module):
    """Prototypes at one level, in buffers of a fixed size, so that they are in the checkpoint.

    Args:
        size: how many there can be.
        student_channels: length of the student's features.
        teacher_channels: length of the teacher's.

    Attributes:
        student: ``Tensor[size, Ds]``, features in the student's space.
        teacher: ``Tensor[size, Dt]``, features of the same instances in the teacher's space.
        labels: ``LongTensor[size]``, classes; -1 where there is no prototype.
        images: ``LongTensor[size]``, index of the image in the training dataset.
        boxes: ``Tensor[size, 4]``, corners of the instance, in pixels of the image file.
    """

    def __init__(self, size: int, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.register_buffer("student", torch.zeros(size, student_channels))
        self.register_buffer("teacher", torch.zeros(size, teacher_channels))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("images", torch.full((size,), -1))
        self.register_buffer("boxes", torch.zeros(size, 4))


class PrototypeBank(nn.Module):
    """The prototypes of all classes at all levels.

    Args:
        levels: names of the levels.
        student_shape: the student's features, by level.
        teacher_shape: the teacher's.
        num_classes: number of classes.
        num_prototypes: how many a class may have at a level.

    Attributes:
        searches: ``LongTensor[]``, how often prototypes were searched.
    """

    def __init__(
        self,
        levels: Sequence[str],
        student_shape: Mapping[str, ShapeSpec],
        teacher_shape: Mapping[str, ShapeSpec],
        num_classes: int,
        num_prototypes: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self._known_numbers: dict[str, int] | None = None
        self.register_buffer("searches", torch.tensor(0))
        self.levels = nn.ModuleDict(
            {
                level: LevelPrototypes(
                    num_classes * num_prototypes, student_shape[level].channels, teacher_shape[level].channels
                )
                for level in levels
            }
        )

    def at(self, level: str) -> tuple[Tensor, Tensor, Tensor]:
        """The prototypes of a level.

        Args:
            level: its name.

        Returns:
            Features in the student's space, ``Tensor[P, Ds]``, in the teacher's, ``Tensor[P, Dt]``, and classes,
            ``LongTensor[P]``.
        """
        kept, number = self.levels[level], self._numbers()[level]
        return kept.student[:number], kept.teacher[:number], kept.labels[:number]

    @property
    def is_empty(self) -> bool:
        """Whether no class has a prototype at any level: none were searched or found, or a checkpoint's did not fit."""
        return not any(self._numbers().values())

    def _numbers(self) -> dict[str, int]:
        """How many prototypes there are, by level; they come first. Kept, for to ask the GPU is to wait for it."""
        if self._known_numbers is None:
            counts = torch.stack([(kept.labels >= 0).sum() for kept in self.levels.values()]).tolist()
            self._known_numbers = dict(zip(self.levels, counts))
        return self._known_numbers

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._known_numbers = None

    def clear(self) -> None:
        """Forgets all prototypes, and that they were searched."""
        for kept in self.levels.values():
            kept.labels.fill_(-1)
            kept.images.fill_(-1)
        self.searches.zero_()
        self._known_numbers = None

    def replace(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts new prototypes in the place of all that there are.

        Args:
            found: for each level the buffers of :class:`LevelPrototypes`, with as many rows as there are prototypes.
        """
        for level, kept in self.levels.items():
            kept.labels.fill_(-1)
            kept.images.fill_(-1)
            for name, values in found[level].items():
                getattr(kept, name)[: len(values)] = values.to(kept.labels.device)
        self.searches += 1
        self._known_numbers = None
