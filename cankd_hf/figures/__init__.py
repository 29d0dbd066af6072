"""Figures of student maps beside teacher maps; drawn without pyplot, so that no global state changes."""

from pathlib import Path

from cankd_hf.figures.curves import training_curves, warning_signs
from cankd_hf.figures.draw import attention_maps, difference_maps, heat_maps, pca_maps, to_png
from cankd_hf.figures.look import Seen, Subject, look

STYLE = Path(__file__).with_name("page.css")  # of HTML reports

__all__ = [
    "STYLE",
    "Seen",
    "Subject",
    "attention_maps",
    "difference_maps",
    "heat_maps",
    "look",
    "pca_maps",
    "to_png",
    "training_curves",
    "warning_signs",
]
