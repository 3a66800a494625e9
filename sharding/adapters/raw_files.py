"""How raw folders are read, whatever dataset lies in them: lists, numbers, and the files that a list names.

Decides what is tolerated everywhere, so that each adapter is only its dataset's layout: byte order marks, any line
ends, blank lines and trailing blanks; names that differ from the file's by case, by how an accent is encoded, or by
``.jpg`` where the file is ``.png``; folders in another case, and the whole data set one or two folders further
down, as archives unpack. A number that is none, or a path that leads out of the raw folder, is refused with file and
line. The cost of looking names up tolerantly is one listing of each folder, held while its lists are read.
"""

from __future__ import annotations

import csv
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from geostream.errors import BadInput, MissingRaw
from sharding.places import IMAGE_SUFFIX, RawImage


@dataclass
class Lines:
    """The lines of a text list that are not blank, with their numbers; ``name`` is how messages call the file."""

    name: str
    lines: list[tuple[int, str]] = field(default_factory=list)

    def where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def cells(self) -> Iterator[tuple[str, list[str]]]:
        """``file:line`` and the cells of each line of a CSV file. Raises BadInput."""
        for number, line in self.lines:
            where = self.where(number)
            yield where, split_cells(line, where)


def split_cells(line: str, where: str) -> list[str]:
    """The cells of a line of comma-separated values, quoted or not, without blanks around them. Raises BadInput."""
    try:
        # Blanks behind a closing quote are refused by the strict reader; the other takes a quote left open for closed.
        [cells] = csv.reader([re.sub(r'"\s+(,|$)', r'"\1', line)], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise BadInput(f"{where}: no line of comma-separated values ({error}); mend it") from error
    return [cell.strip() for cell in cells]


def read_lines(root: Path, path: Path) -> Lines:
    """Read a list as the field's files come: UTF-8 with or without BOM, any line ends, blank lines.

    Raises BadInput where the file is missing or is not UTF-8 text.
    """
    path = located(root, path.relative_to(root).as_posix())
    name = path.relative_to(root).as_posix()
    try:
        text = path.read_text(encoding="utf-8-sig")  # text mode makes \r\n and \r into \n
    except OSError as error:
        raise MissingRaw(f"{path}: cannot read it ({error.strerror}); is the raw folder complete?") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    numbered = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    return Lines(name, [(number, line) for number, line in numbered if line])


def read_number(text: str, what: str, where: str) -> float:
    """A finite number; ``what`` it should be and ``where`` it stands are for the message. Raises BadInput."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{where}: {text!r} is not {what}; mend the line")
    return number


def read_position(texts: Sequence[str], what: str, where: str) -> tuple[float, float]:
    """Latitude and longitude in degrees; ``what`` holds them. Raises BadInput where they are not on Earth."""
    north, east = (read_number(text, "a latitude or longitude", where) for text in texts)
    if abs(north) > 90 or abs(east) > 180:
        raise BadInput(f"{where}: {what} lies at latitude {north}, longitude {east}: not on Earth; mend it")
    return north, east


def find_root(raw: Path, holds: str, marks: Sequence[str]) -> Path:
    """Return the folder in which the data set lies: ``raw``, or the only one in it, or in one of its folders.

    Args:
        raw: as the person named it.
        holds: what the folder should hold, in words.
        marks: paths of which it has one at least.

    Raises:
        BadInput: where there is no such folder, where several in it could be meant, or where its parent is.
    """
    if not raw.is_dir():
        raise MissingRaw(f"{raw}: no such folder; name the folder that holds {holds}")
    level = [raw]
    for _ in range(3):
        found = [folder for folder in level if _has(folder, marks)]
        if len(found) > 1:
            names = ", ".join(str(folder) for folder in found)
            raise BadInput(f"{raw}: several folders in it hold {holds} ({names}); name one of them")
        if found:
            return found[0]
        level = [Path(entry.path) for folder in level for entry in _folders_in(folder)]
    if _has(raw.absolute().parent, marks):
        raise BadInput(f"{raw}: only a part of the data set; name the folder above it, which holds {holds}")
    return raw


def _has(folder: Path, marks: Sequence[str]) -> bool:
    return any(located(folder, mark).exists() for mark in marks)


def _folders_in(folder: Path) -> list[os.DirEntry[str]]:
    """Its folders, but for what archives of a Mac bring along; none where it cannot be listed."""
    try:
        return [entry for entry in list_folder(folder) if entry.is_dir() and entry.name != "__MACOSX"]
    except BadInput:
        return []


def located(root: Path, path: str) -> Path:
    """Return where ``path`` lies below ``root``, upper and lower case alike; as it is written where it does not.

    Raises BadInput where several folders or files fit equally well.
    """
    at = root
    for part in PurePosixPath(path).parts:
        if not (at / part).exists() and at.is_dir():
            alike = [entry.name for entry in list_folder(at) if _folded(entry.name) == _folded(part)]
            if len(alike) > 1:
                raise BadInput(f"{at}: {part} could be any of {', '.join(alike)}; keep one of them")
            part = alike[0] if alike else part
        at = at / part
    return at


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, but for hidden ones. Raises BadInput where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise _unlisted(folder, error) from error


def first_located(root: Path, paths: Iterable[str]) -> Path | None:
    """Return the first of the ``paths`` that lies below ``root`` (:func:`located`); None where none does."""
    return next((path for path in (located(root, one) for one in paths) if path.exists()), None)


def _unlisted(folder: Path, error: OSError) -> BadInput:
    return MissingRaw(f"{folder}: cannot list it ({error.strerror}); is the raw folder complete?")


def readable_name(entry: os.DirEntry[str]) -> str:
    """The name of an entry that becomes part of the layout. Raises BadInput where it is not UTF-8."""
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{entry.path!a}: its name is not UTF-8; rename it") from error
    return entry.name


class FolderIndex:
    """The image names in a folder, from one listing; finds a file under the name a list gives it, or nearly so.

    A folder that is not there holds nothing: what lists name in it is missing.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        inside = folder.relative_to(root).as_posix()
        self._before = "" if inside == "." else f"{inside}/"
        try:
            self._names = frozenset(os.listdir(folder) if folder.exists() else ())  # noqa: PTH208, names alone
        except OSError as error:
            raise _unlisted(folder, error) from error

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        """Names by what is alike in those that may be meant. Most lists name their files exactly: made when needed."""
        stems: dict[str, list[str]] = {}
        for name in sorted(self._names):
            if IMAGE_SUFFIX.search(name) and not name.startswith("."):
                stems.setdefault(_folded(IMAGE_SUFFIX.sub("", name)), []).append(name)
        return stems

    def find(self, name: str, named: str) -> RawImage:
        """The image a list calls ``name`` at ``named`` (file:line); not present where no file fits.

        Fitting is the very name; else one that differs by case or the encoding of accents; else one with another
        suffix of an image. Raises BadInput where several files fit equally well.
        """
        if name in self._names:
            return RawImage(f"{self._before}{name}", named)
        alike = self._stems.get(_folded(IMAGE_SUFFIX.sub("", name)), [])
        fitting = [one for one in alike if _folded(one) == _folded(name)] or alike
        if len(fitting) > 1:
            raise BadInput(
                f"{named}: {name} could be any of {', '.join(self._before + one for one in fitting)}; "
                "write the name as the file's, upper and lower case alike"
            )
        return RawImage(self._before + (fitting[0] if fitting else name), named, present=bool(fitting))


class Folders:
    """Finds images that lists name by their path below the raw folder; lists each folder once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, FolderIndex] = {}

    def find(self, path: str, named: str) -> RawImage:
        """As :meth:`FolderIndex.find`. Raises BadInput for a path that is no image's or leads out of the folder."""
        plain = PurePosixPath(path.replace("\\", "/"))  # lists that were made on Windows
        if plain.is_absolute() or ".." in plain.parts or not IMAGE_SUFFIX.search(plain.name):
            raise BadInput(f"{named}: {path!r} is not the path of a .jpg or .png file below the raw folder; mend it")
        folder = str(plain.parent)
        if folder not in self._folders:
            self._folders[folder] = FolderIndex(self.root, located(self.root, folder))
        return self._folders[folder].find(plain.name, named)


def _folded(name: str) -> str:
    """Equal for names that a person reads as the same."""
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
