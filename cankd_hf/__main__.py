"""`cankd COMMAND ...`, or `python -m cankd_hf COMMAND ...`: the commands under one name."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "init": "ask five questions and write a commented recipe",
    "data": "look at a data set: what it is, pictures of it, what is wrong with it",
    "train": "train a student by distillation, as described in a recipe",
    "cache": "store a teacher's answers, so that training does not run it again",
    "compare": "compare arms of one recipe, at equal steps and at equal cost",
    "evaluate": "score a saved student",
    "convert": "convert a checkpoint of OpenMMLab to a folder that trains and loads like any other",
    "label": "write a teacher's masks or boxes for a folder of images as a data set",
    "probe": "score a model's frozen features by linear and kNN probes, beside others",
    "visualize": "look at a student, its teacher and their training",
    "push": "push a student to the Hub",
    "export": "export a student to other formats",
    "benchmark": "measure what the loss and a step cost",
    "recipes": "list the recipes that come with the package, or print one",
    "doctor": "show versions, devices, memory and Hub login, and what is slow and why",
}
HELP = "usage: cankd COMMAND ...\n\n" + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
HELP += "\n\n`cankd COMMAND --help` explains each.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"cankd_hf {import_module('cankd_hf').__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        sys.stderr.write(f"error: expected one of {', '.join(COMMANDS)}, got {words[0]!r}{hint}\n")
        return 2
    module = import_module(f"cankd_hf.{words[0]}")
    if not hasattr(module, "main"):  # a room of the package that has a command beside
        module = import_module(f"cankd_hf.{words[0]}.__main__")
    return int(module.main(words[1:]))


if __name__ == "__main__":
    sys.exit(main())
