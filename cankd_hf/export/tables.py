"""The one table of all forms, for the console and in Markdown, and what is said of it."""

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from cankd_hf.benchmark.measure import table

POOR = 0.9  # a file that agrees less with PyTorch is pointed out
HALF, SLOWER = ("float16", "bfloat16"), 1.1


def columns(report: dict[str, Any]) -> tuple[str, ...]:
    """The headings: of the measured columns alone."""
    found = ["form", "parameters", "bytes"]
    found += [f"{report['scored']['split']} {report['scored']['metric']}"] if report.get("scored") else []
    found += ["ms (quartiles)", "faster"] if report.get("measured") else []
    named = next((row["equal_of"] for row in report["forms"] if "equal_of" in row), "equal")
    return *found, "error, max", "mean", named


def rows(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for each form, `-` for what was not measured."""
    scored = report.get("scored")
    times = (report.get("measured") or {}).get("latency", {})
    first = next((one["median_ms"] for one in times.values()), None)
    for row in report["forms"]:
        cells = [row["form"], _number(row.get("parameters"), ","), _number(row.get("bytes"), ",")]
        if scored:
            cells.append(_number((row.get("scores") or {}).get(scored["metric"]), ".4f"))
        if times:
            one = times.get(row["form"])
            ms = f"{one['median_ms']:.1f} ({one['q1_ms']:.1f}-{one['q3_ms']:.1f})" if one else "-"
            cells += [ms, f"{first / one['median_ms']:.2f}x" if one else "-"]
        cells += [_number(row.get(name), ".1e") for name in ("largest_error", "mean_error")]
        yield *cells, _number(row.get("equal"), ".2%")


def caption(report: dict[str, Any]) -> list[str]:
    """What the numbers of the table are, in a line each."""
    lines = []
    if scored := report.get("scored"):
        size = " x ".join(map(str, scored["image_size"])) if scored["image_size"] else "their own sizes"
        lines.append(f"Score: {scored['metric']} on {scored['images']} images of {scored['split']}, at {size}.")
    if "not_scored" in report:
        lines.append(f"Not scored: {report['not_scored']}")
    if found := report.get("measured"):
        about, (height, width) = found["machine"], report["size"]
        lines.append(
            f"Latency: batch {found['batch']} x 3 x {height} x {width}, median of {found['runs']} runs in turn, "
            f"{about['threads']} thread(s) of {about['cores']} cores ({about['processor']}), load {about['load']}; "
            f"faster than the first row."
        )
    student = next(row for row in report["forms"] if "images" in row)
    on = "the same images" if scored else f"{student['images']} images" if report["read"] else "noise"
    lines.append(f"Errors: of the outputs, against the student in PyTorch, on {on}.")
    if calibrated := report.get("calibration"):
        lines.append(f"int8: calibrated on {calibrated['images']} images of {calibrated['source']}.")
    return [*lines, *_warnings(report), *report.get("notes", [])]


def _warnings(report: dict[str, Any]) -> Iterator[str]:
    times = (report.get("measured") or {}).get("latency", {})
    exact = next((row["form"] for row in report["forms"] if row.get("dtype") == "float32"), "student, PyTorch")
    for row in report["forms"]:
        if row.get("dtype") in HALF and row["form"] in times and exact in times:
            slower = times[row["form"]]["median_ms"] / times[exact]["median_ms"]
            if slower > SLOWER:
                yield (
                    f"{row['dtype']} takes {slower:.1f} times as long as {exact} here: CPUs compute most operators in "
                    "float32, between conversions; it makes the file smaller, and is for accelerators."
                )
        equal = row.get("equal")
        if equal is not None and equal < POOR:
            yield (f"{row['form']}: {equal:.1%} {row['equal_of']} as in PyTorch: look at its score before you use it.")


def markdown(report: dict[str, Any]) -> str:
    """The table for a model card."""
    head = columns(report)
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in rows(report)]
    return "\n".join([*lines, "", *(f"- {line}" for line in caption(report)), ""])


def print_all(console: Console, report: dict[str, Any]) -> None:
    """Prints the checks of each file, then the table."""
    for file in report["files"]:
        _print_checks(console, file)
    size = report["size"]
    if report["fixed_because"]:
        console.print(f"Any batch, but only images of {size[0]} x {size[1]}: {report['fixed_because']}", markup=False)
    elif report["smallest_size"]:
        least = "{} x {}".format(*report["smallest_size"])
        console.print(f"Any batch, any size that the student itself takes (torch.export asks for {least} at least).")
    for row in report["forms"]:
        if "flops" in row:
            console.print(f"{row['form']}: {row['flops'] / 1e9:.2f} GFLOPs a batch")
    console.print(table("teacher, student and files", columns(report), rows(report)))
    for line in caption(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    compiling = (report.get("measured") or {}).get("torch.compile", {})
    if "failed" in compiling:
        console.print(f"torch.compile failed: {compiling['failed']}", markup=False)
    elif compiling:
        console.print(f"torch.compile took {compiling['compile_seconds']:.1f} s, once.")


def _print_checks(console: Console, file: dict[str, Any]) -> None:
    lines = []
    for check in file["checks"]:
        batch, _, height, width = check["shape"]
        seen = _number(check["detections"], "d")
        values = (f"{check['difference']:.1e}", _number(check["allowed"], ".1e"), seen)
        lines.append((str(batch), f"{height} x {width}", *values))
    heads = ("batch", "height x width", "difference", "allowed", "detections")
    console.print(table(f"{file['file']} ({file['dtype']}) against PyTorch, on noise", heads, lines, left=0))
    found = [check["detections"] for check in file["checks"]]
    if any(count is not None for count in found) and not any(found):
        console.print("Nothing was detected in the test images, so the selection of detections was not compared.")


def _number(value: Any, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
