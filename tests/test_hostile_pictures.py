"""Picture files that strangers send: the right class, or a clear 413 or 415, and bounded memory.

All of them are made here, most from the drawn samples, whose classes the bundled model knows.
"""

import base64
import functools
import gc
import io
import itertools
import queue
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from helpers.basics import ROOT
from helpers.images import encode, turned
from helpers.servers import Server
from PIL import Image, ImageCms, ImageOps

import pictures
from description import Preprocessor

MAX_PIXELS, MAX_BYTES, BOUND = 4_000_000, 10_000_000, 20
MEMORY = MAX_PIXELS * 20 + 2 * MAX_BYTES  # 20 bytes a pixel: the same in several modes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SHOES = Image.open(ROOT / "notebooks/samples/shoes.png").convert("RGB")
DRESS = Image.open(ROOT / "notebooks/samples/dress.png").convert("RGB")
GREY, BLACK_AND_WHITE = SHOES.convert("L"), SHOES.convert("1", dither=Image.Dither.NONE)
NOISE = np.random.default_rng(1).bytes(8_000_000)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

Make = Callable[[], bytes]
CLASSIFIED: dict[str, Make] = {}  # files whose class must be found
REFUSED: dict[str, tuple[Make, set[int]]] = {}  # files that must be refused, and how
EITHER: dict[str, Make] = {}  # files that are broken, but may be read: both are right


def cut_out(image: Image.Image = SHOES) -> Image.Image:
    """The picture as RGBA, with everything that is nearly white made transparent black."""
    pixels = np.array(image.convert("RGBA"))
    pixels[pixels[..., :3].min(axis=2) > 235] = 0
    return Image.fromarray(pixels)


# Kinds of pixels ---------------------------------------------------------------------------------

ON_WHITE = Image.new("RGB", SHOES.size, "white")
ON_WHITE.paste(cut_out(), mask=cut_out())


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(image: Image.Image = SHOES, *chunks: bytes) -> bytes:
    """A PNG with these chunks after its header."""
    plain = encode(image, "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


def grey16_png(grey: Image.Image = GREY, *between: bytes) -> bytes:
    """Sixteen bits a pixel, big-endian, as scanners and microscopes write them."""
    rows = (np.asarray(grey, np.uint16) * 257).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", *grey.size, 16, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + b"".join(between)
    chunks += png_chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND")


def on_black(colour: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """The picture with another colour, by default black, in the place of white."""
    pixels = np.array(cut_out())
    pixels[pixels[..., 3] == 0] = (*colour, 0)
    return Image.fromarray(pixels[..., :3])


def rgb16_png(alpha: bool = False, image: Image.Image = SHOES, *between: bytes) -> bytes:
    image = cut_out() if alpha else image
    rows = (np.asarray(image, np.uint16) * 256).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", *image.size, 16, 6 if alpha else 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + b"".join(between)
    chunks += png_chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND")


def tiff(strip: bytes, size: tuple[int, int], bits=8, samples=3, photometric=2, **tags) -> bytes:
    """A TIFF of one uncompressed strip; further tags as ``_322=…``."""
    entries: dict[int, int | list[int]] = {
        **{256: size[0], 257: size[1], 258: [bits] * samples, 259: 1, 262: photometric},
        **{273: 8, 277: samples, 278: size[1], 279: len(strip)},
        **{int(name[1:]): value for name, value in tags.items()},
    }
    strip += b"\0" * (len(strip) % 2)
    directory, extra, at = b"", b"", 8 + len(strip) + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        values = value if isinstance(value, list) else [value]
        data = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            data, extra = struct.pack("<I", at + len(extra)), extra + data
        directory += struct.pack("<HHI", tag, 4, len(values)) + data
    header = b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip
    return header + struct.pack("<H", len(entries)) + directory + bytes(4) + extra


def palette(transparent: bool = False) -> Image.Image:
    image = (ON_WHITE if transparent else SHOES).quantize(64)
    if transparent:
        white = int(np.asarray(image)[0, 0])
        colours = np.array(image.getpalette()).reshape(-1, 3)
        colours[white] = 0  # black, were it not transparent
        image.putpalette(colours.ravel().tolist())
        image.info["transparency"] = white
    return image


def grey_scaled(kind: str, dtype: type, top: float) -> bytes:
    pixels = np.asarray(GREY, np.float64) / 255 * top
    return encode(Image.fromarray(pixels.astype(dtype)), kind)


def ycck_jpeg() -> bytes:
    """A CMYK JPEG as Photoshop writes it: its colours inverted and turned into YCC."""
    stored = [*ImageOps.invert(SHOES).convert("YCbCr").split(), Image.new("L", SHOES.size, 255)]
    inverted = Image.merge("CMYK", [ImageOps.invert(band) for band in stored])  # Pillow does so too
    plain = encode(inverted, "JPEG", quality=95, subsampling=0)
    at = plain.index(b"Adobe") + 11
    return plain[:at] + b"\2" + plain[at + 1 :]


def rle_bmp() -> bytes:
    """A BMP with 256 colours, compressed by run lengths."""
    image = SHOES.quantize(256, dither=Image.Dither.NONE)
    data = b""
    for row in np.asarray(image)[::-1].tolist():
        for half in (row[: len(row) // 2], row[len(row) // 2 :]):  # a run has 255 pixels at most
            for value, run in itertools.groupby(half):
                data += bytes([len([*run]), value])
        data += b"\0\0"
    data += b"\0\1"
    colours = np.resize(np.array(image.getpalette()), (256, 3))
    table = b"".join(bytes([int(b), int(g), int(r), 0]) for r, g, b in colours)
    header = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 14 + len(header) + len(table)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + table + data


def upside_down_bmp() -> bytes:
    plain = bytearray(encode(ImageOps.flip(SHOES), "BMP"))
    plain[22:26] = struct.pack("<i", -SHOES.height)
    return bytes(plain)


CLASSIFIED |= {
    **{f"{kind} RGB": partial(encode, SHOES, kind) for kind in FORMATS},
    **{f"{kind} L": partial(encode, GREY, kind) for kind in FORMATS},
    **{f"{k} 1": partial(encode, BLACK_AND_WHITE, k) for k in ("PNG", "GIF", "BMP", "TIFF")},
    **{f"{k} P": partial(encode, palette(), k) for k in ("PNG", "GIF", "BMP", "TIFF")},
    **{f"{k} RGBA": partial(encode, cut_out(), k) for k in ("PNG", "WEBP", "TIFF", "AVIF")},
    **{f"{k} P transparent": partial(encode, palette(True), k) for k in ("PNG", "GIF")},
    "WEBP lossless": lambda: encode(cut_out(), "WEBP", lossless=True),
    "PNG LA": lambda: encode(cut_out().convert("LA"), "PNG"),
    "PNG P with an alpha table": lambda: encode(cut_out().quantize(64), "PNG"),
    "PNG RGB with a transparent colour": lambda: png(SHOES, png_chunk(b"tRNS", bytes(6))),
    "PNG L with a transparent level": lambda: png(GREY, png_chunk(b"tRNS", bytes(2))),
    **{f"PNG P of {n} bits": partial(encode, SHOES.quantize(2**n), "PNG", bits=n) for n in (2, 4)},
    "PNG L of 16 bits": grey16_png,
    "PNG L of 16 bits with a transparent level": lambda: grey16_png(
        on_black().convert("L"), png_chunk(b"tRNS", bytes(2))
    ),
    "PNG RGB of 16 bits with a transparent colour": lambda: rgb16_png(
        False,
        on_black((18, 52, 86)),
        png_chunk(b"tRNS", struct.pack(">3H", 18 << 8, 52 << 8, 86 << 8)),
    ),
    "PNG L of 16 bits, Pillow's": lambda: grey_scaled("PNG", np.uint16, 65535),
    "PNG RGB of 16 bits": rgb16_png,
    "PNG RGBA of 16 bits": lambda: rgb16_png(alpha=True),
    "PNG compressed not at all": lambda: encode(SHOES, "PNG", compress_level=0),
    "TIFF L of 16 bits": lambda: grey_scaled("TIFF", np.uint16, 65535),
    "TIFF L of 16 bits, big-endian": lambda: encode(
        Image.fromarray((np.asarray(GREY, np.uint16) * 257).astype(">u2")), "TIFF"
    ),
    "TIFF L of 16 bits, LZW": lambda: encode(
        Image.fromarray(np.asarray(GREY, np.uint16) * 257), "TIFF", compression="tiff_lzw"
    ),
    "TIFF of 32-bit integers": lambda: grey_scaled("TIFF", np.int32, 2**31 - 1),
    "TIFF of 32-bit integers, small": lambda: grey_scaled("TIFF", np.int32, 255),
    "TIFF of floats to 1": lambda: grey_scaled("TIFF", np.float32, 1),
    "TIFF of floats to 255": lambda: grey_scaled("TIFF", np.float32, 255),
    "TIFF RGBa": lambda: tiff(cut_out().convert("RGBa").tobytes(), SHOES.size, samples=4, _338=1),
    "TIFF white is zero": lambda: tiff(
        ImageOps.invert(GREY).tobytes(), SHOES.size, samples=1, photometric=0
    ),
    **{
        f"TIFF {name}": partial(encode, SHOES, "TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd")
    },
    "TIFF in two pages": lambda: encode(
        SHOES, "TIFF", save_all=True, append_images=[DRESS], compression="tiff_lzw"
    ),
    "TIFF fax": lambda: encode(BLACK_AND_WHITE, "TIFF", compression="group4"),
    **{f"{k} CMYK": partial(encode, SHOES.convert("CMYK"), k) for k in ("JPEG", "TIFF")},
    "JPEG YCCK": ycck_jpeg,
    "JPEG progressive": lambda: encode(SHOES, "JPEG", progressive=True),
    **{f"JPEG {s}": partial(encode, SHOES, "JPEG", subsampling=s) for s in ("4:4:4", "4:2:0")},
    "JPEG of quality 100, RGB": lambda: encode(SHOES, "JPEG", keep_rgb=True, quality=100),
    "JPEG with restarts": lambda: encode(SHOES, "JPEG", restart_marker_rows=1),
    "BMP compressed": rle_bmp,
    "BMP upside down": upside_down_bmp,
}


# Turned, animated, and with much around them -----------------------------------------------------


def jpeg(*segments: bytes, image: Image.Image = SHOES, **options) -> bytes:
    """A JPEG with these segments, each a marker's number and its data, behind its start."""
    plain = encode(image, "JPEG", **options)
    parts = [b"\xff" + s[:1] + struct.pack(">H", len(s) + 1) + s[1:] for s in segments]
    return plain[:2] + b"".join(parts) + plain[2:]


def exif_data(*entries: bytes, count: int | None = None) -> bytes:
    directory = struct.pack("<H", len(entries) if count is None else count) + b"".join(entries)
    return b"\xe1Exif\0\0II*\0\x08\0\0\0" + directory + bytes(4)


def exif_entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


SMALL = SHOES.resize((12, 16))


def turned_with(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """A JPEG that a camera has turned, and that has one more tag; its value stands at byte 38."""
    entries = sorted([exif_entry(0x0112, 3, 1, 6), exif_entry(tag, kind, count, 38)], key=exif_tag)
    return jpeg(exif_data(*entries) + value, image=SHOES.transpose(Image.Transpose.ROTATE_90))


def exif_tag(entry: bytes) -> int:
    return int.from_bytes(entry[:2], "little")


def odd_exif(seed: int) -> bytes:
    """EXIF data that turns a picture, with up to five tags that are whatever chance makes them."""
    random, order = np.random.default_rng(seed), "<>"[seed % 2]
    tags = [0x0100, 0x0101, 0x0103, 0x010E, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x014A]
    tags += [
        0x0000,
        0x0111,
        0x02BC,
        0x8769,
        0x8825,
        0x927C,
        0x9286,
        0xA005,
        int(random.integers(65536)),
    ]
    turn = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, random.integers(1, 9), 0)
    entries, values, count = [turn], b"", random.integers(1, 6)
    for _ in range(count):
        at = random.choice([22 + 12 * count + len(values), random.integers(80)])
        value = random.choice([random.bytes(4), struct.pack(f"{order}I", at)])
        number = random.choice([0, 1, 1, 1, 2, 3, 20, 2**31, 2**32 - 1])
        head = struct.pack(f"{order}HHI", random.choice(tags), random.integers(14), number)
        entries, values = [*entries, head + value], values + random.bytes(random.choice([4, 8, 40]))
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}I", 8) + directory + values


def odd_exif_in(kind: str, seed: int) -> bytes:
    """A small picture of this kind with such data."""
    data = odd_exif(seed)
    if kind == "JPEG":
        return jpeg(b"\xe1Exif\0\0" + data, image=SMALL)
    if kind == "PNG":
        return png(SMALL, png_chunk(b"eXIf", data))
    if kind == "WEBP":
        return encode(SMALL, "WEBP", exif=b"Exif\0\0" + data)
    plain = avif_with_exif()
    at = plain.index(b"MM\0*")
    return plain[:at] + data[:600].ljust(600, b"\0") + plain[at + 600 :]


@functools.cache
def avif_with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 700
    return encode(SMALL, "AVIF", exif=exif, speed=10)


def animated(kind: str, count: int = 1, **options) -> bytes:
    return encode(SHOES, kind, save_all=True, append_images=[DRESS] * count, **options)


def many_frames_gif(count: int) -> bytes:
    """A GIF of the picture and then a great many frames of one pixel."""
    first = encode(SHOES, "GIF").removesuffix(b";")
    return first + b"\x2c\0\0\0\0\1\0\1\0\x80\0\0\0\xff\xff\xff\2\2\x44\1\0" * count + b";"


def small_in_large_gif() -> bytes:
    """A GIF whose one frame, partly transparent, is smaller than its screen."""
    middle = palette(transparent=True).crop((40, 40, SHOES.width - 40, SHOES.height - 40))
    plain = bytearray(encode(middle, "GIF", transparency=palette(True).info["transparency"]))
    plain[6:10] = struct.pack("<HH", *SHOES.size)
    at = plain.index(b"\x2c\0\0\0\0", 13 + 3 * 2 ** ((plain[10] & 7) + 1))
    plain[at + 1 : at + 5] = struct.pack("<HH", 40, 40)
    return bytes(plain)


CLASSIFIED |= {
    **{f"JPEG turned {n}": partial(turned, SHOES, n, "JPEG") for n in range(1, 9)},
    **{
        f"{k} turned {n}": partial(turned, SHOES, n, k)
        for k in ("PNG", "WEBP", "TIFF", "AVIF")
        for n in (3, 6, 7)
    },
    "JPEG turned 0": lambda: turned(SHOES, 0, "JPEG"),
    "JPEG turned 9": lambda: turned(SHOES, 9, "JPEG"),
    "JPEG turned by text": lambda: jpeg(exif_data(exif_entry(0x0112, 2, 2, 0x36))),
    "JPEG turned, its unit a fraction": lambda: turned_with(0x0128, 5, 1, bytes(8)),
    "JPEG turned, its width a fraction": lambda: turned_with(0x0100, 5, 1, b"\3\0\0\0\1\0\0\0"),
    "JPEG turned, its width a word": lambda: turned_with(0x0100, 2, 5, b"wide\0"),
    "JPEG turned, its software a fraction": lambda: turned_with(0x0131, 5, 1, bytes(8)),
    "JPEG, its resolution nothing": lambda: jpeg(
        exif_data(exif_entry(0x011A, 2, 1, 0), exif_entry(0x0128, 3, 1, 2))
    ),
    "TIFF turned, EXIF before its start": lambda: tiff(
        SHOES.transpose(Image.Transpose.ROTATE_90).tobytes(),
        SHOES.size[::-1],
        **{"_274": 6, "_34665": 2**32 - 1},
    ).replace(b"\x69\x87\4\0", b"\x69\x87\x09\0"),
    "JPEG, EXIF empty": lambda: jpeg(b"\xe1Exif\0\0"),
    "JPEG, EXIF noise": lambda: jpeg(b"\xe1Exif\0\0" + b"noise" * 99),
    "JPEG, EXIF cut": lambda: jpeg(exif_data(exif_entry(0x0112, 3, 1, 1), count=99)),
    "JPEG, EXIF pointing out": lambda: jpeg(exif_data(exif_entry(0x010E, 2, 2**32 - 1, 2**31))),
    "JPEG, EXIF pointing at itself": lambda: jpeg(exif_data(exif_entry(0x8769, 4, 1, 8))),
    "JPEG, EXIF of no known type": lambda: jpeg(exif_data(exif_entry(0x0112, 99, 1, 6))),
    "JPEG, EXIF of fractions by zero": lambda: jpeg(exif_data(exif_entry(0x011A, 5, 1, 0))),
    "JPEG, EXIF of 64 KB": lambda: jpeg(b"\xe1Exif\0\0" + b"MM\0*" + bytes(65500)),
    "JPEG, EXIF of 3 MB": lambda: jpeg(*[b"\xe1Exif\0\0" + bytes(65500)] * 48),
    "PNG, EXIF of 3 MB": lambda: png(SHOES, png_chunk(b"eXIf", b"MM\0*" + bytes(3_000_000))),
    "PNG, EXIF noise": lambda: png(SHOES, png_chunk(b"eXIf", b"noise")),
    "WEBP, EXIF noise": lambda: encode(SHOES, "WEBP", exif=b"Exif\0\0noise"),
    "JPEG, XMP of 64 KB": lambda: jpeg(b"\xe1http://ns.adobe.com/xap/1.0/\0" + b"<" * 65000),
    "JPEG, a profile": lambda: encode(SHOES, "JPEG", icc_profile=SRGB),
    "JPEG, a profile of noise": lambda: encode(SHOES, "JPEG", icc_profile=b"noise" * 50_000),
    "JPEG, a profile's part": lambda: jpeg(b"\xe2ICC_PROFILE\0\2\7" + SRGB),
    "PNG, a profile": lambda: encode(SHOES, "PNG", icc_profile=SRGB),
    "PNG, a profile of noise": lambda: encode(SHOES, "PNG", icc_profile=b"noise"),
    "WEBP, a profile": lambda: encode(SHOES, "WEBP", icc_profile=SRGB),
    "TIFF, a profile": lambda: encode(SHOES, "TIFF", icc_profile=SRGB),
    "AVIF, a profile": lambda: encode(SHOES, "AVIF", icc_profile=SRGB),
    "JPEG, a comment": lambda: jpeg(b"\xfe" + b"hello " * 9999),
    "JPEG, then garbage": lambda: encode(SHOES, "JPEG") + b"garbage" * 99,
    "JPEG, then a film": lambda: encode(SHOES, "JPEG") + NOISE,
    "PNG, then garbage": lambda: png() + b"garbage" * 99,
    "GIF, then garbage": lambda: encode(SHOES, "GIF") + b"garbage" * 99,
    "JPEG, two pictures (MPO)": lambda: encode(SHOES, "MPO", save_all=True, append_images=[DRESS]),
    **{f"{k} animated": partial(animated, k, duration=99) for k in ("GIF", "PNG", "WEBP", "AVIF")},
    "PNG animated, first frame apart": lambda: animated("PNG", 2, default_image=True),
    "GIF animated, dispose": lambda: animated("GIF", 2, disposal=2),
    "GIF of 100,000 frames": lambda: many_frames_gif(100_000),
    "GIF with a frame smaller than its screen": small_in_large_gif,
    "PNG as large as allowed": lambda: encode(SHOES.resize((1732, 2309)), "PNG"),
    "TIFF as large as allowed": lambda: encode(
        SHOES.resize((1732, 2309)), "TIFF", compression="tiff_lzw"
    ),
    "PNG with more data than pixels": lambda: png_with_data(SHOES, bytes(50_000_000)),
}


def png_with_data(image: Image.Image, more: bytes) -> bytes:
    lines = b"".join(b"\0" + row.tobytes() for row in np.asarray(image))
    header = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(lines + more, 1))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND")


# Bombs -------------------------------------------------------------------------------------------


def patched(plain: bytes, at: int, *replacement: bytes) -> bytes:
    new = b"".join(replacement)
    return plain[:at] + new + plain[at + len(new) :]


def png_of_size(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND")


def jpeg_of_size(width: int, height: int) -> bytes:
    plain = encode(SHOES, "JPEG")
    return patched(plain, plain.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def gif_of_size(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    plain = bytearray(encode(SHOES, "GIF"))
    plain[6:10] = struct.pack("<HH", *screen)
    at = plain.index(b"\x2c\0\0\0\0", 13 + 3 * 2 ** ((plain[10] & 7) + 1))
    plain[at + 5 : at + 9] = struct.pack("<HH", *frame)
    return bytes(plain)


def bmp_of_size(width: int, height: int, plain: bytes) -> bytes:
    return patched(plain, 18, struct.pack("<ii", width, height))


def webp_of_size(width: int, height: int) -> bytes:
    """A lossless WebP; width and height are 14 bits each, less one."""
    plain = encode(SHOES, "WEBP", lossless=True, exact=True)
    at = plain.index(b"VP8L") + 9
    old = struct.unpack("<I", plain[at : at + 4])[0]
    return patched(plain, at, struct.pack("<I", old >> 28 << 28 | (height - 1) << 14 | width - 1))


def webp_of_canvas(width: int, height: int) -> bytes:
    plain = animated("WEBP", duration=99)
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return patched(plain, plain.index(b"VP8X") + 12, size)


def avif_of_size(width: int, height: int) -> bytes:
    plain = encode(SHOES, "AVIF")
    return patched(plain, plain.index(b"ispe") + 8, struct.pack(">II", width, height))


def scans(count: int) -> bytes:
    """A progressive JPEG as large as allowed, with empty scans over all of it."""
    plain = encode(Image.new("RGB", (2000, 2000), "white"), "JPEG", progressive=True)
    return plain[:-2] + b"\xff\xda\0\x08\1\1\0\1\x3f\0" * count + plain[-2:]


def text_chunk(kind: bytes, size: int) -> bytes:
    packed = zlib.compress(bytes(size), 9)
    between = b"\0\0" if kind in (b"zTXt", b"iCCP") else b"\0\1\0\0\0"
    return png_chunk(kind, b"name" + between + packed)


TOO_LARGE, NO_PICTURE, BOTH = {413}, {415}, {413, 415}
STRIP = bytes(3 * 64 * 64)
REFUSED |= {
    "PNG a little too large": (lambda: encode(SHOES.resize((2001, 2000)), "PNG"), TOO_LARGE),
    "PNG of 2.5 gigapixels": (lambda: png_of_size(50_000, 50_000), TOO_LARGE),
    "PNG of 1 bit, 10 gigapixels": (lambda: png_of_size(100_000, 100_000, 1, 0), TOO_LARGE),
    "PNG of 16 bits, huge": (lambda: png_of_size(2**31 - 1, 2**31 - 1, 16, 6), BOTH),
    "PNG very wide": (lambda: png_of_size(2**31 - 1, 1), BOTH),
    "PNG very tall": (lambda: png_of_size(1, 2**31 - 1), BOTH),
    "JPEG of 4 gigapixels": (lambda: jpeg_of_size(65_500, 65_500), TOO_LARGE),
    "GIF with a huge screen": (lambda: gif_of_size((65_535, 65_535), SHOES.size), TOO_LARGE),
    "GIF with a huge frame": (lambda: gif_of_size((1, 1), (65_535, 65_535)), TOO_LARGE),
    "BMP huge": (lambda: bmp_of_size(60_000, 60_000, encode(SHOES, "BMP")), TOO_LARGE),
    "BMP huge, compressed": (lambda: bmp_of_size(60_000, 60_000, rle_bmp()), TOO_LARGE),
    "BMP huge, upside down": (lambda: bmp_of_size(60_000, -60_000, encode(SHOES, "BMP")), BOTH),
    "TIFF huge": (lambda: tiff(STRIP, (60_000, 60_000)), TOO_LARGE),
    "TIFF very huge": (lambda: tiff(STRIP, (2**32 - 1, 2**32 - 1)), BOTH),
    "TIFF huge, 1 bit": (lambda: tiff(STRIP, (2**17, 2**17), 1, 1, 1), TOO_LARGE),
    "TIFF with huge tiles": (
        lambda: tiff(STRIP, (64, 64), _259=8, _322=65_520, _323=65_520, _324=8, _325=len(STRIP)),
        BOTH,
    ),
    "WEBP of 268 megapixels": (lambda: webp_of_size(16_384, 16_384), BOTH),
    "WEBP with a huge canvas": (lambda: webp_of_canvas(2**14, 2**14), BOTH),
    "WEBP with the largest canvas": (lambda: webp_of_canvas(2**24, 2**8 - 1), BOTH),
    "AVIF of 4 gigapixels": (lambda: avif_of_size(2**16, 2**16), BOTH),
    "AVIF of 256 megapixels": (lambda: avif_of_size(2**14, 2**14), BOTH),
    "JPEG of 10,000 scans": (lambda: scans(10_000), NO_PICTURE),
    "JPEG of 900,000 scans": (lambda: scans(900_000), NO_PICTURE),
    "JPEG with too many EXIF parts": (lambda: jpeg(*[b"\xe1Exif\0\0x"] * 890_000), NO_PICTURE),
    "more bytes than allowed": (lambda: encode(SHOES, "JPEG") + bytes(MAX_BYTES), TOO_LARGE),
    "far more bytes than allowed": (lambda: encode(SHOES, "JPEG") + bytes(99_000_000), TOO_LARGE),
}
EITHER |= {
    "PNG text": lambda: png(SHOES, png_chunk(b"tEXt", b"name\0" + b"x" * 8_000_000)),
    "PNG zTXt bomb": lambda: png(SHOES, text_chunk(b"zTXt", 100_000_000)),
    "PNG iTXt bomb": lambda: png(SHOES, text_chunk(b"iTXt", 100_000_000)),
    "PNG iCCP bomb": lambda: png(SHOES, text_chunk(b"iCCP", 100_000_000)),
    "PNG of 300 text bombs": lambda: png(SHOES, *[text_chunk(b"zTXt", 1_000_000)] * 300),
    "PNG of 8,000 profile bombs": lambda: png(SHOES, *[text_chunk(b"iCCP", 1_000_000)] * 8000),
    "PNG of 800,000 chunks": lambda: png(SHOES, *[png_chunk(b"tEXt")] * 800_000),
    "JPEG of 2,000,000 comments": lambda: jpeg(*[b"\xfe"] * 2_000_000),
    "JPEG of 500,000 profile parts": lambda: jpeg(*[b"\xe2ICC_PROFILE\0\1\1"] * 500_000),
    "GIF with a comment of 9 MB": lambda: gif_comment(b"\xff" + b"x" * 255, 35_000),
    "GIF with a comment in 4,000,000 parts": lambda: gif_comment(b"\1x", 4_000_000),
    "TIFF, JPEG in it of 10,000 scans": lambda: tiff(
        scans(10_000), (2000, 2000), _259=7, photometric=6
    ),
    "TIFF, one strip for 2**32 rows": lambda: tiff(STRIP, (64, 64), _278=2**32 - 1),
    "TIFF, strip of 4 GB": lambda: tiff(STRIP, (64, 64), _279=2**32 - 1),
    "TIFF, strip beyond the end": lambda: tiff(STRIP, (64, 64), _273=2**31),
    "TIFF of 65,535 samples": lambda: tiff(STRIP, (64, 64), _277=65_535),
    "TIFF of 2**31 strips": lambda: tiff(STRIP, (64, 64), _278=1),
    "TIFF, a directory that is its own next": lambda: looping_tiff(),
    "TIFF LAB": lambda: encode(lab(), "TIFF"),
    "JPEG with another size in its EXIF": lambda: jpeg(exif_data(exif_entry(256, 4, 1, 2**31))),
    "JPEG arithmetic": lambda: encode(SHOES, "JPEG").replace(b"\xff\xc0", b"\xff\xc9"),
    "JPEG lossless": lambda: encode(SHOES, "JPEG").replace(b"\xff\xc0", b"\xff\xc3"),
    "JPEG of 12 bits": lambda: encode(SHOES, "JPEG").replace(
        b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"
    ),
    "PNG without data": lambda: png_of_size(64, 64)[:33] + png_chunk(b"IEND"),
    "PNG with a wrong sum": lambda: patched(png(), 29, b"0000"),
    "PNG with wrong sums of data": lambda: png().replace(b"IDAT", b"IDAU", 1),
}


def gif_comment(block: bytes, count: int) -> bytes:
    plain = encode(SHOES, "GIF")
    start = 13 + 3 * 2 ** ((plain[10] & 7) + 1)
    return plain[:start] + b"\x21\xfe" + block * count + b"\0" + plain[start:]


def looping_tiff() -> bytes:
    plain = tiff(STRIP, (64, 64))
    return patched(plain, len(plain) - 4 - 12, struct.pack("<I", 8 + len(STRIP)))


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    result = ImageCms.profileToProfile(SHOES, *profiles, outputMode="LAB")
    assert result is not None
    return result


# No pictures, other pictures, parts of pictures --------------------------------------------------

REFUSED |= {
    name: (partial(bytes, content), NO_PICTURE)
    for name, content in {
        "nothing": b"",
        "a byte": b"\xff",
        "zeros": bytes(5000),
        "noise": NOISE[:5000],
        "text": b"a dress, believe me",
        "HTML": b"<!DOCTYPE html>\n<html><body><img src='dress.jpg'></body></html>",
        "HTML in capitals": b"<HTML><BODY>404</BODY></HTML>",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "SVG with a declaration": b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>",
        "SVG that asks for a file": b"<!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><svg>&x;",
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n",
        "ZIP": b"PK\3\4" + bytes(99),
        "gzip": b"\x1f\x8b\x08" + bytes(99),
        "JSON": b'{"url": "http://127.0.0.1/"}',
        "MP4": bytes(3) + b"\x18ftypmp42" + bytes(99),
        "HEIC": bytes(3) + b"\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        **{
            f"HEIC of brand {brand}": bytes(3) + b"\x18ftyp" + brand.encode() + bytes(99)
            for brand in ("heix", "hevc", "hevx", "heim", "msf1", "mif2", "miaf")
        },
        "HTML without its tag": b"\n<!-- " + b"hello " * 99 + b"--><!DOCTYPE HTML>\n<title>404",
        "HTML, a part of it": b"<div><svg></svg></div>",
        "comments, very many": b"<!---->" * 9999,
        "HEIC as HEIF": bytes(3) + b"\x18ftypmif1\0\0\0\0mif1heic" + bytes(99),
        "JPEG XL": b"\xff\x0a" + bytes(99),
        "JPEG XL in a container": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99),
        "PSD": b"8BPS\0\1" + bytes(99),
        "XBM": b"#define im_width 9\n#define im_height 9\nstatic char im_bits[] = {0};",
    }.items()
}
OTHER_FORMATS = ("ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "EPS", "ICNS", "DDS", "QOI")
REFUSED |= {kind: (partial(encode, SHOES, kind), NO_PICTURE) for kind in OTHER_FORMATS}
NAMED = ("HTML", "SVG", "PDF", "HEIC", "JPEG XL", "PSD", "ICO")


@functools.cache
def whole(kind: str) -> bytes:
    return encode(SHOES.resize((120, 160)), kind)


def part_of(kind: str, part: float) -> bytes:
    return whole(kind)[: int(len(whole(kind)) * part)]


EITHER |= {
    f"{kind}, {part:.1%} of it": partial(part_of, kind, part)
    for kind in FORMATS
    for part in (0.005, 0.02, 0.1, 0.5, 0.9, 0.999)
}
READ: dict[str, Make] = {
    f"{kind} of {size[0]} × {size[1]}": partial(encode, Image.new("RGB", size), kind)
    for kind in FORMATS
    for size in ((1, 1), (1, 9000), (9000, 1))
}


def spoil(plain: bytes, seed: int) -> bytes:
    """Change a few bytes of a file, most of them near its start."""
    random, spoilt = np.random.default_rng(seed), bytearray(plain)
    for _ in range(random.integers(1, 12)):
        at = int(
            random.choice([random.integers(len(plain)), random.integers(min(200, len(plain)))])
        )
        spoilt[at] = random.integers(256)
    return bytes(spoilt)


# The tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway(start_gateway, clothing_server) -> Server:
    return start_gateway(
        clothing_server.grpc,
        IMAGE_MAX_PIXELS=str(MAX_PIXELS),
        IMAGE_MAX_BYTES=str(MAX_BYTES),
    )


@pytest.fixture(scope="module")
def worker(gateway: Server) -> psutil.Process:
    return psutil.Process(gateway.process.pid).children()[0]


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(gateway: Server, worker: psutil.Process) -> Iterator[None]:
    """The worker's peak, over all tests here, is what it needs anyway and a picture's pixels."""
    send(gateway, encode(SHOES, "PNG"))
    before = worker.memory_info().rss
    yield
    status = Path(f"/proc/{worker.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert peak - before < MEMORY, f"{before:,} bytes became {peak:,}"


def send(gateway: Server, content: bytes, name: str = "picture.jpg", **fields: str) -> dict:
    """Upload a file and return the answer with its status, once it was a right one or a problem."""
    start = time.monotonic()
    files = {"file": (name, content, "image/jpeg")}
    response = requests.post(f"{gateway.http}/predict", files=files, data=fields, timeout=120)
    assert time.monotonic() - start < BOUND
    answer = response.json()
    if response.status_code != 200:
        assert response.headers["Content-Type"] == "application/problem+json"
        cause = {413: "request-entity-too-large", 415: "not-a-picture"}[response.status_code]
        assert answer["type"].endswith(f":{cause}")
        if response.status_code == 415:
            known = (
                "empty",
                "(HTML)",
                *(f"{kind} file is damaged or incomplete" for kind in FORMATS),
            )
            says = (word in answer["detail"] for word in known)
            assert any(says) or all(kind in answer["detail"] for kind in FORMATS)
    return {"status": response.status_code, **answer}


def assert_shoes(answer: dict) -> None:
    """Check the class, and that what was read looks like the picture, upright and on white."""
    assert answer.get("top_class") == "shoes", answer
    scheme, _, data = answer["preview"].partition(";base64,")
    assert scheme in ("data:image/webp", "data:image/jpeg")
    preview = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
    assert max(preview.size) <= 320
    assert preview.width / preview.height == pytest.approx(SHOES.width / SHOES.height, abs=0.1)
    seen, *expected = (
        np.asarray(image.convert("L").resize((12, 16), Image.Resampling.BOX), float)
        for image in (preview, GREY, BLACK_AND_WHITE)
    )
    assert min(np.abs(seen - one).mean() for one in expected) < 16


@pytest.mark.parametrize("name", CLASSIFIED)
def test_the_class_is_found(gateway, name):
    assert_shoes(send(gateway, CLASSIFIED[name](), preview="yes"))


LEVELS = Image.fromarray(np.array([[18, 128]], np.uint8))
COLOURS = Image.fromarray(np.array([[(18, 52, 86), (200, 100, 50)]], np.uint8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: png(LEVELS, png_chunk(b"tRNS", struct.pack(">H", 18))),
        lambda: png(COLOURS, png_chunk(b"tRNS", struct.pack(">3H", 18, 52, 86))),
        lambda: grey16_png(LEVELS, png_chunk(b"tRNS", struct.pack(">H", 18 * 257))),
        lambda: rgb16_png(
            False, COLOURS, png_chunk(b"tRNS", struct.pack(">3H", 18 << 8, 52 << 8, 86 << 8))
        ),
    ],
    ids=["L", "RGB", "L of 16 bits", "RGB of 16 bits"],
)
def test_what_a_png_calls_transparent_is_white(make):
    """The left one of two pixels is dark, were it not transparent."""
    picture = pictures.read_picture(make(), (2, 1), time.monotonic() + 60)
    left, right = np.asarray(picture)[0].tolist()
    assert left == [255, 255, 255] and right in ([128] * 3, [200, 100, 50])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(gateway, name):
    make, statuses = REFUSED[name]
    answer = send(gateway, make())
    assert answer["status"] in statuses, answer
    for kind in NAMED:
        if name.startswith(kind):
            assert kind in answer["detail"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_whose_end_is_missing(gateway, kind):
    """It is read as far as it goes, or the sentence says what is wrong with it."""
    for left in (0.999, 0.5, 0.1):
        answer = send(gateway, part_of(kind, left))
        if answer["status"] != 200:
            assert f"This {kind} file is damaged or incomplete" in answer["detail"]


@pytest.mark.parametrize("name", EITHER)
def test_read_or_refused(gateway, name):
    send(gateway, EITHER[name]())


@pytest.mark.parametrize("name", READ)
def test_extreme_shapes(gateway, name):
    answer = send(gateway, READ[name](), preview="yes")
    assert answer["status"] == 200
    assert sum(answer["predictions"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_spoilt_files(gateway, kind):
    for seed in range(25):
        send(gateway, spoil(whole(kind), seed), preview="yes")


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "count"), dict(JPEG=8000, PNG=1000, WEBP=500, AVIF=500).items())
def test_odd_exif_data_is_no_reason_to_refuse(kind, count):
    for seed in range(count):
        file = odd_exif_in(kind, seed)
        picture = pictures.read_picture(file, (12, 12), time.monotonic() + 60, exactly=False)
        assert picture.size in ((9, 12), (12, 9)), seed


@pytest.mark.parametrize(
    "name", ["shoes.txt", "shoes.svg", "../../etc/passwd", "", "☃.exe", "a\0b"]
)
def test_the_file_name_means_nothing(gateway, name):
    for kind in ("JPEG", "PNG", "AVIF"):
        assert send(gateway, encode(SHOES, kind), name or "x")["top_class"] == "shoes"


@pytest.mark.parametrize(
    ("kind", "side", "options"),
    [("PNG", 2000, {"compress_level": 1}), ("JPEG", 1400, {"quality": 60})],
)
def test_many_large_pictures_at_once(gateway, kind, side, options):
    """The memory that they take, which bounded_memory looks at, is that of the largest one."""
    large = encode(cut_out().convert("RGB").resize((side, side)), kind, **options)
    with ThreadPoolExecutor(8) as clients:
        statuses = [*clients.map(lambda _: send(gateway, large)["status"], range(8))]
    assert statuses == [200] * 8


def test_small_pictures_have_room_side_by_side_and_do_not_overtake_a_large_one():
    room, soon = pictures.Room(100), time.monotonic() + 0.05
    later = time.monotonic() + 20
    took: queue.SimpleQueue[str] = queue.SimpleQueue()

    def large():
        with ExitStack() as held:
            with room.enter(later):
                took.put("entered")
                held.enter_context(room.take(90, later))
            took.put("has room")

    with ThreadPoolExecutor(1) as other:
        with room.take(40, later), room.take(40, later):
            other.submit(large)
            assert took.get(timeout=20) == "entered"
            with pytest.raises(pictures.Problem, match="Too many large"), room.enter(soon):
                pass
            assert room.left == 20 and took.empty()
        assert took.get(timeout=20) == "has room"
    assert room.left == 100
    with room.take(101, soon):  # one that may be larger has all of it
        assert room.left == 0
        with pytest.raises(pictures.Problem), room.take(1, soon):
            pass
    assert room.left == 100


def test_files_that_cannot_be_read_are_forgotten_with_their_answer():
    """At once, and not when Python next looks for circles: before that, many more may come."""
    preprocessor = Preprocessor((64, 64), "xception", "nearest")
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(3):
            files: list[pictures.File] = [b"\xff\xd8\xff\xe0" + bytes(5_000_000)]
            with suppress(pictures.Problem):
                pictures.read_pictures(files, preprocessor, time.monotonic() + 20)
        del files
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 1_000_000


def test_corpus_is_large_enough():
    assert len(CLASSIFIED) + len(REFUSED) + len(EITHER) + len(READ) >= 80
