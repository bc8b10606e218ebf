"""Opening folders as people unpack them: they load rightly, or are refused by name."""

import argparse
import os

import pytest

from data.opening import Source, digest_of, open_table
from data.tables import DataError


def source(root, tmp_path, **options):
    defaults = {"data": str(root), "layout": "pure", "scenes": 60, "size": 32, "cache": tmp_path / "cache"}
    return Source(**{**defaults, "workers": 1, "skip_bad_files": False, **options})


def test_a_source_reads_the_common_flags():
    flags = argparse.Namespace(
        data=None, scenes=60, size=32, cache="runs/cache", workers=2, skip_bad_files=True
    )
    opened = Source.of(flags, "mixed")
    assert opened.split == "paper" and opened.splits is None and opened.layout == "mixed"
    flags.splits, flags.split = "lists", "spatial"
    assert Source.of(flags, "pure")[-2:] == ("lists", "spatial")


def test_bad_files_are_listed_and_refused_or_left_out(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for label in ("1_Water (deep)", "10_Café"):
        (copy / label).mkdir()
        for file in sorted((folder / label).iterdir()):
            os.link(file, copy / label / file.name)
    cut = copy / "10_Café" / "cut.jpg"
    cut.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="1 of 61 files do not decode .*cut.jpg"):
        open_table(source(copy, tmp_path), tmp_path / "bad.csv")
    assert "cut.jpg" in (tmp_path / "bad.csv").read_text()
    table, checked = open_table(source(copy, tmp_path, skip_bad_files=True), tmp_path / "bad.csv")
    assert len(table) == len(checked) == 60 and (checked.file == table.files).all()


def test_the_digest_changes_with_names_sizes_dates_and_labels(folder, tmp_path):
    table, checked = open_table(source(folder, tmp_path), tmp_path / "bad.csv")
    first = digest_of(table, checked)
    assert first == digest_of(table, checked) and len(first) == 16
    later = checked.assign(mtime_ns=checked.mtime_ns + (checked.index == 5))
    assert digest_of(table, later) != first
    assert digest_of(table, checked.assign(bytes=checked.bytes + 1)) != first
    assert digest_of(table.rows(slice(1, None)), checked[1:]) != first
    moved = table.rows(slice(None))
    moved.labels[3] = 2
    assert digest_of(moved, checked) != first
