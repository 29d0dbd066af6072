"""Warning signs are found in the numbers, and only where they are."""

from __future__ import annotations

from typing import Any

import pytest

from cankd_hf.figures import training_curves, warning_signs


def history(fall: tuple[float, float], r: tuple[float, float], cka: tuple[float, float], **last: Any) -> list[dict]:
    """Ten logs in which values go straight from the first to the second."""

    def at(ends: tuple[float, float], index: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * index / 9

    return [
        {
            "step": 10 * (index + 1),
            "loss": 1.0,
            "learning_rate": 1e-3,
            "loss_task": 1.0,
            "loss_cankd": at(fall, index),
            "raw_correlation/s0t1": at(r, index),
            "raw_cka/s0t1": at(cka, index),
            "branch_share/cankd/s0t1": at((0.0, 0.2), index),
            **(last if index == 9 else {}),
        }
        for index in range(10)
    ]


def test_a_student_that_learns_gives_no_sign() -> None:
    assert warning_signs(history((1.0, 0.3), (0.1, 0.7), (0.3, 0.8)), "miou") == []


def test_the_shortcut_is_found() -> None:
    (sign,) = warning_signs(history((1.0, 0.5), (0.10, 0.11), (0.30, 0.30)), "miou")
    assert sign.startswith("cankd: the loss fell by 50%") and "0.10 to 0.11" in sign and "instance_mse" in sign
    # similarity of either kind that rises is no shortcut
    assert warning_signs(history((1.0, 0.5), (0.10, 0.11), (0.30, 0.60)), "miou") == []


def test_several_levels_are_told_apart() -> None:
    logs = history((1.0, 0.5), (0.1, 0.1), (0.3, 0.3))
    for entry in logs:
        entry.update({"loss_cankd/s0t1": entry["loss_cankd"], "loss_cankd/s2t3": entry["loss_cankd"]})
        entry.update({"raw_correlation/s2t3": entry["step"] / 100, "raw_cka/s2t3": 0.3})
    signs = warning_signs(logs, "miou")
    assert len(signs) == 1 and signs[0].startswith("cankd/s0t1:")


@pytest.mark.parametrize(
    ("logs", "scores", "words"),
    [
        (history((1.0, 1.0), (0.1, 0.1), (0.3, 0.3)), None, "did not fall"),
        (history((1.0, 0.3), (0.1, 0.7), (0.3, 0.8), **{"branch_share/cankd/s0t1": 0.9}), None, "90% of the student"),
        (history((1.0, 0.3), (0.1, 0.7), (0.3, 0.8), loss=float("nan")), None, "not a number at step 100"),
        (history((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)), None, "was 0 from the start"),
        (
            history((1.0, 0.3), (0.1, 0.7), (0.3, 0.8)) + [{"step": s, "eval_miou": 25 / s} for s in (50, 100)],
            None,
            "best at step 50",
        ),
        (
            history((1.0, 0.3), (0.1, 0.7), (0.3, 0.8)),
            {"student alone": {"miou": 0.5}, "student distilled": {"miou": 0.4}},
            "worse than the student alone",
        ),
    ],
)
def test_other_signs(logs: list[dict], scores: dict | None, words: str) -> None:
    (sign,) = warning_signs(logs, "miou", scores)
    assert words in sign


def test_nothing_logged_is_no_sign_and_no_figure() -> None:
    assert warning_signs([], "miou") == []
    assert training_curves({"student": []}, "miou") is None


def test_curves_show_every_part_and_every_arm() -> None:
    logs = history((1.0, 0.3), (0.1, 0.7), (0.3, 0.8))
    alone = [{"step": entry["step"], "loss_task": 1.1, "loss": 1.1} for entry in logs]
    figure = training_curves({"student distilled": logs, "student alone": alone}, "miou")
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}
    assert list(panels) == [
        "total loss",
        "task loss",
        "distillation losses, unweighted",
        "raw correlation with the teacher",
        "raw CKA with the teacher",
        "share of the Can branch, |output| / |student|",
        "learning rate",
    ]
    lines = panels["task loss"].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[1.0] * 10, [1.1] * 10]
    assert list(panels["distillation losses, unweighted"].get_lines()[0].get_ydata())[-1] == pytest.approx(0.3)
