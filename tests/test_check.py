"""Bad files: what is found, to which file it is put down, and what the manifest remembers."""

import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import script
from PIL import Image
from tqdm import tqdm

import common
from data import check
from data.check import check_files, manifest_of
from data.opening import Source, open_table


def encoded(format: str, mode: str = "RGB", seed: int = 0, **options) -> bytes:
    """A smooth 48 x 32 image with some noise, as a file of that format."""
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((48, 32), Image.Resampling.BICUBIC))
    noisy = np.clip(smooth + rng.normal(0, 6, (32, 48, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


JPEG = encoded("JPEG", quality=95)


def flipped(data: bytes, position: int, bit: int = 3) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def pillow_decodes(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        return False
    return True


def write(root, contents: dict[str, bytes]) -> list[str]:
    for name, data in contents.items():
        (root / name).write_bytes(data)
    return list(contents)


def overwrite_unseen(path, data: bytes) -> None:
    """New content of the same length under the old modification time."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def manifest(tmp_path):
    return tmp_path / "run" / "files.csv"


@pytest.mark.parametrize("workers", [0, 2])
def test_good_files_of_every_format_are_good(root, manifest, workers):
    files = write(
        root,
        {
            "a.jpg": JPEG,
            "progressive.jpeg": encoded("JPEG", progressive=True),
            "grey.jpg": encoded("JPEG", "L"),
            "cmyk.jpg": encoded("JPEG", "CMYK"),
            "trailing.jpg": JPEG + b"some camera's notes",
            "b.png": encoded("PNG"),
            "c.tif": encoded("TIFF", compression="tiff_lzw"),
            "d.tiff": encoded("TIFF"),
            "e.bmp": encoded("BMP"),
            "f.webp": encoded("WEBP"),
            "png inside.jpg": encoded("PNG"),
        },
    )
    table = check_files(root, files, manifest, workers)
    assert list(table) == ["file", "bytes", "mtime_ns", "width", "height", "problem"]
    assert table["file"].tolist() == files
    assert (table["problem"] == "").all()
    assert (table["width"] == 48).all() and (table["height"] == 32).all()
    assert table["bytes"].tolist() == [(root / file).stat().st_size for file in files]
    assert table["mtime_ns"].tolist() == [(root / file).stat().st_mtime_ns for file in files]


def test_each_kind_of_damage_is_named(root, manifest):
    png = encoded("PNG")
    corpus = {
        "empty.jpg": (b"", "empty"),
        "zeros.jpg": (bytes(500), "only zeros"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", "<!DOCTYPE html"),
        "gif.jpg": (encoded("GIF"), "GIF8"),
        "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
        "no end marker.jpg": (JPEG[:-2], "truncated"),
        "header only.jpg": (JPEG[:30], "truncated"),
        "zero tail.jpg": (JPEG[:-400] + bytes(400), "truncated"),
        "hole.jpg": (JPEG[: len(JPEG) // 2] + JPEG[len(JPEG) // 2 + 300 :], "Corrupt JPEG data"),
        "checksum of pixels.png": (flipped(png, png.index(b"IEND") - 6), "broken PNG"),
        "pixels.png": (flipped(png, len(png) // 2), "broken PNG"),
        "header.png": (flipped(png, 18), "not a valid"),
        "half.png": (png[: len(png) // 2], ""),
        "half.tif": (encoded("TIFF")[:2000], ""),
        "half lzw.tif": (encoded("TIFF", compression="tiff_lzw")[:1000], ""),
        "half.bmp": (encoded("BMP")[:1000], "truncated"),
        "half.webp": (encoded("WEBP")[:200], ""),
    }
    files = write(root, {name: data for name, (data, _) in corpus.items()})
    (root / "folder.jpg").mkdir()
    words = [word for _, word in corpus.values()] + ["unreadable", "missing"]
    table = check_files(root, files + ["folder.jpg", "absent.jpg"], manifest, 2)
    for file, problem, word in zip(table["file"], table["problem"], words, strict=True):
        assert problem and word in problem, f"{file}: {problem!r}"


def test_more_than_eight_bits_are_refused_as_conversion_would_clip_them(root, manifest):
    deep = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(deep, "PNG")
    files = write(root, {"deep.png": deep.getvalue()})
    assert "1 band of uint16; 8-bit RGB" in check_files(root, files, manifest, 1).problem[0]


def test_flipped_bits_that_pillow_decodes_in_silence_are_found_and_put_down_to_their_file(root, manifest):
    first = JPEG.index(b"\xff\xda") + 14  # past the header of the scan
    damaged = [flipped(JPEG, position) for position in np.linspace(first, len(JPEG) - 3, 60).astype(int)]
    files = write(
        root,
        {
            f"{i:02d} {kind}.jpg": data
            for i, bad in enumerate(damaged)
            for kind, data in (("bad", bad), ("good", JPEG))
        },
    )
    table = check_files(root, files, manifest, 1)
    problem = table["problem"].to_numpy()
    silent = [text for text, data in zip(problem[0::2], damaged) if pillow_decodes(data)]
    assert sum(text.startswith("Corrupt JPEG data") for text in silent) >= 10
    assert (problem[1::2] == "").all()


def test_what_libtiff_prints_is_not_put_down_to_the_jpeg_after_it(root, manifest):
    tiff = encoded("TIFF", compression="tiff_lzw")
    files = write(root, {"a.tif": tiff[:60] + b"\xaa" * 300 + tiff[360:], "b.jpg": JPEG})
    problems = check_files(root, files, manifest, 1)["problem"]
    assert "LZW" in problems[0] or "code" in problems[0]
    assert problems[1] == ""


def test_odd_names_are_read_and_remembered(root, manifest):
    names = [
        "a b.jpg",
        "100%_(+36.5,-3.2).jpg",
        'it\'s "here".jpg',
        "Almería_Ñ_北.jpg",
        "NA",
        "-1.50",
        "#.jpg",
        "a;c\t",
        "a\rb.jpg",
        "line\nend.jpg",
    ]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"caf\xe9.jpg"))  # a Latin-1 name, as old archives hold
    (root / "a class").mkdir()
    files = write(root, {f"a class/{name}": JPEG for name in names} | {"NA": JPEG, "1": JPEG[:-9]})
    first = check_files(root, files, manifest, 1)
    assert first["file"].tolist() == files and (first["problem"] == "").tolist() == [True] * (
        len(files) - 1
    ) + [False]
    for file in files:
        overwrite_unseen(root / file, bytes((root / file).stat().st_size))
    pd.testing.assert_frame_equal(check_files(root, np.array(files), manifest, 1), first)


def test_a_csv_reads_back_whatever_a_name_holds(tmp_path):
    names = ["plain.jpg", "a\rb.jpg", "c\r\nd.jpg", 'e,"f".jpg', "NA"]
    written = pd.DataFrame({"file": names, "share\r": [0.1, 0.25, 1 / 3, 0.0, 1.0], "n": range(5)})
    common.write_csv(tmp_path / "rows.csv", written)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "rows.csv", keep_default_na=False), written)


def test_only_changed_files_are_decoded_again(root, manifest):
    files = write(root, {"a.jpg": JPEG, "b.jpg": JPEG, "c.jpg": JPEG[:-2]})
    check_files(root, files, manifest, 1)
    for file in files[:2]:
        overwrite_unseen(root / file, bytes(len(JPEG)))
    overwrite_unseen(root / "c.jpg", JPEG[:-4] + b"\xff\xd9")
    assert (check_files(root, files, manifest, 1)["problem"] == "").tolist() == [True, True, False]
    os.utime(root / "b.jpg")
    assert (check_files(root, files, manifest, 1)["problem"] == "").tolist() == [True, False, False]
    (root / "c.jpg").write_bytes(JPEG)
    (root / "b.jpg").unlink()
    assert check_files(root, files, manifest, 1)["problem"].tolist() == ["", "missing", ""]
    (root / "b.jpg").write_bytes(JPEG)
    assert check_files(root, files, manifest, 1)["problem"].tolist() == ["", "", ""]


def test_checking_some_files_keeps_what_is_known_of_the_others(root, manifest):
    files = write(root, {"a.jpg": JPEG, "b.jpg": JPEG})
    check_files(root, files, manifest, 1)
    (root / "a.jpg").write_bytes(JPEG[:-2])
    assert check_files(root, ["a.jpg"], manifest, 1)["file"].tolist() == ["a.jpg"]
    overwrite_unseen(root / "b.jpg", bytes(len(JPEG)))
    assert (check_files(root, files, manifest, 1)["problem"] == "").tolist() == [False, True]


def test_an_unreadable_file_is_tried_again(root, manifest):
    files = write(root, {"a.jpg": JPEG})
    table = check_files(root, files, manifest, 1).assign(rules=check.RULES)
    table.assign(problem="unreadable: Permission denied").to_csv(manifest, index=False)
    assert check_files(root, files, manifest, 1)["problem"].tolist() == [""]


def test_a_changed_file_is_remembered_as_it_is_now(root, manifest):
    files = write(root, {"a.jpg": JPEG})
    check_files(root, files, manifest, 1)
    os.utime(root / "a.jpg", ns=(5, 5))
    check_files(root, files, manifest, 1)
    overwrite_unseen(root / "a.jpg", bytes(len(JPEG)))
    assert check_files(root, files, manifest, 1)["problem"].tolist() == [""], "not decoded again"


def test_what_a_decoder_says_makes_a_jpeg_bad_and_no_other(root, manifest, monkeypatch):
    picture = check.picture
    monkeypatch.setattr(check, "picture", lambda data: os.write(2, b"a word\n") and picture(data))
    files = write(root, {"a.jpg": JPEG, "b.png": encoded("PNG")})
    assert check_files(root, files, manifest, 1)["problem"].tolist() == ["a word", ""]


def test_a_picture_that_memory_had_no_room_for_is_tried_again(root, manifest, monkeypatch):
    def full(data):
        raise MemoryError

    files = write(root, {"a.jpg": JPEG})
    with monkeypatch.context() as patch:
        patch.setattr(check, "picture", full)
        assert check_files(root, files, manifest, 1)["problem"].tolist() == ["unreadable: not enough memory"]
    assert check_files(root, files, manifest, 1)["problem"].tolist() == [""]


def test_a_folder_has_one_manifest_by_whatever_path_it_is_named(root, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    names = {manifest_of(folder, tmp_path) for folder in (root, tmp_path / "link", Path("images"))}
    assert len(names) == 1 and manifest_of(tmp_path, tmp_path) not in names


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "\0\1\2",
        lambda text: "epoch,loss\n1,2.5\n",
        lambda text: text[:-10],
        lambda text: text[: -len("Image is incomplete or truncated,2\n")],
        lambda text: text + '"',
        lambda text: text + text.split("\n", 1)[1],
        lambda text: text.replace("mtime_ns", "time"),
        lambda text: text.replace(",48,", ",x,"),
        lambda text: text.replace(",rules", ""),
    ],
)
def test_a_damaged_manifest_is_rebuilt(root, manifest, damage):
    files = write(root, {"a.jpg": JPEG, "b.jpg": JPEG[:-2]})
    table = check_files(root, files, manifest, 1)
    good = manifest.read_text()
    assert damage(good) != good
    manifest.write_text(damage(good))
    pd.testing.assert_frame_equal(check_files(root, files, manifest, 1), table)
    assert manifest.read_text() == good


def test_an_interrupted_write_leaves_the_old_manifest(root, manifest, monkeypatch):
    files = write(root, {"a.jpg": JPEG})
    check_files(root, files, manifest, 1)
    before = manifest.read_bytes()
    os.utime(root / "a.jpg")
    to_csv = pd.DataFrame.to_csv

    def stop_half_way(table, path, **options):
        to_csv(table.head(0), path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        check_files(root, files, manifest, 1)
    assert manifest.read_bytes() == before


def test_the_calling_process_keeps_its_random_state_and_its_stderr(root, manifest, capfd):
    weights = torch.randn(600, 600, requires_grad=True)
    (weights @ weights).sum().backward()  # starts torch's threads before the workers are forked
    state = torch.get_rng_state()
    table = check_files(root, write(root, {"hole.jpg": JPEG[:700] + JPEG[900:]}), manifest, 0)
    assert "Corrupt JPEG data" in table["problem"][0]
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_checked_before_an_interrupt_is_kept(root, manifest, monkeypatch, capsys):
    class Bar(tqdm):
        def update(self, count):
            updates.append(count)
            if len(updates) == 3:
                raise KeyboardInterrupt

    updates = []
    files = write(root, {f"{name}.jpg": JPEG for name in "abcde"})
    monkeypatch.setattr(check, "CHUNK", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(check, "tqdm", Bar)
        check_files(root, files, manifest, 1)
    assert "3 of 5 files are checked; the next check goes on" in capsys.readouterr().err
    assert list(pd.read_csv(manifest).file) == files[:3]
    decoded, decode_all = [], check._decode_all
    monkeypatch.setattr(
        check, "_decode_all", lambda root, some, *rest: decoded.extend(some) or decode_all(root, some, *rest)
    )
    assert (check_files(root, files, manifest, 1).problem == "").all() and decoded == files[3:]


def test_the_manifest_is_written_on_the_way(root, manifest, monkeypatch):
    files, written = write(root, {f"{name}.jpg": JPEG for name in "abc"}), []
    write_manifest = check._write_manifest

    def count_and_write(path, table):
        written.append(len(table))
        write_manifest(path, table)

    monkeypatch.setattr(check, "CHUNK", 1)
    monkeypatch.setattr(check, "SAVE_SECONDS", -1)
    monkeypatch.setattr(check, "_write_manifest", count_and_write)
    check_files(root, files, manifest, 1)
    assert written == [1, 2, 3, 3] and list(pd.read_csv(manifest).file) == files


def test_a_killed_worker_is_one_line(root, manifest, monkeypatch):
    files = write(root, {"a.jpg": JPEG})
    monkeypatch.setattr(check, "picture", lambda data: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(common.DataError, match="killed after 0 files: is the memory full"):
        check_files(root, files, manifest, 1)
    assert not manifest.exists()


def test_no_files_make_an_empty_table(root, manifest):
    assert check_files(root, [], manifest, 2).empty


@pytest.fixture
def command(root, tmp_path, capfd):
    """Run the command on `root`; returns (exit code, what it printed, what it wrote on stderr)."""

    def run(*flags, folder=root):
        with common.one_line_errors():
            code = check.main(
                [str(folder), "--workers", "1", "--cache", str(tmp_path / "cache"), *map(str, flags)]
            )
        return code, *capfd.readouterr()

    return run


def test_the_command_takes_folders_that_are_no_classes(root, command):
    write(root, {"a.jpg": JPEG})
    (root / "site").mkdir()
    write(root / "site", {"b.jpg": JPEG, "bad.jpg": b""})
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2
    code, out, _ = command("--split", "none")
    assert code == 1 and "1 of 3 files are bad" in out


def test_the_command_lists_the_bad_files(root, command, tmp_path):
    write(root, {"a.jpg": JPEG, "b.jpg": JPEG})
    assert command()[0] == 0
    (root / "b.jpg").write_bytes(b"")
    code, out, _ = command()
    assert code == 1 and "b.jpg: empty" in out and "1 of 2 files are bad" in out
    assert sorted(os.listdir(root)) == ["a.jpg", "b.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "images"]
    assert pd.read_csv(manifest_of(root, tmp_path / "cache"))["file"].tolist() == ["a.jpg", "b.jpg"]


def test_the_command_refuses_in_one_line(root, command, capfd):
    write(root, {"a.jpg": JPEG})
    for folder in (root / "nowhere", root / "a.jpg"):
        with pytest.raises(SystemExit) as stopped:
            command(folder=folder)
        assert stopped.value.code == 2 and capfd.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as stopped:
        command("--manifest", root / "files.csv")
    assert stopped.value.code == 2 and "inside the data" in capfd.readouterr().err
    assert os.listdir(root) == ["a.jpg"]


def test_what_was_found_is_said_though_the_manifest_cannot_be_written(root, command, tmp_path):
    write(root, {"a.jpg": JPEG, "b.jpg": b""})
    (tmp_path / "file").write_text("no folder")
    code, out, err = command("--manifest", tmp_path / "file" / "files.csv")
    assert code == 1 and "b.jpg: empty" in out and "1 of 2 files are bad" in out
    assert err.count("cannot be written") == 1
    (root / "b.jpg").unlink()
    assert command("--manifest", tmp_path / "file" / "files.csv")[0] == 0
    assert command("--manifest", tmp_path / ("long" * 99))[0] == 0


def test_several_sizes_are_said(root, command, tmp_path, capfd):
    write(root, {"a.jpg": JPEG, "b.jpg": JPEG, "c.png": encoded("PNG")})
    Image.new("RGB", (20, 10)).save(root / "d.png")
    said = "1 of 4 images are not 48 x 32 px, the most frequent of 2 sizes, and are scaled to that"
    assert f"{said} (20 to 48 px wide, 10 to 32 px high)" in command()[1]
    open_table(Source(str(root), "pure", 60, 32, tmp_path / "cache", 1, False), tmp_path / "bad.csv")
    assert said in capfd.readouterr().out


def test_names_that_no_encoding_holds_are_printed(root, tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        write(root, {name: b""})
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    done = script("-m", "data.check", root, "--cache", tmp_path / "cache", PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and "udce9.jpg: empty" in done.stdout and not done.stderr, done


def test_a_manifest_made_under_other_rules_is_made_anew(root, manifest, monkeypatch):
    files = write(root, {"a.jpg": JPEG})
    check_files(root, files, manifest, 1)
    overwrite_unseen(root / "a.jpg", bytes(len(JPEG)))
    assert check_files(root, files, manifest, 1)["problem"].tolist() == [""]
    monkeypatch.setattr(check, "RULES", check.RULES + 1)
    assert check_files(root, files, manifest, 1)["problem"].tolist() == ["holds only zeros"]


@pytest.mark.parametrize("files", [{b"caf\xe9.jpg": b""}, {b"caf\xe9.jpg": JPEG, b"two.jpg": JPEG}])
def test_names_in_another_encoding_are_listed(root, tmp_path, files):
    """Of bad files and of duplicates, written and read back."""
    try:
        write(root, {os.fsdecode(name): content for name, content in files.items()} | {"good.jpg": JPEG})
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    source = Source(str(root), "pure", 60, 32, tmp_path / "cache", 1, skip_bad_files=True)
    for _ in range(2):
        table, _ = open_table(source, tmp_path / "bad.csv")
    assert len(table.files) == sum(map(bool, files.values())) + 1
    (listed,) = [*tmp_path.glob("bad.csv")] or tmp_path.glob("cache/duplicates-*.csv")
    assert b"caf\xe9.jpg" in listed.read_bytes()
