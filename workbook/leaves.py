"""Draw leaves: something to train a small classifier of one's own on."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
CLASSES = ["ginkgo", "holly", "lily of the valley", "maple", "oak"]


def outline(name: str, angle: np.ndarray) -> np.ndarray:
    """Return how far a leaf's edge is from its middle, at angles from its tip, in radians."""
    width = {"holly": 0.55, "lily of the valley": 0.4, "oak": 0.6}.get(name, 1.0)
    ellipse = width / np.hypot(np.sin(angle), width * np.cos(angle))
    return {
        "ginkgo": np.where(np.abs(angle) < 1.1, 1.0, 0.12),
        "holly": ellipse * (1 + 0.3 * np.cos(9 * angle)),
        "lily of the valley": ellipse,
        "maple": 0.35 + 0.65 * np.abs(np.cos(2.5 * angle)) ** 2,
        "oak": ellipse * (0.8 + 0.25 * np.abs(np.sin(4.5 * angle)) ** 0.3),
    }[name]


def draw(name: str, seed: int) -> Image.Image:
    """Draw a leaf of a kind, 96 × 96 pixels, turned and coloured as the seed says."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(-np.pi, np.pi, 180)
    far = outline(name, angle) * rng.uniform(30, 44)
    turned = angle + rng.uniform(-np.pi, np.pi)
    x, y = 2 * (SIDE / 2 + rng.uniform(-5, 5, 2)[:, None] + far * [np.sin(turned), -np.cos(turned)])
    paper = tuple(rng.integers(170, 256, 3).tolist())
    green = (int(rng.integers(20, 130)), int(rng.integers(90, 190)), int(rng.integers(20, 90)))
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), paper)
    ImageDraw.Draw(image).polygon([*zip(x.tolist(), y.tolist(), strict=True)], green)
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def draw_many(seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """Return a leaf of each kind for each seed, uint8 [number, 96, 96, 3], and their classes."""
    pictures = [np.asarray(draw(name, seed)) for seed in seeds for name in CLASSES]
    return np.stack(pictures), np.tile(np.arange(len(CLASSES)), len(seeds))


def save_samples(folder: Path) -> None:
    """Write a picture of each kind, named after it, that training has not seen."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CLASSES:
        draw(name, seed=1_000_000).save(folder / f"{name}.png")
