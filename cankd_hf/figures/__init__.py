"""Figures of student maps beside teacher maps; drawn without pyplot, so that no global state changes."""

from cankd_hf.figures.curves import training_curves, warning_signs
from cankd_hf.figures.draw import attention_maps, difference_maps, heat_maps, pca_maps, to_png
from cankd_hf.figures.look import Seen, Subject, look
from cankd_hf.figures.page import render_page

__all__ = [
    "Seen",
    "Subject",
    "attention_maps",
    "difference_maps",
    "heat_maps",
    "look",
    "pca_maps",
    "render_page",
    "to_png",
    "training_curves",
    "warning_signs",
]
