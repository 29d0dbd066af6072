"""The public names: a change here is a change for every user, so it is made on purpose."""

from __future__ import annotations

import inspect

import cankd_hf

PUBLIC = {
    "CanKDConfig",
    "CanKDLoss",
    "CanKDTrainer",
    "Distiller",
    "FPNConfig",
    "FPNForObjectDetection",
    "FPNForSemanticSegmentation",
    "FeatureFiguresCallback",
    "InputError",
    "LossTerm",
    "load_recipe",
    "load_teacher",
}


def test_the_public_names_are_these() -> None:
    missing = PUBLIC - set(cankd_hf.__all__)
    assert not missing, f"gone from cankd_hf.__all__: {sorted(missing)}"


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in cankd_hf.__all__:
        if name.startswith("__"):
            continue
        assert inspect.getdoc(getattr(cankd_hf, name)), f"cankd_hf.{name} has no docstring"
