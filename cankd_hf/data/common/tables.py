"""Tables of images, loaded or streamed: parquet files, Hub data sets and `save_to_disk` folders."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.config.named import check_named, hint, is_there
from cankd_hf.data.common.dataset import StreamSource
from cankd_hf.data.common.decode import Data, Decoder, Sample, Unlabelled, Unusable, make_decoder
from cankd_hf.data.common.files import not_a_file, outside, shortened
from cankd_hf.data.common.folders import MASK_COLUMNS
from cankd_hf.data.common.labels import read_labels
from cankd_hf.errors import InputError

# (sample, row, number of the row) -> the sample with its label from other columns.
Label = Callable[[Sample, dict[str, Any], int], Sample]
IMAGE_COLUMNS = ["image", "img", "pixel_values", "picture"]


def is_table_path(path: str) -> bool:
    """Whether a local path holds parquet files or a saved data set."""
    folder = Path(path)
    pattern = any(sign in path for sign in "*?[") and not os.path.lexists(path)
    if pattern or folder.suffix == ".parquet":
        return True
    return _is_saved(folder) or (os.path.isdir(folder) and _holds_parquet(folder))


def _holds_parquet(folder: Path) -> bool:
    walked = os.walk(folder)  # goes on where a folder cannot be read or vanishes, unlike rglob
    return any(name.endswith(".parquet") for _, folders, files in walked for name in (*files, *folders))


def _is_saved(folder: Path) -> bool:
    return os.path.isfile(folder / "dataset_dict.json") or os.path.isfile(folder / "state.json")


@dataclass(eq=False)
class TableSource:
    """Samples of a `datasets.Dataset` whose image columns are cast to `Image(decode=False)`.

    `columns`: the image column and, if needed, the mask column; `label` reads other columns; `split` is for messages.
    """

    table: Any
    columns: Sequence[str]
    decoder: Decoder
    split: str
    label: Label | None = None
    labels: str | None = None  # the column that `label` reads
    generated = False

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"  # the file's name is known only after reading

    def load(self, index: int) -> Sample:
        return self.decode(self.table[index], index)

    def content(self, index: int) -> Data:
        """The file of an image, or what it holds. Raises Unusable for a row without one."""
        return bytes_of(self.table[index][self.columns[0]], self.name(index))[0]

    def alone(self) -> "TableSource":
        """The images, read without labels."""
        return TableSource(self.table, self.columns[:1], self.decoder, self.split)

    def without_labels(self) -> tuple["TableSource", list[int]]:
        """The images whose mask, or objects, are null, read without: a source, and their indices in it and here."""
        column = self.columns[1] if len(self.columns) > 1 else self.labels
        if column is None:
            return self.alone(), []
        given = self.table.select_columns([column])
        return self.alone(), [index for index, row in enumerate(given) if _is_null(row[column])]

    def decode(self, row: dict[str, Any], index: int) -> Sample:
        """Decode image and label of a row."""
        if len(self.columns) > 1 and not any((row[self.columns[1]] or {}).values()):
            raise Unlabelled(f"{self.split}[{index}]: the table gives it no {self.decoder.noun}")
        image, *mask = (bytes_of(row[column], f"{self.split}[{index}].{column}") for column in self.columns)
        sample = self.decoder.pair(image, mask[0] if mask else None)
        return sample if self.label is None else self.label(sample, row, index)


def _is_null(value: Any) -> bool:
    """Whether there is no label; an empty list of objects is one."""
    return value is None or (isinstance(value, dict) and all(part is None for part in value.values()))


class _Table:
    """An opened table with all its splits."""

    def __init__(self, config: DataConfig, tables: dict[str, Any], need_masks: bool) -> None:
        self.tables = tables
        self.config = config
        self.warnings: list[str] = []
        self.need_masks = need_masks
        features = next(iter(tables.values())).features
        self.labels = read_labels(config, labels_file(config) if need_masks else None, class_names(features))
        self.decoder = make_decoder(config, self.labels)

    def names(self) -> list[str]:
        return list(self.tables)

    def source(self, name: str, others: Sequence[str] = (), label: Label | None = None) -> TableSource | StreamSource:
        """One split, its image columns undecoded, with `label` reading the other columns."""
        from datasets import Image

        table = self.tables[name]
        columns = image_columns(self.config, table.features, self.need_masks)
        table = table.select_columns([*columns, *others])
        for column in columns:
            table = table.cast_column(column, Image(decode=False))
        source = TableSource(
            table, columns, self.decoder, f"{self.config.path}:{name}", label, next(iter(others), None)
        )
        return StreamSource(table, source.decode) if self.config.streaming else source


def open_table(config: DataConfig, need_masks: bool) -> _Table:
    """Open parquet files, a saved data set or a Hub data set. Raises InputError if there is no such data set here or
    on the Hub, or it has no image column."""
    import datasets

    path = str(config.path)
    streaming = config.streaming
    folder = Path(path)
    try:
        if _is_saved(folder):
            _check_files([file for file in sorted(folder.rglob("*")) if not os.path.isdir(file)], folder)
            loaded = datasets.load_from_disk(path)
            tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
            if streaming:
                tables = {name: table.to_iterable_dataset() for name, table in tables.items()}
        elif os.path.isdir(folder):
            _check_files(sorted(folder.rglob("*.parquet")), folder)
            tables = dict(datasets.load_dataset("parquet", data_dir=path, streaming=streaming))
        elif is_table_path(path):
            if not (found := sorted(map(Path, glob.glob(path, recursive=True)))):
                raise InputError(f"data.path: expected parquet files, found none at {path}")
            _check_files(found)
            tables = dict(datasets.load_dataset("parquet", data_files=path, streaming=streaming))
        else:
            check_named("data.path", path, "a folder, a parquet file or a Hub data set")
            tables = dict(datasets.load_dataset(path, config.name, revision=config.revision, streaming=streaming))
    except InputError:
        raise
    except Exception as error:  # of whatever reads it: pyarrow, pandas, fsspec, the Hub, `datasets` itself
        fix = "" if is_there(path) else "; check the name, your access to it and the network, or name a local folder"
        raise InputError(
            "data.path: expected a folder, a parquet file or a Hub data set, "
            f"got {path[:200]!r}, which does not open{hint(path)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{fix}"
        ) from error
    return _Table(config, tables, need_masks)


def _check_files(files: Sequence[Path], folder: Path | None = None) -> None:
    """Raises InputError for a table that is no regular file, or is outside the folder."""
    problems = [
        f"{file}: expected a file of a table, got {problem}" for file in files if (problem := not_a_file(file))
    ]
    if problems := problems + (outside(folder, files) if folder is not None else []):
        raise InputError(shortened(problems))


def image_columns(config: DataConfig, features: Any, need_masks: bool) -> list[str]:
    """Names of the image column and, if needed, the mask column."""
    images = [name for name, feature in (features or {}).items() if holds_images(feature)]
    if not images:
        raise InputError(f"data.path: expected a column of images in {config.path}, got {dict(features or {})}")
    image = _pick("image_column", config.image_column, images, IMAGE_COLUMNS, images[0])
    if not need_masks:
        return [image]
    others = [name for name in images if name != image]
    mask = _pick("mask_column", config.mask_column, others, MASK_COLUMNS, others[0] if len(others) == 1 else None)
    return [image, mask]


def _pick(key: str, wanted: str, columns: list[str], usual: list[str], default: str | None) -> str:
    """A column by name, by its usual names, or the default."""
    if wanted != "auto":
        default = wanted if wanted in columns else None
    else:
        default = next((name for name in usual if name in columns), default)
    if default is None:
        raise InputError(f"data.{key}: expected one of the image columns {columns}, got {wanted!r}")
    return default


def holds_images(feature: Any) -> bool:
    """An `Image` feature, or the {bytes, path} that it becomes in a plain parquet file."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def class_names(features: Any) -> list[str] | None:
    """Class names in the features of a segmentation set, if any: a sequence of ClassLabel, as ADE20K has."""
    from datasets import ClassLabel

    for feature in (features or {}).values():
        inner = getattr(feature, "feature", None)
        if isinstance(inner, ClassLabel):
            return list(inner.names)
    return None


def labels_file(config: DataConfig) -> Path | None:
    """The labels file, if any: local, in the data folder, or in the repository of a Hub data set."""
    path = Path(str(config.path))
    base = path if os.path.isdir(path) else path.parent
    if config.labels is None:
        file = base / "labels.json"
        if problems := outside(base, [file]):
            raise InputError(problems)
        return file if os.path.lexists(file) else None
    for file in (Path(config.labels), base / config.labels):
        if os.path.lexists(file):
            return file
    if os.path.exists(path) or is_table_path(str(path)):
        return Path(config.labels)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(config.path), config.labels, repo_type="dataset", revision=config.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"data.labels: expected a json file, here or in the Hub set {config.path}, got {config.labels!r}: {error}"
        ) from error


def bytes_of(value: Any, place: str) -> tuple[Data, str]:
    """The data of an undecoded image and the best name for it."""
    if not isinstance(value, dict):
        raise Unusable(f"{place}: expected an image, got {value!r}")
    path, content = value.get("path"), value.get("bytes")
    name = f"{place} ({path})" if path else place
    if content is not None:
        return content, name
    if not path:
        raise Unusable(f"{place}: the row holds no image")
    if re.match(r"hf://|zip://.*::(hf|https)://", path) and "file:" not in path:
        import fsspec  # type: ignore[import-untyped]

        with fsspec.open(path, "rb") as file:
            return file.read(), name
    if not _in_cache(path):
        raise Unusable(
            f"{place}: the row holds no image, only the path {path!r}; write the table with the images inside "
            "(`Dataset.save_to_disk` and `push_to_hub` do, `to_parquet` does not)"
        )
    return Path(path), name


def _in_cache(path: str) -> bool:
    """Whether a path is where `datasets` unpacks downloads: tables may not name other files of this machine."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE]
    return any(Path(path).resolve().is_relative_to(Path(root).resolve()) for root in roots)
