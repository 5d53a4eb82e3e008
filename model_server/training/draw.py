"""Draw the sample pictures: ten kinds of clothing, shaded, on plain backgrounds.

    .venv/bin/python model_server/training/draw.py

writes ``<class>.png`` for each class to ``notebooks/samples/``. A picture depends on its class and
its seed alone. Seeds below 1,000 belong to the samples. Training draws its own variations with
seeds from 1,000 on, and never sees the samples.
"""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ROOT / "model_server/classes.txt"
SAMPLES = ROOT / "notebooks/samples"
FINER = 2  # times larger than the picture; reducing the drawing smooths every edge

Points = list[tuple[float, float]]


def curve(points: Points, closed: bool = True, steps: int = 8) -> Points:
    """Catmull-Rom spline through ``points``; a point given twice stays a sharp corner."""
    p = np.array(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2)
        + 0.5 * (3 * b - a - 3 * c + d) * t**3
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
        if not np.array_equal(b, c)
    ]
    return [tuple(point) for point in np.concatenate(pieces)]


def mirrored(half: Points) -> Points:
    """The outline whose right half runs from top to bottom through ``half``."""
    return half + [(-x, y) for x, y in reversed(half)]


class Drawing:
    """A canvas in garment units: x and y from the middle, one unit is a third of the width."""

    def __init__(self, rng: np.random.Generator, tilt: float, width: int):
        self.rng = rng
        self.size = (width * FINER, width * FINER * 4 // 3)
        self.scale = self.size[0] / 3 * rng.uniform(0.98, 1.14)
        self.middle = np.array(self.size) / 2 + rng.uniform(-0.04, 0.04, 2) * self.size[0]
        angle = np.deg2rad(rng.normal(0, tilt))
        self.turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.y, self.x = np.mgrid[0 : self.size[1], 0 : self.size[0]].astype(np.float32)
        paper = np.array(tint(rng, lightness=(0.72, 0.97), saturation=(0.0, 0.25)))
        light = 1.04 - 0.1 * self.y / self.size[1] - 0.05 * self.x / self.size[0]
        self.pixels = (paper * light[..., None]).astype(np.float32)

    def place(self, points: Points) -> Points:
        """Garment units to pixels."""
        placed = np.array(points) * self.scale @ self.turn.T + self.middle
        return [tuple(point) for point in placed]

    def mask(self, points: Points, blur: float = 0.0) -> np.ndarray:
        """Coverage 0…1 of a filled outline, its edge blurred by so many garment units."""
        image = Image.new("L", self.size)
        ImageDraw.Draw(image).polygon(self.place(points), fill=255)
        return soften(image, blur * self.scale)

    def blend(self, mask: np.ndarray, color) -> None:
        """Lay ``color`` (0…255, one or one a pixel) over the canvas where ``mask`` covers it."""
        self.pixels += mask[..., None] * (np.asarray(color, np.float32) - self.pixels)

    def shadow(self, points: Points) -> None:
        """The soft shadow that the shape casts on the paper behind it."""
        moved = [(x + 0.03, y + 0.05) for x, y in points]
        self.blend(self.mask(moved, blur=0.05) * 0.38, (40, 38, 45))

    def cloth(self, points: Points, color, pattern: str = "plain", shadow: bool = True) -> None:
        """A piece of cloth: shadow, colour, light, folds, pattern and a darker rim."""
        if shadow:
            self.shadow(points)
        inside = self.mask(points)
        placed = np.array(self.place(points))
        left, right = placed[:, 0].min(), placed[:, 0].max()
        across = (self.x - left) / max(right - left, 1)
        light = 1.06 - 0.5 * (across - 0.42) ** 2 + self.folds(across)
        rim = 1 - np.clip(self.mask(points, blur=0.035) * 2 - 1, 0, 1)
        surface = self.pattern(np.array(color, np.float32), pattern, across)
        self.blend(inside, np.clip(surface * (light - 0.3 * rim)[..., None], 0, 255))

    def folds(self, across: np.ndarray) -> np.ndarray:
        """Long soft folds of cloth: a few slanted waves of light, about ± 5 %."""
        down = self.y / self.size[1]
        waves = np.zeros_like(across)
        for _ in range(3):
            turns, slant, phase = (
                self.rng.uniform(1, 5),
                self.rng.uniform(-6, 6),
                self.rng.uniform(0, 6),
            )
            waves += np.sin(turns * 6.3 * across + slant * down + phase)
        return 0.02 * waves

    def pattern(self, color: np.ndarray, pattern: str, across: np.ndarray) -> np.ndarray:
        """The cloth's own colours, ``[height, width, 3]``: plain, striped, checked or dotted."""
        unit, second = self.scale * 0.14, np.clip(color * 0.62 + 20, 0, 255)
        if color.mean() < 110:
            second = np.clip(color * 0.7 + 95, 0, 255)
        rows, columns = self.y % unit < unit * 0.4, self.x % unit < unit * 0.4
        dots = np.hypot(self.y % unit - unit / 2, self.x % unit - unit / 2) < unit * 0.2
        where = {
            "plain": np.zeros_like(across),
            "stripes": rows * 1.0,
            "checks": rows * 0.5 + columns * 0.5,
            "dots": dots * 1.0,
        }[pattern]
        return color + where[..., None] * (second - color)

    def line(self, points: Points, color, width: float = 0.012, strength: float = 0.8) -> None:
        """A seam, a crease or an edge along ``points``, ``width`` in garment units."""
        image = Image.new("L", self.size)
        pixels = max(round(width * self.scale), 1)
        ImageDraw.Draw(image).line(self.place(points), fill=255, width=pixels, joint="curve")
        self.blend(soften(image, 1.0) * strength, color)

    def disc(self, x: float, y: float, radius: float, color) -> None:
        """A button, a rivet or an eyelet."""
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ring = [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]
        self.blend(self.mask(ring), color)

    def image(self) -> Image.Image:
        """The finished picture, RGB."""
        pixels = np.clip(self.pixels, 0, 255)
        large = Image.fromarray(pixels.astype(np.uint8))
        return large.reduce(FINER)


def soften(image: Image.Image, radius: float) -> np.ndarray:
    """A mask image as coverage 0…1, blurred by ``radius`` pixels (at a quarter size when large)."""
    if radius > 8:
        small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BOX)
        image = small.filter(ImageFilter.GaussianBlur(radius / 4)).resize(image.size)
    elif radius > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32) / 255


def tint(rng: np.random.Generator, lightness=(0.2, 0.9), saturation=(0.05, 0.8)) -> tuple:
    """A random colour, 0…255 a channel."""
    hls = rng.uniform(), rng.uniform(*lightness), rng.uniform(*saturation)
    return tuple(255 * channel for channel in colorsys.hls_to_rgb(*hls))


def shade(color, factor: float) -> tuple:
    """The same colour darker (below 1) or lighter (above 1)."""
    return tuple(np.clip(np.array(color) * factor, 0, 255))


def top(d: Drawing, color, pattern: str, sleeve: float, width: float, hem: float) -> None:
    """A body with two sleeves: the base of t-shirt, longsleeve, shirt and outwear."""
    shoulder, neck = 0.62 * width + 0.12, 0.25
    spread = d.rng.uniform(0.18, 0.42) if sleeve > 0.6 else d.rng.uniform(0.5, 0.85)
    cuff = 0.13 if sleeve > 0.6 else 0.21
    for side in (-1, 1):
        along = np.array([np.sin(spread), np.cos(spread)]) * sleeve
        across = np.array([np.cos(spread), -np.sin(spread)])
        start, end = np.array([shoulder, -0.86]), np.array([shoulder - 0.04, -0.78]) + along
        arm = [
            (shoulder - 0.2, -0.93),
            (shoulder - 0.02, -0.88),
            tuple((start + end) / 2 + across * 0.12),
            *[tuple(end + across * cuff)] * 2,
            *[tuple(end - across * cuff * 0.9)] * 2,
            (0.6 * width, -0.38),
            (0.45 * width, -0.45),
        ]
        d.cloth(curve([(side * x, y) for x, y in arm]), shade(color, 0.95), pattern)
        hem_line = [
            end + across * (cuff - 0.02) - along * 0.06,
            end - across * cuff * 0.86 - along * 0.06,
        ]
        d.line([(side * x, y) for x, y in hem_line], shade(color, 0.65))
    body = [
        (neck, -1.02),
        (neck, -1.02),
        (shoulder - 0.04, -0.9),
        (0.66 * width, -0.5),
        (0.62 * width, 0.1),
        (0.64 * width, hem),
        (0.64 * width, hem),
    ]
    d.cloth(curve(mirrored(body)), color, pattern)


def neckline(d: Drawing, color, depth: float, vee: bool = False) -> None:
    """The opening at the neck, with the inside of the back and a ribbed collar."""
    bottom = [(0.0, -1.02 + depth)] * (2 if vee else 1)
    opening = curve(
        [
            (-0.25, -1.03),
            (-0.25, -1.03),
            (-0.17, -1.02 + depth * 0.75),
            *bottom,
            (0.17, -1.02 + depth * 0.75),
            (0.25, -1.03),
            (0.25, -1.03),
            (0.0, -0.98),
        ]
    )
    d.blend(d.mask(opening), shade(color, 0.5))
    rib = curve(
        [
            (-0.26, -1.02),
            (-0.18, -1.02 + depth * 0.78),
            *bottom,
            (0.18, -1.02 + depth * 0.78),
            (0.26, -1.02),
        ],
        closed=False,
    )
    d.line(rib, shade(color, 0.8), width=0.05, strength=1.0)
    d.line(rib, shade(color, 0.6), width=0.01)


def t_shirt(d: Drawing, color, pattern: str) -> None:
    """Short sleeves, a round or V neck, sometimes a badge on the chest."""
    hem = d.rng.uniform(0.75, 1.0)
    top(d, color, pattern, sleeve=d.rng.uniform(0.3, 0.46), width=d.rng.uniform(0.92, 1.1), hem=hem)
    neckline(d, color, d.rng.uniform(0.16, 0.3), vee=d.rng.uniform() < 0.25)
    d.line([(-0.6, hem - 0.06), (0.6, hem - 0.06)], shade(color, 0.72), width=0.008)
    if d.rng.uniform() < 0.35:
        print_on_chest(d)


def print_on_chest(d: Drawing) -> None:
    """A simple printed badge."""
    ink, y = tint(d.rng), d.rng.uniform(-0.45, -0.2)
    if d.rng.uniform() < 0.5:
        d.disc(0, y, 0.2, ink)
        d.disc(0, y, 0.12, tint(d.rng))
    else:
        d.blend(
            d.mask([(-0.26, y - 0.07), (0.26, y - 0.07), (0.26, y + 0.07), (-0.26, y + 0.07)]), ink
        )


def longsleeve(d: Drawing, color, pattern: str) -> None:
    """Long sleeves and a plain neck."""
    hem = d.rng.uniform(0.65, 0.9)
    top(d, color, pattern, sleeve=d.rng.uniform(1.25, 1.5), width=d.rng.uniform(0.85, 1.0), hem=hem)
    neckline(d, color, d.rng.uniform(0.12, 0.26), vee=d.rng.uniform() < 0.2)
    d.line([(-0.56, hem - 0.1), (0.56, hem - 0.1)], shade(color, 0.68), width=0.01)


def shirt(d: Drawing, color, pattern: str) -> None:
    """Collar, button placket, often a pocket; sleeves short or long."""
    hem, short = d.rng.uniform(0.8, 1.0), d.rng.uniform() < 0.4
    top(
        d,
        color,
        pattern,
        sleeve=0.5 if short else d.rng.uniform(1.2, 1.45),
        width=d.rng.uniform(0.88, 1.02),
        hem=hem,
    )
    dark, button = shade(color, 0.6), tint(d.rng, lightness=(0.85, 0.97), saturation=(0, 0.2))
    d.blend(
        d.mask(curve([(-0.2, -1.06), (0.2, -1.06), (0.0, -0.84), (0.0, -0.84)])), shade(color, 0.45)
    )
    for x in (-0.055, 0.055):
        d.line([(x, -0.84), (x, hem - 0.02)], dark, width=0.01)
    for y in np.arange(-0.72, hem - 0.1, 0.23):
        d.disc(0, y, 0.03, dark)
        d.disc(0, y, 0.023, button)
    for side in (-1, 1):
        collar = [
            (side * 0.24, -1.08),
            (side * 0.33, -0.98),
            (side * 0.2, -0.72),
            (0.0, -0.87),
            (side * 0.16, -1.04),
        ]
        d.cloth(collar, shade(color, 1.08), pattern if pattern == "checks" else "plain")
        d.line([*collar, collar[0]], dark, width=0.008)
    if d.rng.uniform() < 0.7:
        pocket = [
            (0.17, -0.5),
            (0.45, -0.5),
            (0.45, -0.2),
            (0.31, -0.13),
            (0.17, -0.2),
            (0.17, -0.5),
        ]
        d.line(pocket, dark, width=0.009)


def outwear(d: Drawing, color, pattern: str) -> None:
    """A jacket worn open: lapels or a hood, lining, pockets, sometimes quilted."""
    hem, width = d.rng.uniform(0.75, 1.1), d.rng.uniform(1.0, 1.12)
    hooded = d.rng.uniform() < 0.4
    if hooded:
        d.cloth(
            curve(mirrored([(0.0, -1.3), (0.3, -1.22), (0.4, -0.98), (0.3, -0.86)])),
            shade(color, 0.8),
        )
    top(d, color, "plain", sleeve=d.rng.uniform(1.25, 1.45), width=width, hem=hem)
    dark, lining = shade(color, 0.5), tint(d.rng, lightness=(0.25, 0.75), saturation=(0, 0.4))
    gap = d.rng.uniform(0.05, 0.16)
    d.blend(
        d.mask(
            [
                (-0.22, -1.05),
                (0.22, -1.05),
                (gap, -0.55),
                (gap * 1.4, hem),
                (-gap * 1.4, hem),
                (-gap, -0.55),
            ]
        ),
        shade(lining, 0.8),
    )
    for side in (-1, 1):
        lapel = [
            (side * 0.22, -1.08),
            (side * 0.36, -0.96),
            (side * 0.4, -0.7),
            (side * gap, -0.3),
            (side * (gap + 0.01), -0.62),
        ]
        if hooded:
            lapel = [
                (side * 0.2, -1.02),
                (side * 0.32, -0.95),
                (side * (gap + 0.08), -0.72),
                (side * gap, -0.75),
            ]
        d.cloth(lapel, shade(color, 1.15))
        d.line([*lapel, lapel[0]], dark, width=0.012)
        d.line([(side * gap, -0.5), (side * gap * 1.4, hem)], dark, width=0.022)
        slant = [(side * 0.3, 0.2), (side * 0.52, 0.42)]
        d.line(slant, dark, width=0.035)
        d.line([(side * 0.2, hem - 0.08), (side * 0.66, hem - 0.08)], dark, width=0.01)
    for y in np.arange(-0.3, hem - 0.2, 0.3):
        d.disc(gap + 0.07, y, 0.035, dark)
    if hooded or d.rng.uniform() < 0.3:
        for y in np.arange(-0.5, hem - 0.1, 0.28):
            for side in (-1, 1):
                d.line(
                    [(side * (gap + 0.02), y), (side * 0.64, y + 0.02)],
                    shade(color, 0.62),
                    width=0.014,
                )


def dress(d: Drawing, color, pattern: str) -> None:
    """Bodice, waist and a flared skirt in one piece."""
    waist, flare, hem = (
        d.rng.uniform(0.36, 0.44),
        d.rng.uniform(0.7, 1.0),
        d.rng.uniform(1.15, 1.35),
    )
    strap = d.rng.uniform(0.3, 0.42)
    sleeved = d.rng.uniform() < 0.35
    if sleeved:
        for side in (-1, 1):
            arm = [
                (side * strap, -1.12),
                (side * (strap + 0.36), -0.82),
                (side * (strap + 0.26), -0.66),
                (side * 0.46, -0.78),
            ]
            d.cloth(curve(arm), shade(color, 0.95), pattern)
    body = [
        (strap - 0.13, -1.15),
        (strap - 0.13, -1.15),
        (strap, -1.15),
        (strap, -1.15),
        (0.5 if sleeved else 0.46, -0.72),
        (waist, -0.2),
        (waist + 0.12, 0.1),
        (flare * 0.85, 0.8),
        (flare, hem),
        (flare, hem),
        (0.0, hem + 0.06),
    ]
    d.cloth(curve(mirrored(body[:-1])), color, pattern)
    scoop = curve(
        [
            (-strap + 0.12, -1.17),
            (-strap + 0.12, -1.17),
            (-0.16, -0.86),
            (0.16, -0.86),
            (strap - 0.12, -1.17),
            (strap - 0.12, -1.17),
        ]
    )
    d.blend(d.mask(scoop), shade(color, 0.5))
    d.line([(-waist, -0.2), (0, -0.17), (waist, -0.2)], shade(color, 0.6), width=0.06, strength=0.7)
    for x in np.linspace(-0.8, 0.8, 7):
        d.line(
            [(x * waist * 0.8, -0.1), (x * flare * 0.9, hem - 0.05)], shade(color, 0.75), 0.012, 0.5
        )


def skirt(d: Drawing, color, pattern: str) -> None:
    """Waistband and pleats."""
    waist, flare = d.rng.uniform(0.4, 0.5), d.rng.uniform(0.66, 1.05)
    hem = d.rng.uniform(0.5, 1.1)
    body = [
        (waist, -0.7),
        (waist, -0.7),
        (waist + 0.12, -0.35),
        (flare * 0.93, hem - 0.3),
        (flare, hem),
        (flare, hem),
    ]
    d.cloth(curve(mirrored(body)), color, pattern)
    for x in np.linspace(-0.9, 0.9, int(d.rng.integers(5, 12))):
        d.line([(x * waist, -0.55), (x * flare, hem - 0.03)], shade(color, 0.68), 0.014, 0.6)
    band = [(-waist, -0.82), (waist, -0.82), (waist + 0.02, -0.66), (-waist - 0.02, -0.66)]
    d.cloth(band, shade(color, 0.82))


def legs(
    d: Drawing, color, pattern: str, length: float, hip: float, ankle: float, gap: float
) -> None:
    """Two legs from one waistband: the base of pants and shorts."""
    start = -1.15 if length > 1 else -0.75
    crotch, end = start + 0.72, start + 0.72 + length
    outline = [
        *[(hip - 0.1, start)] * 2,
        (hip, start + 0.4),
        (gap + ankle * 2 + (hip - gap - ankle * 2) * 0.4, crotch + length * 0.5),
        *[(gap + ankle * 2, end)] * 2,
        *[(gap, end)] * 2,
        (gap * 0.6 + 0.04, crotch + length * 0.4),
        *[(0.0, crotch)] * 1,
    ]
    d.cloth(curve(mirrored(outline)), color, pattern)
    dark = shade(color, 0.55)
    d.line([(0, start), (0, crotch)], dark, width=0.014)
    d.line(
        curve([(0.1, start + 0.12), (0.11, start + 0.35), (0.0, start + 0.5)], closed=False),
        dark,
        0.009,
    )
    d.cloth(
        [
            (-hip + 0.1, start - 0.06),
            (hip - 0.1, start - 0.06),
            (hip - 0.09, start + 0.07),
            (-hip + 0.09, start + 0.07),
        ],
        shade(color, 0.85),
    )
    d.disc(0.0, start, 0.035, shade(color, 1.5))
    for side in (-1, 1):
        d.line(
            curve(
                [
                    (side * (hip - 0.32), start + 0.08),
                    (side * (hip - 0.27), start + 0.24),
                    (side * (hip - 0.02), start + 0.3),
                ],
                closed=False,
            ),
            dark,
            width=0.014,
        )
        d.line([(side * gap, end - 0.06), (side * (gap + ankle * 2), end - 0.06)], dark, width=0.01)
        middle = (gap + ankle, end - 0.1)
        d.line(
            [(side * hip * 0.52, start + 0.5), (side * middle[0], middle[1])],
            shade(color, 0.8),
            0.012,
            0.4,
        )


def pants(d: Drawing, color, pattern: str) -> None:
    """Long legs."""
    legs(
        d,
        color,
        pattern,
        length=d.rng.uniform(1.5, 1.75),
        hip=d.rng.uniform(0.52, 0.64),
        ankle=d.rng.uniform(0.13, 0.21),
        gap=d.rng.uniform(0.05, 0.16),
    )


def shorts(d: Drawing, color, pattern: str) -> None:
    """Short legs."""
    legs(
        d,
        color,
        pattern,
        length=d.rng.uniform(0.3, 0.62),
        hip=d.rng.uniform(0.6, 0.76),
        ankle=d.rng.uniform(0.3, 0.37),
        gap=d.rng.uniform(0.06, 0.14),
    )


def shoes(d: Drawing, color, pattern: str) -> None:
    """A pair of sneakers, low or high, or one of them, from the side."""
    sole, lace = tint(d.rng, lightness=(0.82, 0.97), saturation=(0, 0.15)), (245, 245, 242)
    if d.rng.uniform() < 0.3:
        sole = tint(d.rng, lightness=(0.15, 0.4), saturation=(0, 0.3))
    high = d.rng.uniform(0.0, 0.3) if d.rng.uniform() < 0.4 else 0.0
    offsets = [(0.1, -0.38), (-0.1, 0.28)] if d.rng.uniform() < 0.75 else [(0.0, 0.0)]
    for dx, dy in offsets:

        def at(points: Points, dx=dx, dy=dy) -> Points:
            return [(x + dx, y + dy) for x, y in points]

        upper = [
            (-0.88, 0.2),
            (-0.94, -0.15),
            (-0.86, -0.38 - high),
            (-0.86, -0.38 - high),
            (-0.45, -0.36 - high),
            (-0.36, -0.34 - high),
            (-0.2, -0.2),
            (0.2, -0.02),
            (0.6, 0.05),
            (0.88, 0.14),
            (0.94, 0.28),
        ]
        base = [
            (-0.95, 0.2),
            (-0.5, 0.22),
            (0.5, 0.24),
            (0.98, 0.22),
            (1.0, 0.34),
            (0.85, 0.41),
            (-0.5, 0.41),
            (-0.92, 0.4),
            (-0.98, 0.3),
        ]
        d.shadow(at(base))
        d.cloth(at(curve(upper)), color)
        d.cloth(
            at(
                curve(
                    [
                        (-0.84, -0.4 - high),
                        (-0.62, -0.44 - high),
                        (-0.42, -0.36 - high),
                        (-0.62, -0.32 - high),
                    ]
                )
            ),
            shade(color, 0.4),
            shadow=False,
        )
        toe = curve([(0.52, 0.22), (0.56, 0.06), (0.85, 0.12), (0.94, 0.24)])
        d.cloth(at(toe), sole if d.rng.uniform() < 0.5 else shade(color, 0.8), shadow=False)
        d.cloth(at(curve(base)), sole, shadow=False)
        d.line(at([(-0.96, 0.3), (0.98, 0.32)]), shade(sole, 0.7), width=0.012)
        for step in range(4):
            x, y = -0.3 + 0.16 * step, -0.25 + 0.075 * step
            d.line(at([(x, y), (x - 0.12, y + 0.2)]), lace, width=0.035, strength=1.0)
        d.line(
            at(curve([(-0.36, 0.2), (-0.3, 0.0), (-0.1, -0.1)], closed=False)),
            shade(color, 0.6),
            0.012,
        )


def hat(d: Drawing, color, pattern: str) -> None:
    """A cap, a brimmed hat or a beanie."""
    style = d.rng.choice(["cap", "brim", "beanie"])
    if style == "cap":
        crown = [
            (-0.75, 0.28),
            (-0.75, 0.28),
            (-0.74, -0.15),
            (-0.45, -0.55),
            (0.0, -0.66),
            (0.45, -0.52),
            (0.7, -0.1),
            (0.72, 0.26),
            (0.72, 0.26),
        ]
        visor = [
            (-0.05, 0.2),
            (0.35, 0.12),
            (0.78, 0.18),
            (1.22, 0.36),
            (1.3, 0.46),
            (1.0, 0.47),
            (0.5, 0.4),
            (0.0, 0.36),
        ]
        d.cloth(curve(crown), color, pattern)
        d.cloth(curve(visor), shade(color, 0.8))
        for x in (-0.38, 0.0, 0.36):
            d.line(
                curve([(0.0, -0.66), (x, -0.2), (x * 1.15, 0.27)], closed=False),
                shade(color, 0.65),
                0.012,
            )
        d.disc(0, -0.67, 0.05, shade(color, 0.75))
    elif style == "brim":
        brim = [
            (1.25 * np.cos(a), 0.32 + 0.3 * np.sin(a))
            for a in np.linspace(0, 6.28, 40, endpoint=False)
        ]
        d.cloth(brim, shade(color, 0.9))
        crown = [
            (-0.66, 0.3),
            (-0.66, 0.3),
            (-0.62, -0.25),
            (-0.48, -0.55),
            (0.0, -0.5),
            (0.48, -0.55),
            (0.62, -0.25),
            (0.66, 0.3),
            (0.66, 0.3),
            (0.0, 0.42),
        ]
        d.cloth(curve(crown), color, pattern)
        ribbon = [(-0.66, 0.08), (0.0, 0.2), (0.66, 0.08), (0.67, 0.28), (0.0, 0.41), (-0.67, 0.28)]
        d.cloth(curve(ribbon), tint(d.rng, lightness=(0.1, 0.35)), shadow=False)
    else:
        crown = [
            (-0.72, 0.4),
            (-0.72, 0.4),
            (-0.7, -0.2),
            (-0.42, -0.68),
            (0.0, -0.82),
            (0.42, -0.68),
            (0.7, -0.2),
            (0.72, 0.4),
            (0.72, 0.4),
        ]
        d.cloth(curve(crown), color, pattern)
        for x in np.linspace(-0.6, 0.6, 9):
            d.line([(x * 0.5, -0.66), (x, 0.15)], shade(color, 0.72), width=0.02, strength=0.5)
        d.cloth(
            curve(
                [(-0.76, 0.12), (0.0, 0.17), (0.76, 0.12), (0.78, 0.46), (0.0, 0.52), (-0.78, 0.46)]
            ),
            shade(color, 0.86),
        )
        if d.rng.uniform() < 0.5:
            d.disc(0, -0.88, 0.17, shade(color, 1.15))


GARMENTS = {
    "dress": dress,
    "hat": hat,
    "longsleeve": longsleeve,
    "outwear": outwear,
    "pants": pants,
    "shirt": shirt,
    "shoes": shoes,
    "shorts": shorts,
    "skirt": skirt,
    "t-shirt": t_shirt,
}
PATTERNS = ["plain", "plain", "plain", "stripes", "checks", "dots"]


def draw(class_name: str, seed: int, width: int = 480) -> Image.Image:
    """Draw one garment of ``class_name``: RGB, ``width`` × 4/3 ``width`` pixels.

    The same class, seed and width give the same picture.
    """
    rng = np.random.default_rng([seed, *class_name.encode()])
    drawing = Drawing(rng, tilt=3 if seed < 1000 else 7, width=width)
    GARMENTS[class_name](drawing, tint(rng), str(rng.choice(PATTERNS)))
    return drawing.image()


if __name__ == "__main__":
    for name in CLASSES.read_text().split():
        draw(name, seed=4).save(SAMPLES / f"{name}.png", optimize=True)
