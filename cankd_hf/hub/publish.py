"""What a run does with the Hub: check before training that it may push, and push when everything is written."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cankd_hf.errors import InputError
from cankd_hf.hub.card import write_card
from cankd_hf.hub.facts import planned_facts
from cankd_hf.hub.licences import UNKNOWN, check_licences, inherited
from cankd_hf.hub.upload import open_repo, plan, push


def open_target(folder: str | Path, args: TrainingArguments, recipe: dict[str, Any] | None = None) -> str | None:
    """Creates the repository that `training.push_to_hub` asks for; done before training, so that it fails early.

    Returns its full name (by default the run folder's name), or None where nothing is to be pushed.

    Args:
        recipe: of the run, as plain data, before anything is trained: then the licences of what it names are checked.

    Raises:
        InputError: without a token, without rights, or without network; for licences as `check_licences`.
    """
    if not args.push_to_hub or args.process_index != 0:
        return None
    if recipe is not None:
        planned = planned_facts(recipe)
        licence = planned.hub.get("license") or inherited(planned) or UNKNOWN
        check_licences(planned, licence, owner=(args.hub_model_id or "").rpartition("/")[0])
    name = args.hub_model_id or Path(folder).absolute().name
    return open_repo(name, args.hub_private_repo, args.hub_revision)[0]


def publish(folder: str | Path, args: TrainingArguments) -> str | None:
    """Writes the card of a finished run beside its student, and pushes both where the run asks for it.

    Returns the commit's URL, or None where nothing was to be pushed.

    Raises:
        InputError: if the push failed; the student stays in the folder, and the message says how to push again.
    """
    if args.process_index != 0:
        return None
    write_card(folder)
    if not args.push_to_hub:
        return None
    try:
        name = open_target(folder, args)
        assert name is not None
        return str(push(plan(folder, name), name, "End of training", args.hub_revision).commit_url)
    except InputError as error:
        again = f"the student is safe in {folder}; `python -m cankd_hf.push {folder} {args.hub_model_id or 'me/name'}`"
        raise InputError([*error.problems, f"{again} pushes it again"]) from error
