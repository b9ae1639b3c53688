"""Every source as one Hugging Face `datasets` stream of candidates: local files, the standard library, the hub.

Local files never touch the network and write nothing outside the cache folder. Candidates come one after the other;
whole files are read a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.data.files import file_stats, find_files, python_files
from launch.data.readers import Candidate, from_record, read_json, read_parquet, read_whole_files
from launch.errors import DataError

if TYPE_CHECKING:
    from launch.config import DataConfig


class Source:
    """Candidates of one configuration, in an order that depends on the data only; can be read any number of times."""

    def __init__(self, config: DataConfig, cache_dir: Path, *, show_progress: bool = False) -> None:
        """Find the files or open the hub dataset; `show_progress` is for downloads from the hub.

        Raises:
            DataError: files are missing, or the hub dataset cannot be opened.
        """
        self._config = config
        self._hub = config.source == "hub"
        cache = str(cache_dir / "huggingface")
        if self._hub:
            with _progress_bars(show_progress):
                self._dataset = _open_hub(config, cache)
        else:
            files = python_files() if config.source == "python" else find_files(config.source, config.paths)
            self._files = files
            self._dataset = _open_local(config, files, cache)

    @property
    def skips_bad_text(self) -> bool:
        """Whether damaged records are left out whatever `on_error` says: nobody here can mend the interpreter's files,
        and some of them are there to test other encodings."""
        return self._config.source == "python"

    @property
    def is_remote(self) -> bool:
        """Whether every record that is read ahead may have to be fetched."""
        return self._hub

    def stats(self) -> list[list[Any]] | None:
        """Size and time of every file, or None where there are no files to look at."""
        return None if self._hub else file_stats(self._files)

    def candidates(self, skip: int = 0) -> Iterator[Candidate]:
        """Candidates in order, without the first `skip`.

        Raises:
            DataError: reading broke down, as opposed to one damaged record, which is a candidate with a problem.
        """
        dataset = self._dataset.skip(skip) if skip else self._dataset
        if not self._hub:
            yield from dataset
            return
        label = f"{self._config.name}[{self._config.split}]"
        row = skip
        try:
            for record in dataset:
                row += 1
                yield from_record(record, self._config.field, f"{label}:row {row}")
        except DataError:
            raise
        except Exception as error:  # whatever the network and any file format can raise
            raise DataError(f"{label}: reading stopped after row {row}: {_brief(error)}") from error


def _open_local(config: DataConfig, files: list[Path], cache: str) -> Any:
    # Not IterableDataset.from_generator, which is the same but cannot be told to keep out of the home folder.
    from datasets.io.generator import GeneratorDatasetInputStream

    readers = {"json": read_json, "parquet": read_parquet, "text": read_whole_files, "python": read_whole_files}
    arguments: dict[str, Any] = {"paths": tuple(map(str, files))}
    if config.source in ("json", "parquet"):
        arguments["field"] = config.field
    stream = GeneratorDatasetInputStream(
        generator=readers[config.source], gen_kwargs=arguments, cache_dir=cache, streaming=True
    )
    return stream.read()


def _open_hub(config: DataConfig, cache: str) -> Any:
    import datasets

    if config.name is None:
        raise DataError("data.name: source hub needs the name of a dataset, got null")
    try:
        dataset = datasets.load_dataset(
            config.name, config.subset, split=config.split, streaming=config.streaming, cache_dir=cache
        )
    except Exception as error:  # a name, a split, the network, a login, a file: datasets has an error class for each
        raise DataError(
            f"data.name: cannot open the hub dataset {config.name!r} (subset {config.subset!r}, split "
            f"{config.split!r}): {_brief(error)}. Check name, subset and split, and that this machine reaches "
            "huggingface.co; for local files use data.source=json, parquet or text"
        ) from error
    columns = dataset.column_names
    if columns is not None:
        if config.field not in columns:
            raise DataError(
                f"data.field: the hub dataset {config.name!r} has no column {config.field!r}; "
                f"columns present: {', '.join(map(repr, columns))}"
            )
        dataset = dataset.select_columns([config.field])
    return dataset


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """`datasets` draws its bars on every process unless told otherwise; put its switch back afterwards."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
