"""Pictures of depth maps."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from cankd_hf.tasks.pictures import fitted, font

COLOURS = "turbo_r"  # near is red, far is blue
WIDTH = 300  # pixels of a picture with a scale, at least
BAR = 14  # height of the scale in pixels


def range_of(truth: np.ndarray) -> tuple[float, float]:
    """The nearest and the farthest distance in metres that have a colour of their own: of the true depth, without the
    outermost hundredth at either end."""
    known = truth[truth > 0]
    low, high = np.percentile(known, [1, 99]) if len(known) else (0.0, 1.0)
    return float(low), float(max(high, low * 1.001 + 1e-6))


def painted(metres: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A depth map in colours, uint8 [H, W, 3], in the range of the truth."""
    import matplotlib

    low, high = range_of(truth)
    shares = np.clip((metres - low) / (high - low), 0, 1)
    return (255 * matplotlib.colormaps[COLOURS](shares)[..., :3]).astype(np.uint8)


def with_scale(truth: np.ndarray) -> np.ndarray:
    """The true depth in colours, black where it is not known, with a scale in metres at its lower edge."""
    import matplotlib

    plain = np.where((truth > 0)[..., None], painted(truth, truth), np.uint8(0))
    width = max(WIDTH, truth.shape[1])
    page = fitted(plain, (width, max(2 * BAR, round(width * truth.shape[0] / truth.shape[1]))))
    steps = matplotlib.colormaps[COLOURS](np.linspace(0, 1, width))[None, :, :3]
    page.paste(Image.fromarray((255 * np.repeat(steps, BAR, 0)).astype(np.uint8)), (0, page.height - BAR))
    pen, (low, high) = ImageDraw.Draw(page), range_of(truth)
    for share, anchor in ((0.0, "ls"), (0.5, "ms"), (1.0, "rs")):
        place = 3 + share * (width - 6), page.height - 3
        pen.text(
            place,
            f"{low + share * (high - low):.3g} m",
            "white",
            font(11),
            anchor,
            stroke_width=2,
            stroke_fill="black",
        )
    return np.asarray(page)
