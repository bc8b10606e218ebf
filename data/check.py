"""List the bad image files of a dataset, before training: every file is decoded in full, once.

    python -m data.check FOLDER
    python -m data.check FOLDER --cache /scratch/cache     # where training is given the same --cache
    python -m data.check FOLDER --manifest files.csv       # a CSV of every file, good and bad

Exit code 0: every file is good; 1: some are bad, each is listed; 2: there is nothing to check. What is
found is remembered in a CSV, the manifest, which a training run with the same --cache reads instead of
decoding again.
"""

import hashlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from common import DataError
from data.pixels import RULES, common_size, picture

COLUMNS = {
    "file": "str",
    "bytes": "int64",
    "mtime_ns": "int64",
    "width": "int64",
    "height": "int64",
    "problem": "str",
}
KEY, RESULT = list(COLUMNS)[:3], list(COLUMNS)[3:]
WRITTEN = COLUMNS | {"rules": "int64"}  # of the manifest: which rules of data.pixels gave the result
SAVE_SECONDS = 60  # between two writes of the manifest
CHUNK = 64  # files per task: few enough for the bar to move, enough to hide the cost of the queue


def check_files(root: Path, files: Sequence[str], manifest: Path, workers: int) -> pd.DataFrame:
    """Decode every file with the decoder that training uses, and say what is wrong with it.

    files are posix paths below root. Returns one row per file, in their order: file, bytes, mtime_ns, width,
    height (pixels of the upright picture, 0 where it is not read), problem ('' for a good file; what
    `data.pixels.read_picture` refuses is bad here, in the same words). Files whose bytes and mtime_ns still
    match their row in `manifest` are not decoded again; a manifest that is absent, damaged, foreign or of
    other rules is rebuilt. It is written whole or not at all; where it cannot be written, a line on stderr
    says so and the result is returned all the same. There is always a worker process, whatever `workers`
    says, as this process keeps its stderr; its random state is left alone.

    Found: files that are missing, empty, truncated, no image or no 8-bit picture, all damage that PNG's
    checksums cover, and JPEG streams that libjpeg rejects or complains about. Not found: damage that leaves a
    valid stream. Of 2,000 EuroSAT JPEGs with one bit flipped in the compressed pixels, 22.9 % are found (by
    Pillow alone 0.6 %); of those whose mean pixel error exceeds 2 grey levels, 73.6 %. With the bit in the
    header, 54.8 % are found (by Pillow alone 37.0 %); most of the rest have a wrong quantisation table. A
    512-byte block of zeros or noise in a JPEG is found in 88-100 % of cases. Of flipped bits in LZW TIFF and
    WebP files, 11-24 % are found; in uncompressed TIFF and BMP files, 1 %.
    """
    known = _read_manifest(manifest)
    table = pd.DataFrame([(str(file), *_stat(root, file)) for file in files], columns=KEY)
    table = table.astype({name: COLUMNS[name] for name in KEY}).merge(known, how="left", on=KEY)
    new = table["problem"].isna()
    if new.any():
        results: list[tuple[int, int, str]] = []
        saved = time.monotonic()
        try:
            for chunk in _decode_all(root, table["file"][new], workers):
                results += chunk
                if time.monotonic() - saved > SAVE_SECONDS:
                    _remember(table, new, results, known, manifest)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            checked = f"{len(results):,} of {new.sum():,} files are checked"
            print(f"{checked}; the next check goes on", file=sys.stderr)
            raise
        finally:
            _remember(table, new, results, known, manifest)
    return table.astype(COLUMNS)


def _remember(
    table: pd.DataFrame, new: pd.Series, results: list, known: pd.DataFrame, manifest: Path
) -> None:
    """Put the results of the first of the new files into the table and the manifest: what was decoded before
    this process is killed is not decoded again."""
    if not results:
        return
    rows = table.index[new][: len(results)]
    table.loc[rows, RESULT] = pd.DataFrame(results, columns=RESULT, index=rows)
    found = table[table["problem"].notna()]
    _write_manifest(manifest, pd.concat([found, known]).drop_duplicates("file").astype(COLUMNS))


def manifest_of(root: Path, cache: Path) -> Path:
    """The check's manifest of the images below `root`: one file a folder, by its resolved path."""
    name = str(root.resolve()).encode(errors="surrogateescape")
    return cache / f"manifest-{hashlib.sha256(name).hexdigest()[:12]}.csv"


def _stat(root: Path, file: str) -> tuple[int, int]:
    try:
        stat = os.stat(os.path.join(root, file))
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _read_manifest(path: Path) -> pd.DataFrame:
    """Without the rows of unreadable files: a change of permissions does not touch bytes or mtime."""
    try:
        known = pd.read_csv(path, dtype=WRITTEN, keep_default_na=False, encoding_errors="surrogateescape")
        whole = path.read_bytes().endswith(b"\n")  # pandas takes a row that was cut short for a good file
    except (OSError, ValueError):  # absent or damaged: pandas' parser errors are ValueErrors
        return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    ours = whole and list(known) == list(WRITTEN) and known["file"].is_unique
    if not ours or (known["rules"] != RULES).any():
        return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    return known.loc[~known["problem"].str.startswith("unreadable"), list(COLUMNS)]


def _write_manifest(path: Path, table: pd.DataFrame) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with common.replacing(path) as partial:
            common.save_csv(partial, table.assign(rules=RULES))
    except OSError as error:
        why = error.strerror or error
        print(f"warning: {path} cannot be written ({why}): the next check starts anew", file=sys.stderr)


def _decode_all(root: Path, files: list[str], workers: int) -> Iterator[list[tuple[int, int, str]]]:
    """What `_decode` says of the files, in their order, CHUNK by CHUNK."""
    # A DataLoader, as its workers end with this process even when it is killed. Its base seed comes from its
    # own generator: drawn from the global one, a run with a manifest would differ from the first one.
    paths = [os.path.join(root, file) for file in files]
    loader = DataLoader(
        paths,
        CHUNK,
        num_workers=max(workers, 1),
        collate_fn=_decode_chunk,
        worker_init_fn=_capture_stderr,
        generator=torch.Generator(),
    )
    done = 0
    with tqdm(total=len(files), desc="checking files", unit="file", disable=None) as bar:
        try:
            for chunk in loader:
                done += len(chunk)
                yield chunk
                bar.update(len(chunk))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{root}: a decoding process was killed after {done:,} files: is the memory full? "
                "Try fewer --workers"
            ) from None


def _capture_stderr(worker: int) -> None:
    """Point this worker's file descriptor 2 at a file of its own, so that a message belongs to one picture.

    JPEG carries no checksum, and decoders fill damage with garbage in silence. libjpeg however says on the
    process's stderr when a stream does not add up ("Corrupt JPEG data: …"): any message makes a JPEG bad.
    """
    warnings.simplefilter("ignore")  # Python's own would land in the same file
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)


def _decode_chunk(paths: list[str]) -> list[tuple[int, int, str]]:
    return [_decode(path) for path in paths]


def _decode(path: str) -> tuple[int, int, str]:
    """(width, height, problem) of one file, in a process whose stderr is captured."""
    os.lseek(2, 0, os.SEEK_SET)  # forget what the previous file made a decoder say
    try:
        data = Path(path).read_bytes()
        _, height, width = picture(data).shape
    except FileNotFoundError:
        return 0, 0, "missing"
    except OSError as error:
        return 0, 0, f"unreadable: {error.strerror}"
    except DataError as error:
        said = _message() if str(error).startswith("damaged") else ""  # libtiff prints what it means
        return 0, 0, said or str(error)
    except MemoryError:
        return 0, 0, "unreadable: not enough memory"
    return width, height, _message() if data.startswith(b"\xff\xd8") else ""


def _message() -> str:
    """The first line that the decoder of this file wrote on the captured stderr."""
    size = os.lseek(2, 0, os.SEEK_CUR)
    os.lseek(2, 0, os.SEEK_SET)
    return os.read(2, size).decode(errors="replace").partition("\n")[0]


def build_parser() -> common.Parser:
    """The flags of `python -m data.check`."""
    parser = common.Parser(__doc__, usage="%(prog)s FOLDER [flags]")
    parser.prog = "python -m data.check"
    parser.add_argument("folder", type=Path, help="a dataset in any layout that training takes")
    parser.add_argument(
        "--split", choices=["paper", "none"], default="paper", help="none: folders are no classes"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="directory of the manifest")
    parser.add_argument("--manifest", type=Path, help="write the CSV of every file here instead")
    parser.add_argument(
        "--workers", type=common.number(int, 1), default=common.cores(), help="processes that decode"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """List the bad files of a dataset; 1 where there are any, else 0."""
    from data.tables import load_table  # here: what stands above works without the layouts

    args = build_parser().parse_args(argv)
    data = load_table(args.folder, split=args.split)
    for note in data.notes:
        print(f"note: {note}")
    manifest = args.manifest or manifest_of(data.root, args.cache)
    common.refuse_special(manifest, "--manifest")
    common.refuse_inside(manifest, args.folder, "--cache or --manifest")
    table = check_files(data.root, list(data.files), manifest, args.workers)
    bad = table[table["problem"] != ""]
    for file, problem in zip(bad["file"], bad["problem"], strict=True):
        print(f"{file}: {problem}")
    sizes = sizes_line(table[table["problem"] == ""])
    if sizes:
        print(f"note: {sizes}")
    print(f"{len(bad):,} of {len(table):,} files are bad")
    if os.path.exists(manifest):  # a name that is too long does not exist either
        print(f"every file is listed in {manifest}")
    return int(len(bad) > 0)


def sizes_line(good: pd.DataFrame) -> str:
    """Which sizes there are, where they are several: all are scaled to the most frequent one."""
    sizes = good.value_counts(["width", "height"])
    if len(sizes) < 2:
        return ""
    width, height = common_size(good)[::-1]
    wide, high = (f"{good[side].min()} to {good[side].max()}" for side in ("width", "height"))
    others = len(good) - sizes[width, height]
    return (
        f"{others:,} of {len(good):,} images are not {width} x {height} px, the most frequent of "
        f"{len(sizes):,} sizes, and are scaled to that ({wide} px wide, {high} px high)"
    )


if __name__ == "__main__":
    with common.one_line_errors():
        sys.exit(main())
