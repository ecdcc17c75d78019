"""A dataset mapper whose errors name the image."""

import traceback
from collections.abc import Callable
from pathlib import Path

from PIL.Image import DecompressionBombError

from ..errors import DistillError

_READING = ("read_image", "check_image_size")  # Detectron2's functions


class CheckedMapper:
    """Any dataset mapper; an image that cannot be read is named in the error, and so is one with values that the
    mapper cannot use (``ValueError``).

    Args:
        mapper: such as Detectron2's ``DatasetMapper``.
    """

    def __init__(self, mapper: Callable[[dict], dict]) -> None:
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DistillError: the image cannot be read, or the mapper raises a ``ValueError`` or ``OSError``.
        """
        try:
            return self.mapper(dataset_dict)
        except DistillError:
            raise
        except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:  # PIL's, without the file's name
            if "mask_format" in str(error):
                raise DistillError(
                    f"Cannot use the masks of {dataset_dict.get('file_name')!r}: {error} If they are run-length "
                    "encoded, set INPUT.MASK_FORMAT bitmask."
                ) from error
            file, frames = dataset_dict.get("file_name"), traceback.extract_tb(error.__traceback__)
            is_read = any(x.name in _READING or Path(x.filename).parent.name == "PIL" for x in frames)
            if not is_read and not (file and getattr(error, "filename", None) == file):
                place = f"{frames[-1].filename}, line {frames[-1].lineno}"
                raise DistillError(
                    f"The mapper failed on the image {dataset_dict.get('file_name')!r}: {type(error).__name__}: "
                    f"{error} ({place}). Correct its annotations, or the mapper; --resume goes on from the last "
                    "checkpoint."
                ) from error
            raise DistillError(
                f"Cannot read the image {dataset_dict.get('file_name')!r}: {error}. Replace the file, or take it out "
                "of the dataset; --resume goes on from the last checkpoint."
            ) from error
