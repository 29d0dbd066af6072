"""`python -m cankd_hf.push CHECKPOINT me/name`: a saved student to the Hub, and nothing else."""

import argparse
from collections.abc import Sequence

from cankd_hf.commands import command_parser, console, exit_code
from cankd_hf.config.named import absent
from cankd_hf.errors import InputError
from cankd_hf.tokens import holds_secret

EXAMPLES = """examples:
  python -m cankd_hf.push runs/quickstart me/shapes-student --dry-run
  python -m cankd_hf.push runs/camvid_seg me/camvid-student
  python -m cankd_hf.push runs/camvid_seg/checkpoint-500 me/camvid-student --revision step-500 --public

Pushed are configuration, weights, model code, image processor, card, recipe and results; never the teacher,
connectors, optimizer or a token. HF_TOKEN or `hf auth login` signs in. A push that failed can be repeated; nothing
here is changed.

exit codes: 0 pushed, 2 refused (the message says why), 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    description = "Push a saved student to the Hugging Face Hub."
    made = command_parser("push", description, EXAMPLES)
    made.add_argument("checkpoint", help="folder of a run or of a checkpoint")
    made.add_argument("repo", metavar="me/name", help="where to push; created where it does not exist")
    made.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    made.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    made.add_argument("--license", help="the student's own, such as apache-2.0 (default: hub.license of its recipe)")
    made.add_argument(
        "--license-of",
        action="append",
        default=[],
        metavar="NAME=LICENSE",
        help="licence of a teacher, data set or first weights whose card states none; can be repeated",
    )
    made.add_argument(
        "--cleared",
        action="append",
        default=[],
        metavar="NAME",
        help="what it comes from and whose licence does not bind it, by a permission of your own; can be repeated",
    )
    made.add_argument("--message", default="Distilled student", help="of the commit")
    made.add_argument("--dry-run", action="store_true", help="list the files with their sizes and push nothing")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_args(argv)
    unchanged = f"nothing in {options.checkpoint} changed, and the same command pushes again"
    return exit_code(lambda: _run(options), unchanged)


def _run(options: argparse.Namespace) -> int:
    if missing := absent(options.checkpoint):
        raise InputError(f"{options.checkpoint}: expected the folder of a saved student, got no folder; {missing}")
    from rich.table import Table

    from cankd_hf.hub.upload import check_name, check_target, open_repo, plan, push

    for name in ("repo", "revision", "message"):  # all of them can be read by others on the Hub
        if holds_secret(getattr(options, name) or ""):
            raise InputError(f"{name}: looks like a token or password, which others would read; sign in with HF_TOKEN")
    check_name(options.repo)
    stated = {name: licence for name, _, licence in (given.partition("=") for given in options.license_of)}
    if wrong := [name for name, licence in stated.items() if not (name and licence)]:
        raise InputError(f"--license-of: expected NAME=LICENSE, such as me/teacher=apache-2.0, got {wrong[0]!r}")
    asked = {"stated": stated, "cleared": options.cleared, "licence": options.license}
    uploads = plan(options.checkpoint, options.repo, **asked)
    table = Table(title=f"{options.checkpoint} -> {options.repo}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for upload in uploads:
        table.add_row(upload.name, f"{upload.size:,}")
    table.add_row("total", f"{sum(upload.size for upload in uploads):,}")
    console().print(table)
    if options.dry_run:
        print("Nothing was pushed (--dry-run).")
        return 0
    check_target(options.repo)
    name, private = open_repo(options.repo, private=not options.public, revision=options.revision)
    if name != options.repo:  # given without its owner; the card needs the whole name
        uploads = plan(options.checkpoint, name, **asked)
    commit = push(uploads, name, options.message, options.revision)
    print(f"Pushed to {commit.repo_url} ({'private' if private else 'public'}), commit {commit.oid[:12]}")
    print(f'Load it with from_pretrained("{name}"); the lines are in its card.')
    return 0
