"""Images as a person sees them, and what their headers say."""

import contextlib
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, get_cache_dir
from PIL import Image, ImageFile, ImageOps
from tqdm import tqdm

from .lock import waiting_lock

SEEN = "seen://"
_ORIENTATION = 0x0112  # the EXIF tag
_VERSION = 2  # of what is kept of a header
_AT_ONCE = 50_000  # files
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_lock = threading.Lock()
logger = logging.getLogger(__name__)


class Header(NamedTuple):
    """What is known of an image without decoding it.

    Attributes:
        width: in the file, in pixels.
        height: in the file, in pixels.
        orientation: EXIF's, 1 to 8; from 5 on a person sees width and height exchanged.
        needs: "" or why Detectron2 would not read what a person sees: "16 bits" or "transparency".
        fault: "" or a kind of :data:`distill.data.check.KINDS`.
    """

    width: int = 0
    height: int = 0
    orientation: int = 1
    needs: str = ""
    fault: str = ""

    @property
    def seen_size(self) -> tuple[int, int]:
        """Width and height as a person sees them."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(file: str) -> Header:
    """Reads what an image's file says of it, and whether it is complete.

    Args:
        file: its path.

    Returns:
        The header.
    """
    if not os.path.isfile(file):
        return Header(fault="image missing")
    try:
        with Image.open(file) as image:
            fault = "" if _is_complete(file, image) else "image cut off"
            orientation = _orientation_of_cut(file) if fault else image.getexif().get(_ORIENTATION, 1)
            orientation = orientation if orientation in range(1, 9) else 1
            needs = "16 bits" if image.mode.startswith("I") else "transparency" if _is_transparent(image) else ""
            return Header(*image.size, orientation, needs, fault)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Header(fault="image unreadable")


def _orientation_of_cut(file: str) -> int:
    with _opened_as_far_as_it_goes(file) as image:
        return image.getexif().get(_ORIENTATION, 1)  # a PNG is decoded for it


@contextlib.contextmanager
def _opened_as_far_as_it_goes(file: str) -> Iterator[Image.Image]:
    with _lock, Image.open(file) as image:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            yield image
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _is_complete(file: str, image: Image.Image) -> bool:
    end = _ENDS.get(image.format)
    if end is None:
        return True
    with open(file, "rb") as stream:
        stream.seek(-min(64, os.path.getsize(file)), os.SEEK_END)
        if end in stream.read().rstrip(b"\0"):
            return True
    try:  # a camera may write something behind the image
        with _lock:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def seen_path(file: str) -> str:
    """The path under which Detectron2 reads a file as a person sees it.

    Args:
        file: an image's path.

    Returns:
        The same, or ``seen://PATH`` where Detectron2 would not by itself.
    """
    return SEEN + file if read_header(file).needs else file


def read_headers(files: Sequence[str], key: str) -> dict[str, Header]:
    """Reads the headers of many images at a time. They are kept, and read again where a file's time or size changed, or
    it had a fault; of several processes of a machine, one reads.

    Args:
        files: their paths.
        key: names what is kept.

    Returns:
        Headers by path.
    """
    cache = Path(get_cache_dir()) / "distill" / f"headers_{_VERSION}_{hashlib.sha1(key.encode()).hexdigest()[:16]}.json"
    with waiting_lock(str(cache), "checks the images") as is_held:
        return _read_headers(files, cache if is_held else None)


def _read_headers(files: Sequence[str], cache: Path | None) -> dict[str, Header]:
    kept: dict[str, list] = {}
    if cache is not None and cache.is_file():
        with contextlib.suppress(ValueError):  # written by a process that was killed
            kept = json.loads(cache.read_text())
    found: dict[str, list] = {}
    bar = tqdm(desc="Checking images", total=len(files), disable=len(files) < 1000)
    with bar, ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        for first in range(0, len(files), _AT_ONCE):  # what is read is kept, whatever ends the rest
            part = files[first : first + _AT_ONCE]
            stamps = dict(zip(part, pool.map(_stamp, part)))
            # what had a fault is read again, which may have been the disk's
            todo = [x for x in part if x not in kept or kept[x][0] != stamps[x] or Header(*kept[x][1:]).fault]
            bar.update(len(part) - len(todo))
            fresh = {}
            for file, header in zip(todo, pool.map(read_header, todo)):
                fresh[file] = [stamps[file], *header]
                bar.update()
            found.update({file: fresh.get(file) or kept[file] for file in part})
            if cache is not None and fresh:
                _keep(cache, found if len(found) == len(set(files)) else {**kept, **found})
    return {file: Header(*row[1:]) for file, row in found.items()}


def _keep(cache: Path, content: dict[str, list]) -> None:
    temporary = cache.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content))
        temporary.replace(cache)
    except OSError as error:  # a full disk: the next run reads again
        logger.warning(f"What is known of the images' files cannot be kept in {cache}: {error}")
        with contextlib.suppress(OSError):
            temporary.unlink()


def _stamp(file: str) -> list[int]:
    try:
        status = os.stat(file)
        return [status.st_mtime_ns, status.st_size]
    except OSError:
        return [0, 0]


class SeenImageHandler(PathHandler):
    """Opens ``seen://PATH``: the image as a person sees it, upright, in 8 bits a channel, on white where it is
    transparent, and as far as it goes where it is cut off.

    Detectron2's ``read_image`` opens files by its ``PathManager``, so every mapper takes such a path.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [SEEN]

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(path.removeprefix(SEEN))

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.exists(path.removeprefix(SEEN))

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return path.removeprefix(SEEN)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        with _opened_as_far_as_it_goes(path.removeprefix(SEEN)) as image:
            seen = _to_8_bits(ImageOps.exif_transpose(image))
        stream = io.BytesIO()
        seen.save(stream, "PNG", compress_level=0)
        stream.seek(0)
        return stream


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # black is 0, white is 65535
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if _is_transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


PathManager.register_handler(SeenImageHandler(), allow_override=True)
