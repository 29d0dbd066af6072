"""Pictures of depth maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cankd_hf.data.common.decode import Sample
from cankd_hf.tasks.overview import Overview, resized
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


class DepthOverview(Overview):
    """Depth maps: there are no classes to count."""

    def add(self, split: str, sample: Sample) -> None:
        """Notes depth maps with little in them."""
        if sample.label is not None and (known := float((sample.label > 0).float().mean())) < 0.1:
            said = "a depth map without any depth" if known == 0 else "a depth map of which less than 10% is known"
            self.note(split, said, sample.name)

    def draw(self, axis: Any, image: np.ndarray, sample: Sample) -> None:
        """The depth, with the image shining through; black where it is not known."""
        if sample.label is None:
            return super().draw(axis, image, sample)
        metres = resized(np.asarray(sample.label), image.shape[:2])
        mixed = 0.3 * image + 0.7 * painted(metres, metres)
        mixed[metres <= 0] = 0.2 * image[metres <= 0]
        axis.imshow(mixed.astype(np.uint8))
        low, high = range_of(metres)
        return super().say(axis, f"{low:.3g} to {high:.3g} m")

    def legend(self, samples: Sequence[Sample]) -> list[tuple[str, Any]]:
        """What the colours mean."""
        import matplotlib

        colours = matplotlib.colormaps[COLOURS]
        return [("near", colours(0.02)), ("far", colours(0.98)), ("not known", "0.15")]
