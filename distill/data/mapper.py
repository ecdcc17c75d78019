"""A dataset mapper whose errors name the image."""

from collections.abc import Callable

from PIL.Image import DecompressionBombError

from ..errors import DistillError


class CheckedMapper:
    """Any dataset mapper; an unreadable image is an error that names its file.

    Args:
        mapper: such as Detectron2's ``DatasetMapper``.
    """

    def __init__(self, mapper: Callable[[dict], dict]) -> None:
        self.mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DistillError: the image cannot be read.
        """
        try:
            return self.mapper(dataset_dict)
        except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:  # PIL's, without the file's name
            if "mask_format" in str(error):
                raise DistillError(
                    f"Cannot use the masks of {dataset_dict.get('file_name')!r}: {error} If they are run-length "
                    "encoded, set INPUT.MASK_FORMAT bitmask."
                ) from error
            raise DistillError(
                f"Cannot read the image {dataset_dict.get('file_name')!r}: {error}. Replace the file, or take it out "
                "of the dataset; --resume goes on from the last checkpoint."
            ) from error
