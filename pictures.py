"""From the bytes of a stranger's file to RGB pixels, or to a Problem that says why not."""

import re
import threading
import time
import warnings
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from description import Preprocessor
from web import IMAGE_MAX_BYTES, IMAGE_MAX_PIXELS, File, Problem

MAX_PARTS, MAX_READS = 500, 500_000
JPEG_START = b"\xff\xd8"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# How files begin, in small letters: those that should be readable, and others that have a name.
STARTS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89png",
    "WEBP": rb"riff....webp",
    "GIF": rb"gif8",
    "BMP": rb"bm",
    "TIFF": rb"(ii|mm)(\*\0|\0\*|\+\0|\0\+)",
    "AVIF": rb"....ftypavi",
}
MARKUP = (
    rb"(?>\xef\xbb\xbf|\s|<\?.*?\?>|<!--.*?-->)*"  # what may stand before a web page's first tag
)
OTHER_FORMATS = {
    "HEIC": rb"....ftyp(he[iv]|mi[af]|msf)",
    "JPEG XL": rb"\xff\x0a|....jxl ",
    "ICO": rb"\x00\x00\x01\x00",
    "PSD": rb"8bps",
    "PDF": rb"%pdf",
    "HTML": MARKUP + rb"<(!doctype html|html|head|body|title|meta|script|style|link|div|p|h1|a)\b",
    "SVG": rb".*<svg",
}
# How a picture is turned upright, by the number that cameras note in its EXIF data.
ORIENTATION = 0x0112
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class Room:
    """Room in memory for a number of pixels, shared by pictures that are decoded at the same time.

    The largest picture takes up to 0.5 GB, and many small ones together take no more. Whoever has
    waited longest gets room first, so that small pictures do not keep a large one waiting.
    """

    def __init__(self, pixels: int):
        self.size = self.left = pixels
        self.entrance = threading.Lock()
        self.changed = threading.Condition()

    @contextmanager
    def enter(self, deadline: float) -> Iterator[None]:
        """Let one thread at a time look at its picture and take room; raise Problem in time."""
        left = deadline - time.monotonic()
        if left < 0 or not self.entrance.acquire(timeout=left):
            raise Problem(503, "too-busy", TOO_MANY)
        try:
            yield
        finally:
            self.entrance.release()

    @contextmanager
    def take(self, pixels: int, deadline: float) -> Iterator[None]:
        """Hold room for these pixels, at most all; raise Problem if the deadline passes first."""
        pixels = min(pixels, self.size)
        with self.changed:
            seconds = max(0, deadline - time.monotonic())
            if not self.changed.wait_for(lambda: self.left >= pixels, seconds):
                raise Problem(503, "too-busy", TOO_MANY)
            self.left -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.left += pixels
                self.changed.notify_all()


TOO_MANY = "Too many large pictures at a time; try again soon."
room = Room(IMAGE_MAX_PIXELS)


class CountingFile(BytesIO):
    """A file whose reader gives up when it comes in very many, very small parts."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes; raise ValueError after MAX_READS reads."""
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError("too many parts")
        return super().read(size)


class Jpeg(JpegImageFile):
    """A JPEG of which Pillow reads no more than the pixels need: the rest may be anything."""

    def _read_dpi_from_exif(self) -> None:
        """Leave the resolution alone."""


def has_many(file: bytes, part: bytes) -> bool:
    """Say whether a part is more than MAX_PARTS times in a file.

    NumPy counts the part's first two bytes, which is quick. Only where these are frequent is the
    whole part counted, which is slow.
    """
    values = np.frombuffer(file, np.uint8)
    starts = np.count_nonzero((values[:-1] == part[0]) & (values[1:] == part[1]))
    return bool(starts > MAX_PARTS) and file.count(part) > MAX_PARTS


def open_picture(file: bytes) -> Image.Image:
    """Return what a file declares, its pixels unread; raise what Pillow raises.

    Beyond 89 million pixels Pillow warns, and beyond twice as many it refuses: 413 for both.
    """
    if file.startswith(JPEG_START):
        return Jpeg(CountingFile(file))
    if file[4:8] == b"ftyp":  # an AVIF says how it is turned outside its EXIF data
        file = re.sub(rb"(infe[\2\3]...(..|....)..)Exif", rb"\1none", file, flags=re.S)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(CountingFile(file), formats=IMAGE_FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise RequestEntityTooLarge from error


def turn(image: Image.Image) -> Image.Image:
    """Return a picture upright; one whose EXIF data cannot be read stays as it is.

    Unlike Pillow's `exif_transpose`, this only reads the data. Writing it again fails for tags of
    a kind that Pillow does not expect, and a stranger's file may have any.
    """
    if isinstance(image, TiffImageFile):
        image.load_end = lambda: None  # type: ignore[method-assign]  # it calls `exif_transpose`
    image.load()  # some formats have their EXIF data behind their pixels
    try:
        tags: Any = image.tag_v2 if isinstance(image, TiffImageFile) else image.getexif()
        method = TURNS.get(tags.get(ORIENTATION))
    except Exception:
        return image
    return image if method is None else image.transpose(method)


def check_parts(file: bytes) -> None:
    """Raise ValueError for a file that would take minutes.

    Such are a JPEG of very many passes over all pixels, and a file of very many small parts that
    are each unpacked to a megabyte. Real pictures have a few of each.
    """
    is_jpeg = file.startswith(JPEG_START)
    parts = (b"\xff\xda", b"Exif\0\0") if is_jpeg else (b"iCCP", b"Exif\0\0")
    if any(has_many(file, part) for part in parts):
        raise ValueError("too many parts")


def admit(file: bytes, deadline: float, held: ExitStack) -> Image.Image:
    """Return what a file declares as soon as there is room for its pixels, which `held` then has.

    A JPEG says how large it is before any memory is taken for it. Other formats take memory when
    they are opened, so each of them has all the room for itself.
    """
    with room.enter(deadline):
        is_jpeg = file.startswith(JPEG_START)
        if not is_jpeg:
            held.enter_context(room.take(IMAGE_MAX_PIXELS, deadline))
        check_parts(file)
        image = open_picture(file)
        if image.width * image.height > IMAGE_MAX_PIXELS:
            raise RequestEntityTooLarge
        if is_jpeg:
            held.enter_context(room.take(image.width * image.height, deadline))
        return image


def decode(
    image: Image.Image, largest: tuple[int, int], exactly: bool, resampling: Image.Resampling
) -> Image.Image:
    """Return a picture as RGB, upright, on white and shrunk; raise what Pillow raises."""
    image = turn(image)
    deep = image.mode[0] in "IF"  # more than eight bits a value, of which Pillow keeps the lowest
    top = 65535 if image.mode.startswith("I;16") else image.getextrema()[1] if deep else 255
    factor = max(1, image.width / largest[0], image.height / largest[1])
    size = largest if exactly else (int(image.width / factor) or 1, int(image.height / factor) or 1)
    # Most models shrink a picture by leaving out pixels. Leaving them out first gives the same, and
    # then all that follows has few pixels: it takes several times their memory. Other models
    # average pixels, for which the colours must be right first.
    if resampling == Image.Resampling.NEAREST:
        image = image.resize(size, resampling)
    clear = image.info.get("transparency")
    if deep:
        values = np.nan_to_num(np.asarray(image, np.float32)) / max(top, 1e-9)
        if clear is not None:
            values[np.asarray(image) == clear] = 1  # white
        image = Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8))
    if isinstance(clear, tuple) and max(clear) > 255:  # Pillow keeps the upper eight of 16 bits
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        image = white
    return image.convert("RGB").resize(size, resampling)


def read_picture(
    file: bytes,
    size: tuple[int, int],
    deadline: float,
    exactly: bool = True,
    resampling: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    """Return a picture as RGB, upright and on white; raise Problem (413, 415, or 503).

    It has this (width, height), or at most this and its own proportions. A picture for which there
    is no room yet waits until the deadline, in seconds of `time.monotonic()`.
    """
    if len(file) > IMAGE_MAX_BYTES:
        raise RequestEntityTooLarge
    with ExitStack() as held:
        try:
            return decode(admit(file, deadline, held), size, exactly, resampling)
        except HTTPException:
            raise
        except Exception:  # broken files make Pillow raise many kinds of error, with their pixels
            start = file[:1024].lower()
    raise Problem(415, "not-a-picture", describe_start(start))


def describe_start(start: bytes) -> str:
    """Return a sentence about a file that cannot be read, judging by how it begins."""
    if not start:
        return "This file is empty."
    if name := next((name for name in STARTS if re.match(STARTS[name], start, re.S)), None):
        return f"This {name} file is damaged or incomplete: open it, save it, and send it again."
    names = (name for name, magic in OTHER_FORMATS.items() if re.match(magic, start, re.S))
    if (name := next(names, "This file")) == "HTML":
        return "This is a web page (HTML); give the link to the picture itself, or send its file."
    return f"{name} cannot be read as a picture; {', '.join(IMAGE_FORMATS)} can."


def read_pictures(
    files: list[File], preprocessor: Preprocessor, deadline: float
) -> list[Image.Image]:
    """Return the pictures of those files that hold one, resized for a model.

    In the list, each other file is replaced by its problem. If no file holds a picture, the first
    problem is raised.
    """
    size, resampling = preprocessor.target_size, preprocessor.resampling
    images = []
    for number, file in enumerate(files):
        if isinstance(file, bytes):
            try:
                images.append(read_picture(file, size, deadline, True, resampling))
            except HTTPException as error:
                if error.code == 503:  # the gateway has no time, whatever the file
                    raise
                files[number] = error.with_traceback(None)  # which leads to this list, and the file
    if not images:
        problems = [file for file in files if isinstance(file, HTTPException)]
        files.clear()  # it and the problem would keep one another, and the file, in memory
        raise problems.pop(0)
    return images


def make_preview(file: bytes, deadline: float) -> str:
    """Return a picture, at most 320 × 320, as a data URI: the website loads nothing from others."""
    image = read_picture(file, (640, 640), deadline, exactly=False)
    image.thumbnail((320, 320))
    image.save(stream := BytesIO(), "WEBP")
    return f"data:image/webp;base64,{b64encode(stream.getvalue()).decode()}"


def add_previews(answers: list[dict], files: list[File], deadline: float) -> None:
    """Add to each answer a small picture of what was read, for the website to show."""
    for answer, file in zip(answers, files, strict=True):
        if isinstance(file, bytes):
            answer["preview"] = make_preview(file, deadline)
