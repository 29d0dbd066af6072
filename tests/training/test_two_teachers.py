"""Two teachers give one student what neither gives alone, over several seeds."""

from __future__ import annotations

import pytest

from .two_teachers import differences, interval, scores


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_student_of_two_beats_that_of_each_on_the_probe_of_the_other() -> None:
    found = scores(seeds=3, steps=500, teacher_steps=300)
    assert found["teacher of shape"][0]["shape"] > 0.85 and found["teacher of stripes"][0]["stripes"] > 0.95
    gained = differences(found)
    for arm, kind in (("shape", "stripes"), ("stripes", "shape")):
        assert gained[arm, kind].low > 0.05, (arm, kind, gained)
    # what a teacher gives alone is not lost
    assert all(gained[kind, kind].mean > -0.25 for kind in ("shape", "stripes")), gained


def test_the_interval_is_that_of_students_t() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and high - mean == pytest.approx(4.302653 / 3**0.5) and mean - low == pytest.approx(high - mean)
