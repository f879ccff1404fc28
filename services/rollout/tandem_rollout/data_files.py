"""Read the rows of a data set from a file, a folder or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tandem_protocol.config.rollout import PromptsConfig

from .errors import UserError
from .text_files import DELIMITERS, JSON, Row, format_of, read_text

FORMATS = ".jsonl, .json, .csv, .tsv (also with .gz, .bz2 or .zst) and .parquet"


class Rows(NamedTuple):
    rows: Iterable[Row]
    nulls_are_absent: bool
    """Whether the rows come from Arrow. Arrow gives all objects of a column the same keys, and fills them with None."""


def read_rows(config: PromptsConfig) -> Rows:
    """Return the rows of the data set that `trainer.prompts` names.

    Raises:
        UserError: the data set does not exist or cannot be read; names the file and the line. Iterating over the rows
            raises it too, because they are read lazily.
    """
    source = config.source
    file_format = format_of(source)
    if file_format not in {*DELIMITERS, *JSON, ".parquet"}:
        if Path(source).is_file():
            raise UserError(f"prompts.source {source!r} has an unknown format, expected {FORMATS}. Fix: convert it.")
        return _from_datasets(config)
    if config.subset:
        raise UserError(
            f"prompts.subset is {config.subset!r}, but prompts.source {source!r} is a file, which has no subsets. "
            "Fix: remove prompts.subset."
        )
    if file_format == ".parquet":
        return _from_datasets(config)
    return Rows(_select({"train": read_text(source, source)}, config), nulls_are_absent=False)


def _from_datasets(config: PromptsConfig) -> Rows:
    """Load rows with the `datasets` library, except CSV and JSON files, because it guesses their types."""
    import datasets  # slow to import and rarely needed

    datasets.disable_progress_bars()
    source = config.source
    try:
        if format_of(source) == ".parquet":
            builder = datasets.load_dataset_builder("parquet", data_files=source)
        else:
            builder = datasets.load_dataset_builder(source, config.subset)
        if files := _text_files(builder):
            delimiter = getattr(builder.config, "sep", None)
            requested = {name: paths for name, paths in files.items() if str(name) in config.split}
            splits = {name: _read_all(paths, delimiter) for name, paths in (requested or files).items()}
            return Rows(_select(splits, config), nulls_are_absent=False)
        builder.download_and_prepare()
        return Rows(builder.as_dataset(split=config.split), nulls_are_absent=True)
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"prompts.source {source!r} cannot be loaded: {error}. Expected a data set of the hub, or a file or folder "
            f"with {FORMATS}. Fix: correct trainer.prompts."
        ) from error


def _text_files(builder: Any) -> Mapping[str, Sequence[str]]:
    """Return the CSV or JSON files of each split. Empty if the data set has other formats."""
    if getattr(builder.config, "field", None):  # the rows are inside a larger JSON object
        return {}
    files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    formats = {format_of(path) for paths in files.values() for path in paths}
    return files if formats and formats <= {*DELIMITERS, *JSON} else {}


def _read_all(paths: Sequence[str], delimiter: str | None) -> Iterator[Row]:
    import datasets

    local = datasets.DownloadManager().download(list(paths))
    return chain.from_iterable(read_text(name, path, delimiter) for name, path in zip(paths, local, strict=True))


def _select(splits: Mapping[str, Iterable[Row]], config: PromptsConfig) -> Iterable[Row]:
    """Return the rows of `prompts.split`. It may be a slice in the notation of `datasets`, such as `train[:10%]`."""
    if config.split in splits:
        return splits[config.split]
    import datasets

    rows = {name: list(split) for name, split in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(config.split).to_absolute({k: len(v) for k, v in rows.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"prompts.split is {config.split!r}, expected one of {sorted(rows)} or a slice such as 'train[:100]' "
            f"({error})"
        ) from error
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]
