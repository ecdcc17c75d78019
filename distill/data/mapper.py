"""Detectron2's dataset mapper, with an error that names the image that cannot be read."""

from detectron2.data import DatasetMapper

from ..errors import DistillError


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's :class:`DatasetMapper`; an unreadable image is an error that names its file."""

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DistillError: the image cannot be read.
        """
        try:
            return super().__call__(dataset_dict)
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three, without the file's name
            raise DistillError(
                f"Cannot read the image {dataset_dict.get('file_name')!r}: {error}. Replace the file, or take it out "
                "of the data set; --resume goes on from the last checkpoint."
            ) from error
