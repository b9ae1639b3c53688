"""Look at, check and export checkpoints: `python -m tools.ckpt list|verify|export`.

`list` and `verify` read files only; `export` writes the weights of the model, and nothing else, to one safetensors
file, a tensor at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launch.checkpoint.files import naming_errors, readable_bytes, sync_folder
from launch.checkpoint.manifest import (
    BAD_PREFIX,
    MANIFEST_NAME,
    Damaged,
    Manifest,
    check_sizes,
    moved_aside,
    published,
    read_manifest,
    verify,
)
from launch.checkpoint.retention import stale
from launch.errors import EXIT_CONFIG, CheckpointError, LaunchError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look at, check and export checkpoints.")

MODEL_PREFIX = "model."
_SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its checkpoints folder.")]
PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run folder for all of its.")]


@app.command("list")
def list_checkpoints(run: RunArgument) -> None:
    """Show the checkpoints of a run; sizes are checked, content is not (`verify` does that)."""
    with _errors_in_one_line():
        folder = _checkpoints_folder(run)
        table = Table("checkpoint", "step", "processes", "size", "saved (UTC)", "state", box=None)
        for step, path in published(folder):
            table.add_row(path.name, str(step), *_describe(path))
        for step, path in moved_aside(folder):
            table.add_row(path.name, str(step), "-", "-", "-", "damaged, moved aside")
        for path in stale(folder):
            table.add_row(path.name, "-", "-", "-", "-", "unfinished; the next start removes it")
        if table.row_count == 0:
            typer.echo(f"no checkpoints in {folder}")
        else:
            Console(width=None if os.isatty(1) else 160).print(table)


@app.command("verify")
def verify_checkpoints(path: PathArgument) -> None:
    """Check every byte of a checkpoint, or of all of a run; status 78 and the bad file's name if one is damaged."""
    with _errors_in_one_line():
        folders = [path] if _is_checkpoint(path) else [one for _, one in published(_checkpoints_folder(path))]
        if not folders:
            raise CheckpointError(f"no checkpoint in {path}; expected folders named step-000123")
        num_damaged = 0
        for folder in folders:
            try:
                manifest = verify(folder)
                typer.echo(f"{folder}: whole: {len(manifest.files)} files, {readable_bytes(manifest.num_bytes)}")
            except Damaged as reason:
                num_damaged += 1
                typer.echo(f"{folder}: damaged: {reason}")
        if num_damaged:
            raise CheckpointError(f"{num_damaged} of {len(folders)} checkpoints damaged")


@app.command("export")
def export_weights(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint folder, or a run folder for its newest one.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write; it must not exist.")],
) -> None:
    """Write the model's weights to one safetensors file, under the names of `Decoder.state_dict()`."""
    with _errors_in_one_line():
        if out.exists():
            raise LaunchUsage(f"{out} exists; it is not overwritten: choose another name or remove it")
        if not _is_checkpoint(path):
            path = _newest(path)
        try:
            manifest = verify(path)
        except Damaged as reason:
            raise CheckpointError(f"{path} is damaged and not exported: {reason}") from reason
        num_tensors = _export(path, manifest, out)
        typer.echo(f"{out}: {num_tensors} tensors, {readable_bytes(out.stat().st_size)}, step {manifest.step}")


def _newest(run: Path) -> Path:
    found = published(_checkpoints_folder(run))
    if not found:
        raise CheckpointError(f"no checkpoint in {run}; expected folders named step-000123")
    return max(found)[1]


class LaunchUsage(LaunchError):
    """The command line asks for something that is not done."""

    exit_status = EXIT_CONFIG


def _export(path: Path, manifest: Manifest, out: Path) -> int:
    import torch  # here, because `list` and `verify` do not need it

    from launch.checkpoint.loading import read_metadata, read_tensors

    metadata = read_metadata(path, manifest)
    entries: dict[str, Any] = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if name.startswith(MODEL_PREFIX)
    }
    if not entries:
        raise CheckpointError(f"{path} has no tensor named {MODEL_PREFIX}*; it is not a checkpoint of a trainer")
    header = _safetensors_header(entries, manifest.step)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        with naming_errors(out.absolute().parent, f"write {out}", manifest.num_bytes):
            with open(part, "xb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for name, entry in entries.items():
                    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
                    read_tensors(path, metadata, {name: tensor})
                    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(part, out)
            sync_folder(out.absolute().parent)
    finally:
        part.unlink(missing_ok=True)
    return len(entries)


def _safetensors_header(entries: dict[str, Any], step: int) -> bytes:
    """JSON header: name -> dtype, shape, offsets in the data that follows; padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "step": str(step)}}
    offset = 0
    for name, entry in entries.items():
        dtype = entry.properties.dtype
        key = str(dtype).removeprefix("torch.")
        if key not in _SAFETENSORS_DTYPES:
            raise CheckpointError(f"{name} has dtype {key}, which safetensors files cannot hold")
        end = offset + entry.size.numel() * dtype.itemsize
        header[name.removeprefix(MODEL_PREFIX)] = {
            "dtype": _SAFETENSORS_DTYPES[key],
            "shape": list(entry.size),
            "data_offsets": [offset, end],
        }
        offset = end
    content = json.dumps(header).encode()
    return content + b" " * (-len(content) % 8)


def _describe(path: Path) -> tuple[str, str, str, str]:
    try:
        manifest = read_manifest(path)
    except Damaged as reason:
        return "-", "-", "-", f"damaged: {reason}"
    try:
        check_sizes(path, manifest)
        state = "complete"
    except Damaged as reason:
        state = f"damaged: {reason}"
    created = manifest.created.removesuffix("+00:00").replace("T", " ")
    return str(manifest.world_size), readable_bytes(manifest.num_bytes), created, state


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST_NAME).exists() or path.name.startswith(("step-", f"{BAD_PREFIX}step-"))


def _checkpoints_folder(run: Path) -> Path:
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a folder; expected a run folder with checkpoints/ in it")
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except LaunchError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_status) from error


if __name__ == "__main__":
    app()
