"""What the fuzz tests share: nasty values, mutations, and the one property: a result, or an InputError with places.

The default run tries a small, fixed corpus. `CANKD_FUZZ=20000 python -m pytest tests/fuzz -m "slow or not slow"` tries
that many random cases in each test.
"""

from __future__ import annotations

import copy
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from cankd_hf.errors import InputError

ASKED = int(os.environ.get("CANKD_FUZZ", "0"))
PHASES = [phase for phase in Phase if phase is not Phase.shrink]  # a case that hangs would hang in each smaller form
SECONDS = 2.0  # of processor time for one case
MEBIBYTES = 600  # by which all cases of a process may swell it

# Values as YAML or JSON writes them, wrong in type, size or form.
SNIPPETS = """
null|true|no|0|-1|-5|1|1.5|.nan|-.inf|1e400|1e308|-0.0|0x_|08|1_0|1099511627776|4294967296|99999999999999999999
[]|{}|[[]]|[null]|[1, [2, [3]]]|[-1, 0]|[[-1, 0]]|[[0, 0, 0]]|[0, 0]|[1000000000, 1000000000]|{a: 1}|{1: 2}|{null: 3}
{true: 1, 1.5: 2}|{2001-01-01: x}|{a: 1, a: 2}|{[1]: 2}|{? {a: 1} : 2}|"5e-4"|''|' '|"a\\nb"|"\\0"|"\\x1b[31m"
!!int x|!!python/object/apply:os.system [x]|!!timestamp x|!!binary eA==|!!set {a, b}|!x y|2001-01-01|12:30:45
&a [*a]|*missing|<<|{<<: 3}|{<<: {seed: 3}}|=|${seed}|${output_dir}|${nothing}|${oc.env:HOME}|${${a}}|${|???|${data}
auto|none|all|shapes|teacher|student|cankd|resnet|dinov2|cankd_fpn|segmentation|features|detection|steps|epoch|best
../..|/|/dev/zero|/dev/stdin|~|a/b/c|http://x:1/y|train[:50%]|train[5:1]|{split}|annotations/{split}/{split}.json
{model_type: []}|{model_type: resnet}|{model_type: dinov2, num_hidden_layers: 100000000}|{pretrained: 3}
{model_type: {}}|{num_labels: 1000000000}|[{loss: cankd, weight: []}]|[{pairs: [[-1, 0]]}]|[{loss: 3}]
{max_steps: 0}|{size: 1000000000}|é|日本|🙂|a b|a.b|a:b|a=b|[|{|]|}|"|'|%|@|`|- a|? a|: a|#|---|...|--- a|!|&|*||
""".replace("\n", "|").split("|")
SNIPPETS += ["[" * 300 + "]" * 300, "9" * 5000, "x" * 5000, "{a: " * 60 + "1" + "}" * 60]


def within(count: int) -> settings:
    """Settings of a test: `count` fixed cases, or as many random ones as were asked for."""
    return settings(
        max_examples=ASKED or count,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )


def result_or_input_error(call: Callable[[], Any]) -> Any:
    """The result of a call, or None after an InputError whose problems have a place and one line each.

    Everything else that it raises, and a case that takes too long or too much memory, fails the test.
    """
    start, before = time.process_time(), _peak()
    try:
        with _patience(20):
            result = call()
    except InputError as error:
        result = None
        assert any(": " in problem for problem in error.problems), f"no place: {error.problems}"
        assert not any("\n" in problem for problem in error.problems), f"several lines: {error.problems}"
    assert time.process_time() - start < SECONDS, "too slow"
    assert _peak() - before < MEBIBYTES, "too much memory"
    return result


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a call that waits, for a pipe that nobody writes or a lock."""

    def stop(*_: Any) -> None:
        raise TimeoutError("the call waits for something that never comes")

    handler = signal.signal(signal.SIGALRM, stop)
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, rest)


def _peak() -> float:
    """The largest size of this process so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


places = st.floats(0, 1, exclude_max=True)
edits = st.lists(
    st.tuples(
        st.sampled_from(["value", "key", "insert", "delete", "double", "cut", "glue"]),
        places,
        st.sampled_from(SNIPPETS),
    ),
    min_size=1,
    max_size=3,
)


def edited(text: str, changes: list[tuple[str, float, str]]) -> str:
    """A YAML text with lines changed, one after the other."""
    for kind, place, snippet in changes:
        lines = text.split("\n") or [""]
        at = int(place * len(lines))
        line = lines[at]
        if kind == "value":
            lines[at] = f"{line.partition(':')[0]}: {snippet}"
        elif kind == "key":
            lines[at] = f"{line[: len(line) - len(line.lstrip())]}{snippet}:{line.partition(':')[2]}"
        elif kind == "insert":
            lines.insert(at, f"{line[: len(line) - len(line.lstrip())]}{snippet}")
        elif kind == "delete":
            del lines[at]
        elif kind == "double":
            lines.insert(at, line)
        elif kind == "cut":
            lines[at] = line[: int(place * len(line) * 7) % (len(line) + 1)]
        else:
            lines[at] = line + snippet
        text = "\n".join(lines)
    return text


# Values of JSON, wrong in type, size or form.
JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 255, 256, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", " ", "a", "0", "1", "-1", "²", "0.png", "1.png", "../0.png", "/etc/passwd", "C:\\x", "a\nb"]),
    st.sampled_from(
        ["\x00", "x" * 300, "x/" * 100, "é", "\ud800", ".", "..", "train", "pipe", "gone.png", "link.png"]
    ),
    st.recursive(
        st.integers(-3, 3), lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner)
    ),
    st.sampled_from(
        [[], {}, [[]], [0, 0, 5, 5], [1, 2, 3], [[1, 2, 3, 4]], [float("nan")] * 4, [-5, -5, 2, 2], [0] * 5]
    ),
)
JSON_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "rename", "append"]), st.lists(places, min_size=1, max_size=5), JSON_VALUES
    ),
    min_size=1,
    max_size=3,
)


def changed(content: Any, changes: list[tuple[str, list[float], Any]]) -> Any:
    """JSON content with values changed at random places; `content` itself is changed."""
    box = [content]
    for kind, path, new in changes:
        place: Any = box
        value = copy.deepcopy(new)
        key: Any = 0
        for step in path:
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            place = inner
            key = list(inner)[int(step * len(inner))] if isinstance(inner, dict) else int(step * len(inner))
        if kind == "delete" and place is not box:
            del place[key]
        elif kind == "rename" and isinstance(place, dict):
            place[str(value)[:20]] = place.pop(key)
        elif kind == "append" and isinstance(place, list) and place is not box:
            place.append(value)
        else:
            place[key] = value
        if not isinstance(box[0], dict | list):
            break
    return box[0]
