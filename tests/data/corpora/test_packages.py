"""Packages: fetched by the real command lines, kept with a checksum, read in memory."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from data.corpora import packages
from data.corpora.packages import BrokenPackageError, PackageError, fetch, package_files, sha256_of
from tests.data.corpora.made import deb, npm

FILES = {"usr/share/a": b"one", "usr/share/doc/b": b"two"}


@pytest.mark.parametrize("compression", ["xz", "gz", ""])
def test_reads_debian_packages(tmp_path: Path, compression: str) -> None:
    path = deb(tmp_path / "it_1_all.deb", FILES, compression)
    assert dict(package_files(path)) == FILES
    assert list(package_files(path, lambda name: name.endswith("b"))) == [
        ("usr/share/doc/b", b"two")
    ]


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb makes the package")
def test_reads_packages_of_ubuntu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = tmp_path / "tree" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: it\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    (tmp_path / "tree" / "file").write_text("one")
    path = tmp_path / "it.deb"
    made = subprocess.run(
        ["dpkg-deb", "-Zzstd", "-b", tmp_path / "tree", path], capture_output=True
    )
    if made.returncode:
        pytest.skip("this dpkg-deb cannot write zstd")
    assert dict(package_files(path)) == {"file": b"one"}
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    with pytest.raises(
        BrokenPackageError, match=r"`dpkg-deb --fsys-tarfile .*` failed with status"
    ):
        list(package_files(path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokenPackageError, match="zstd, and there is no dpkg-deb"):
        list(package_files(path))


def test_packages_that_cannot_be_read(tmp_path: Path) -> None:
    whole = deb(tmp_path / "it.deb", {"a": bytes(range(256)) * 40}).read_bytes()

    def fails(content: bytes, words: str, name: str = "it.deb") -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenPackageError, match=words):
            list(package_files(tmp_path / name))

    fails(b"no archive", "not a Debian package")
    fails(whole[:70], "no data.tar in it, or cut short; delete it and build again")
    fails(whole[:-20], "no data.tar in it, or cut short")
    fails(whole[:8] + b"x" * 200, "no data.tar in it, or cut short")
    middle = len(whole) // 2
    fails(whole[:middle] + bytes(16) + whole[middle + 16 :], "damaged package .*; delete it")
    content = npm(tmp_path / "it.tgz", {"a": os.urandom(1000)}).read_bytes()
    fails(content[:-200], "damaged package", "it.tgz")
    fails(b"", "damaged package", "it.tgz")
    with pytest.raises(FileNotFoundError):  # not the package's fault
        list(package_files(tmp_path / "none.deb"))


def client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of two packages and one npm package, behind scripts that act like the clients."""
    archive = tmp_path / "archive"
    for name in ("one", "two"):
        deb(archive / f"{name}_1_all.deb", FILES)
    npm(archive / "three-1.0.0.tgz", FILES)
    client(
        tmp_path / "bin",
        "apt-get",
        f"""
echo "$@" >> {tmp_path}/calls
case "$2" in
update) exit 100;;
esac
shift 2
for name in "$@"; do
    [ -f {archive}/"$name"_1_all.deb ] || bad="$bad $name"
done
for name in $bad; do echo "E: Unable to locate package $name" >&2; done
[ -z "$bad" ] || exit 100
for name in "$@"; do cp {archive}/"$name"_1_all.deb .; done
""",
    )
    client(tmp_path / "bin", "npm", f"cp {archive}/three-1.0.0.tgz . 2>&1 || exit 7\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


def test_fetches_once(tmp_path: Path, bin_folder: Path) -> None:
    cache, said = tmp_path / "cache", []
    (cache / ".fetching-old").mkdir(parents=True)  # a build that was killed
    names = ["one", "npm:three@1.0.0", "two"]
    found, left_out = fetch(names, cache, said.append)
    assert list(found) == names
    assert left_out == {}
    assert said == ["fetching 2 packages with apt-get", "fetching three@1.0.0 with npm"]
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        name + end
        for name in ("one_1_all.deb", "two_1_all.deb", "three-1.0.0.tgz")
        for end in ("", ".sha256")
    )
    for name, package in found.items():
        assert (package.name, package.sha256) == (name, sha256_of(package.path))
    assert dict(found["one"].files(lambda name: True)) == FILES

    # damaged since: only that one is fetched again
    (tmp_path / "calls").unlink()
    found["two"].path.write_bytes(b"!<arch>\n")
    said.clear()
    again, _ = fetch(names, cache, said.append)
    assert again == found
    assert len(said) == 2
    assert "two_1_all.deb is not what was downloaded (its sha256 differs)" in said[0]
    assert (tmp_path / "calls").read_text() == "--quiet download two\n"


def test_a_file_put_there_by_hand_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    path = deb(tmp_path / "one_1_all.deb", FILES)
    found, _ = fetch(["one"], tmp_path, print)
    assert found["one"].path == path


def test_one_error_for_each_package(tmp_path: Path, bin_folder: Path) -> None:
    said: list[str] = []
    with pytest.raises(PackageError) as error:
        fetch(["one", "none", "nil", "two"], tmp_path / "cache", said.append)
    first, second = str(error.value).splitlines()
    assert first.startswith(
        "package none: `apt-get download none` failed: E: Unable to locate package none "
        "(apt-get update failed too: run it as root); this system's package sources do not have it"
    )
    assert second.startswith("package nil: ")
    assert first.endswith("Build without it by --exclude-source, or put its .deb into the cache.")
    # what could be fetched is kept for the next build
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.deb")) == [
        "one_1_all.deb", "two_1_all.deb",
    ]  # fmt: skip


def test_clients_that_fail(
    tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(
        bin_folder, "apt-get", "echo 'E: Failed to fetch one_1 Connection refused' >&2; exit 100"
    )
    with pytest.raises(PackageError, match=r"package one: .* Connection refused.*; is there a net"):
        fetch(["one"], tmp_path / "cache", print)
    client(bin_folder, "apt-get", "exit 3")
    with pytest.raises(PackageError, match=r"package one: .* failed: status 3 .*; is there a net"):
        fetch(["one"], tmp_path / "cache", print)
    (tmp_path / "archive" / "three-1.0.0.tgz").unlink()
    with pytest.raises(PackageError, match=r"`npm pack --silent three@1.0.0` failed with status 7"):
        fetch(["npm:three@1.0.0"], tmp_path / "cache", print)
    monkeypatch.setenv("PATH", "")
    assert fetch(["npm:three@1.0.0"], tmp_path / "cache", print) == (
        {}, {"npm:three@1.0.0": "npm is not installed"},
    )  # fmt: skip
    with pytest.raises(
        PackageError, match=r"package one: this system has no apt-get .* one_\*.deb"
    ):
        fetch(["one"], tmp_path / "cache", print)


def test_says_how_much_has_arrived(
    tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "PROGRESS_SECONDS", 0.1)
    client(bin_folder, "npm", f"cp {tmp_path}/archive/three-1.0.0.tgz .; sleep 0.5\n")
    said: list[str] = []
    fetch(["npm:three@1.0.0"], tmp_path / "cache", said.append)
    assert "0.0 MB fetched so far" in said
