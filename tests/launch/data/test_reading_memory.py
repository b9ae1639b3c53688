"""Reading takes memory for the documents at hand, not for the file: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from launch.data import readers

NUM_DOCUMENTS = 64
MEGABYTE = 10**6

READ = """
import sys
import pyarrow.parquet
from launch.data import readers

def peak():  # the process's own, where ru_maxrss may still be that of the one which started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def read(paths):
    source = sys.argv[1]
    named = {} if source == "read_whole_files" else {"field": "text"}
    return [(len(found["text"]), found["text"][:4]) for found in getattr(readers, source)(paths, **named)]

read(sys.argv[2:3])  # what is loaded or started once
before = peak()
found = read(sys.argv[3:])
assert found == [(10**6, f"{number:04}") for number in range(len(found))], found
print(len(found), peak() - before)
"""


def documents(count: int) -> list[str]:
    return [f"{number:04} long ".ljust(100, "x") * (MEGABYTE // 100) for number in range(count)]


def write(kind: str, texts: list[str], stem: Path) -> list[str]:
    """Paths of files that hold the texts."""
    path = stem.with_suffix("." + kind.replace("json array", "json"))
    if kind == "parquet":
        # One row group, and a page for each document: by default Arrow puts 1024 in a page, whatever their size.
        plain = {"use_dictionary": False, "compression": "none", "write_batch_size": 1}
        parquet.write_table(pa.table({"text": texts}), path, **plain)
    elif kind == "txt":
        paths = [stem.with_name(f"{stem.name}{number:04}.txt") for number in range(len(texts))]
        for each, text in zip(paths, texts, strict=True):
            each.write_text(text)
        return [str(each) for each in paths]
    else:
        records = [json.dumps({"text": text}) for text in texts]
        path.write_text("\n".join(records) if kind == "jsonl" else "[" + ",\n".join(records) + "]")
    return [str(path)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("reader", "kind"),
    [("read_json", "jsonl"), ("read_json", "json array"), ("read_parquet", "parquet"), ("read_whole_files", "txt")],
)
def test_the_peak_is_far_below_the_size_of_what_is_read(tmp_path: Path, reader: str, kind: str) -> None:
    texts = documents(NUM_DOCUMENTS)
    paths = write(kind, texts[:1], tmp_path / "first")[:1] + write(kind, texts, tmp_path / "all")
    command = [sys.executable, "-c", READ, reader, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    count, growth = map(int, done.stdout.split())
    assert count == NUM_DOCUMENTS
    assert growth < NUM_DOCUMENTS * MEGABYTE // 2, f"{kind}: {growth / MEGABYTE:.0f} MB more"


def test_few_rows_of_parquet_are_decoded_at_a_time(tmp_path: Path) -> None:
    short = ["short"] * 1000
    for name, texts, most in (("long", documents(9), 4), ("mixed", short + documents(9), 32), ("short", short, 32)):
        [path] = write("parquet", texts, tmp_path / name)
        sizes = [len(column) for column in readers._batches(parquet.ParquetFile(path), "text")]
        assert (sum(sizes), max(sizes)) == (len(texts), most)
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert list(readers.read_parquet([str(tmp_path / "empty.parquet")], "text")) == []
