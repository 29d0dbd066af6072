"""Which files of a folder belong to the student: the only ones that are ever pushed."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cankd_hf.config.named import hint
from cankd_hf.errors import InputError
from cankd_hf.models.finite import named, not_finite
from cankd_hf.names import FACTS_FILE, RECIPE_FILE, RESULTS_FILE

# Pushed beside configuration, weights and code. All other files stay local: optimizer, connectors, teacher, random
# states, pictures of the data.
_BESIDE = (
    *(IMAGE_PROCESSOR_NAME, "processor_config.json", RECIPE_FILE, FACTS_FILE, RESULTS_FILE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
)
# First part of a tensor's name in the weights of a whole training module instead of a student.
_NOT_A_STUDENT = {"student", "teacher", "connectors", "losses"}
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True)
class Upload:
    """One file to push: its path in the repository, and the local file or the content."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def text(self) -> bytes:
        """The content."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


def student_files(folder: Path) -> list[Path]:
    """The files that make up a saved student, without its card, in the folder of a run or of a checkpoint.

    Configuration, weights, model code, image processor, tokenizer, recipe, facts and results, as far as present.

    Raises:
        InputError: if there is no student, or the weights are not only a student's.
    """
    if not folder.is_dir():
        near = hint(str(folder)) or "; check the path"
        raise InputError(f"{folder}: expected the folder of a saved student, got no folder{near}")
    config, weights = folder / CONFIG_NAME, _weights(folder)
    absent = [name for name, there in ((CONFIG_NAME, config.is_file()), (SAFE_WEIGHTS_NAME, weights)) if not there]
    if absent:
        inner = sorted(path.parent.name for path in folder.glob(f"*/{SAFE_WEIGHTS_NAME}"))
        fix = f"it holds students in {', '.join(inner)}: name one of them" if inner else "name a run or a checkpoint-N"
        raise InputError(f"{folder}: expected a saved student, found no {' and no '.join(absent)}; {fix}")
    for file in weights:
        if file.suffix == ".safetensors":
            _check_weights(file)
    beside = [folder / name for name in _BESIDE]
    return [config, *weights, *_code(folder, config), *(file for file in beside if file.is_file())]


def check_no_secret(uploads: list[Upload]) -> None:
    """Raises InputError for files that contain a Hub token, naming the files and not the token."""
    own = (get_token() or "").encode()
    found = []
    for upload in uploads:
        if upload.name.endswith(".safetensors"):
            continue
        content = upload.text()
        if _TOKEN.search(content) or (own and own in content):
            found.append(f"{upload.name}: holds a Hub token, so nothing was pushed; remove it from the file")
    if found:
        raise InputError(found)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without the file. Raises InputError if the file holds anything else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON, got {error}; remove the file or write it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(content).__name__}; remove the file")
    return content


def _weights(folder: Path) -> list[Path]:
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise InputError(f"{index}: names weights that are not there: {', '.join(absent)}; save the student again")
    return [index, *shards]


def _check_weights(file: Path) -> None:
    """Refuses weights that are not finite, or of a whole training module, whose connectors and losses would go too."""
    try:
        with safe_open(file, framework="pt") as tensors:
            wrong = sorted(name for name in tensors.keys() if name.split(".")[0] in _NOT_A_STUDENT)  # noqa: SIM118
            bad = [name for name in tensors.keys() if not_finite({name: tensors.get_tensor(name)})]  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{file}: cannot be read: {error}; save the student again") from error
    if wrong:
        raise InputError(
            f"{file}: expected the tensors of a student, found {', '.join(wrong[:3])}; "
            "save it with trainer.save_model(), which leaves the rest out"
        )
    if bad:
        raise InputError(f"{file}: expected finite weights, got {named(bad)}; nothing was pushed, train it anew")


def _code(folder: Path, config: Path) -> list[Path]:
    """The Python files that `trust_remote_code=True` runs, and those that they import."""
    listed = read_json(config).get("auto_map", {}).values()
    classes = [name for value in listed for name in ([value] if isinstance(value, str) else value) if name]
    # "other/repo--module.Class" is code that lives elsewhere.
    modules = {folder / f"{name.rpartition('.')[0]}.py" for name in classes if "--" not in name}
    absent = sorted(module.name for module in modules if not module.is_file())
    if absent:
        raise InputError(f"{folder}: config.json names code that is not there: {', '.join(absent)}; save it again")
    modules |= {Path(found) for module in list(modules) for found in get_relative_import_files(module)}
    return sorted(modules)
