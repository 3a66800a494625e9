"""Read raw folders, whatever data set lies in them: lists, numbers, and the files that a list names.

The same is tolerated in every data set: byte order marks, any line ends, blank lines; names that differ from the file's
by case, by how an accent is encoded, or by ``.jpg`` where the file is ``.png``; folders in another case, and the whole
data set one or two folders further down, as archives unpack. What is no number, and a path that leads out of the raw
folder, are errors that name file and line. Each folder is listed once, and the listing held while its lists are read.
The raw folder may lie on a local disk or on a store (:mod:`sharding.raw_path`).
"""

from __future__ import annotations

import csv
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from geostream.errors import BadInput, MissingRaw
from sharding.places import IMAGE_SUFFIX, RawImage
from sharding.raw_path import Entry, RawPath, StorePath, entries, read_text, stamps
from sharding.sources import Stamp

AnyPath = TypeVar("AnyPath", bound=RawPath)


@dataclass
class Lines:
    """Hold the lines of a text list that are not blank.

    Attributes:
        name: the file's path below the raw folder.
        lines: number (from 1) and text of each.
    """

    name: str
    lines: list[tuple[int, str]] = field(default_factory=list)

    def where(self, number: int) -> str:
        """Return ``file:line`` for messages."""
        return f"{self.name}:{number}"

    def cells(self) -> Iterator[tuple[str, list[str]]]:
        """Yield ``file:line`` and the cells of each line of a CSV file; raise BadInput as :func:`split_cells`."""
        for number, line in self.lines:
            where = self.where(number)
            yield where, split_cells(line, where)


def split_cells(line: str, where: str) -> list[str]:
    """Return the cells of a line of comma-separated values, quoted or not, without blanks around them.

    Args:
        line: the line.
        where: its ``file:line``.

    Raises:
        BadInput: its quotes do not match.
    """
    try:
        # Blanks behind a closing quote are refused by the strict reader; the other takes a quote left open for closed.
        [cells] = csv.reader([re.sub(r'"\s+(,|$)', r'"\1', line)], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise BadInput(f"{where}: no line of comma-separated values ({error}); mend it") from error
    return [cell.strip() for cell in cells]


def read_lines(root: RawPath, path: RawPath) -> Lines:
    """Read a text list: UTF-8 with or without byte order mark, any line ends.

    Args:
        root: the raw folder.
        path: of the list, below it; upper and lower case are alike.

    Raises:
        MissingRaw: the file is missing or unreadable.
        BadInput: it is not UTF-8 text.
    """
    path = located(root, path.relative_to(root).as_posix())
    name = path.relative_to(root).as_posix()
    try:
        text = read_text(path)
    except OSError as error:
        raise MissingRaw(f"{path}: cannot read it ({error.strerror}); is the raw folder complete?") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    numbered = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    return Lines(name, [(number, line) for number, line in numbered if line])


def read_number(text: str, what: str, where: str) -> float:
    """Return a finite number.

    Args:
        text: what should be one.
        what: it should be, for the message.
        where: its ``file:line``.

    Raises:
        BadInput: it is no number, infinite or NaN.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{where}: {text!r} is not {what}; mend the line")
    return number


def read_position(texts: Sequence[str], what: str, where: str) -> tuple[float, float]:
    """Return latitude and longitude.

    Args:
        texts: the two, in degrees.
        what: what holds them, for the message.
        where: its ``file:line``.

    Raises:
        BadInput: they are no numbers, or not on Earth.
    """
    north, east = (read_number(text, "a latitude or longitude", where) for text in texts)
    if abs(north) > 90 or abs(east) > 180:
        raise BadInput(f"{where}: {what} lies at latitude {north}, longitude {east}: not on Earth; mend it")
    return north, east


def find_root(raw: AnyPath, holds: str, marks: Sequence[str]) -> AnyPath:
    """Return the folder in which the data set lies: ``raw``, or the only one in it, or in one of its folders.

    Args:
        raw: as the person named it.
        holds: what the folder should hold, in words.
        marks: paths of which it has one at least.

    Raises:
        MissingRaw: there is no folder ``raw``.
        BadInput: several folders could be meant, or ``raw`` is only a part of the data set.
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
        level = [folder / entry.name for folder in level for entry in _folders_in(folder)]
    if isinstance(raw, Path) and _has(raw.absolute().parent, marks):
        raise BadInput(f"{raw}: only a part of the data set; name the folder above it, which holds {holds}")
    return raw


def _has(folder: RawPath, marks: Sequence[str]) -> bool:
    return any(located(folder, mark).exists() for mark in marks)


def _folders_in(folder: RawPath) -> list[Entry]:
    """Return its folders, without what archives of a Mac bring along; none where it cannot be listed."""
    try:
        return [entry for entry in list_folder(folder) if entry.is_dir() and entry.name != "__MACOSX"]
    except BadInput:
        return []


def located(root: AnyPath, path: str) -> AnyPath:
    """Return where a path lies below a folder, upper and lower case alike.

    Args:
        root: the folder.
        path: the path below it, as it is written.

    Returns:
        The path of what is there; where nothing fits, the path as it is written.

    Raises:
        BadInput: several folders or files fit equally well.
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


def list_folder(folder: RawPath) -> list[Entry]:
    """Return the entries of a folder that are not hidden, by name; raise MissingRaw where it cannot be listed."""
    try:
        return sorted((one for one in entries(folder) if not one.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise _unlisted(folder, error) from error


def listed_stamp(entry: Entry) -> Stamp | None:
    """Return what the listing of a store has of a file; None of a local one."""
    return entry.stamp() if isinstance(entry, StorePath) else None


def first_located(root: AnyPath, paths: Iterable[str]) -> AnyPath | None:
    """Return the first of the ``paths`` that lies below ``root`` (:func:`located`); None where none does."""
    return next((path for path in (located(root, one) for one in paths) if path.exists()), None)


def _unlisted(folder: RawPath, error: OSError) -> BadInput:
    return MissingRaw(f"{folder}: cannot list it ({error.strerror}); is the raw folder complete?")


def readable_name(entry: Entry) -> str:
    """Return the name of an entry, which becomes part of the layout; raise BadInput where it is not UTF-8."""
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{entry.path!a}: its name is not UTF-8; rename it") from error
    return entry.name


class FolderIndex:
    """Find images in a folder by the names that lists give them, from one listing.

    A folder that is not there holds nothing: what lists name in it is missing.

    Args:
        root: the raw folder.
        folder: the folder, below it.

    Raises:
        MissingRaw: it is there and cannot be listed.
    """

    def __init__(self, root: RawPath, folder: RawPath) -> None:
        inside = folder.relative_to(root).as_posix()
        self._before = "" if inside == "." else f"{inside}/"
        try:
            self._names = stamps(folder) if folder.exists() else {}
        except OSError as error:
            raise _unlisted(folder, error) from error

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        """Names by what is alike in those that may be meant; made when needed, since most lists name files exactly."""
        stems: dict[str, list[str]] = {}
        for name in sorted(self._names):
            if IMAGE_SUFFIX.search(name) and not name.startswith("."):
                stems.setdefault(_folded(IMAGE_SUFFIX.sub("", name)), []).append(name)
        return stems

    def find(self, name: str, named: str) -> RawImage:
        """Return the image that a list names.

        The very name fits best, then one that differs by case or the encoding of accents, then one with another suffix
        of an image.

        Args:
            name: the file's name in the list.
            named: its ``file:line``.

        Returns:
            The image; not present where no file fits.

        Raises:
            BadInput: several files fit equally well.
        """
        if name in self._names:
            return RawImage(f"{self._before}{name}", named, stamp=self._names[name])
        alike = self._stems.get(_folded(IMAGE_SUFFIX.sub("", name)), [])
        fitting = [one for one in alike if _folded(one) == _folded(name)] or alike
        if len(fitting) > 1:
            raise BadInput(
                f"{named}: {name} could be any of {', '.join(self._before + one for one in fitting)}; "
                "write the name as the file's, upper and lower case alike"
            )
        if not fitting:
            return RawImage(self._before + name, named, present=False)
        return RawImage(self._before + fitting[0], named, stamp=self._names[fitting[0]])


class Folders:
    """Find images by the paths below the raw folder that lists give them; list each folder once.

    Args:
        root: the raw folder.
    """

    def __init__(self, root: RawPath) -> None:
        self.root = root
        self._folders: dict[str, FolderIndex] = {}

    def find(self, path: str, named: str) -> RawImage:
        """Return the image that a list names, as :meth:`FolderIndex.find` does.

        Args:
            path: below the raw folder, with "/" or backslashes.
            named: its ``file:line``.

        Raises:
            BadInput: it is not an image's, leads out of the raw folder, or several files fit equally well.
        """
        plain = PurePosixPath(path.replace("\\", "/"))  # lists that were made on Windows
        if plain.is_absolute() or ".." in plain.parts or not IMAGE_SUFFIX.search(plain.name):
            raise BadInput(f"{named}: {path!r} is not the path of a .jpg or .png file below the raw folder; mend it")
        folder = str(plain.parent)
        if folder not in self._folders:
            self._folders[folder] = FolderIndex(self.root, located(self.root, folder))
        return self._folders[folder].find(plain.name, named)


def _folded(name: str) -> str:
    """Return what is equal for names that a person reads as the same."""
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
