"""Take photos from requests of strangers within bounds: of bytes, files, pixels, time, and requests at once.

What is too much is refused as early as it is known: the whole request by its announced length, a file by its size, a
picture by the size in its header, before it is decoded. What is held meanwhile is bounded: of each file one megabyte in
memory and the rest in a temporary file, and as many decoded pictures as there are decoding threads.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from geostream.errors import BadInput
from geostream.locating.photos import read_photo

FIELD = "photos"
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What a request may contain, and how many there may be.

    Attributes:
        file_bytes: Of a photo.
        request_bytes: Of all that a request sends.
        files: Photos of a request.
        pixels: Of a photo. A 50-megapixel camera's are just below.
        requests: That are answered at the same time; others are asked to come again.
        silence: Seconds for which a client may send nothing.
        seconds: That a client has to send its request.
    """

    file_bytes: int = 25 * MIB
    request_bytes: int = 50 * MIB
    files: int = 10
    pixels: int = 50_000_000
    requests: int = 16
    silence: float = 15.0
    seconds: float = 120.0


class BadUpload(BadInput):
    """A request or a photo is refused.

    Args:
        message: One line for the person who sent it.
        status: The HTTP status that says it to a program.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Upload(Protocol):
    """What is needed of an uploaded file."""

    filename: str | None
    size: int | None

    @property
    def file(self) -> BinaryIO:
        """The content."""


async def receive_photos(request: Request, limits: Limits) -> list[UploadFile]:
    """Receive the photos of a request. The caller closes them.

    Args:
        request: A request of type multipart/form-data, with photos in the field "photos".
        limits: What it may contain.

    Raises:
        BadUpload: It is of another type, too large, has too many photos or none, or comes too slowly.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadUpload(f"send photos as multipart/form-data, in the field {FIELD!r}", 415)
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.request_bytes:
        raise _too_large(limits)
    parser = MultiPartParser(
        request.headers, _chunks(request, limits), max_files=limits.files, max_fields=limits.files, max_part_size=MIB
    )
    try:
        async with asyncio.timeout(limits.seconds):
            form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise BadUpload(f"more than {limits.files} photos in a request; send them in several", 413) from error
        raise BadUpload(f"not a whole multipart/form-data request ({error.message})", 400) from error
    except TimeoutError as error:
        raise BadUpload("the request came too slowly; try again on a faster connection", 408) from error
    photos = [value for name, value in form.multi_items() if name == FIELD and isinstance(value, UploadFile)]
    if not photos:
        await form.close()
        raise BadUpload(f"no photo in the field {FIELD!r}; choose one", 400)
    return photos


async def _chunks(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """Yield the body as it comes; give up where it is too large, or where nothing comes."""
    stream, received = request.stream(), 0
    while True:
        async with asyncio.timeout(limits.silence):
            chunk = await anext(stream, None)
        if chunk is None:
            return
        received += len(chunk)
        if received > limits.request_bytes:
            raise _too_large(limits)
        yield chunk


def _too_large(limits: Limits) -> BadUpload:
    return BadUpload(f"the request is larger than {limits.request_bytes // MIB} MB; send fewer photos at once", 413)


def decode_photo(upload: Upload, limits: Limits) -> Image.Image:
    """Decode an uploaded photo, upright and in RGB, with its EXIF data.

    Args:
        upload: The file.
        limits: How large it may be.

    Raises:
        BadUpload: It is too large, or no picture that can be read.
    """
    name = shown_name(upload.filename)
    if (upload.size or 0) > limits.file_bytes:
        raise BadUpload(f"{name}: larger than {limits.file_bytes // MIB} MB; choose a smaller copy", 413)
    data = upload.file.read()
    try:
        with Image.open(io.BytesIO(data)) as header:
            pixels = header.width * header.height
    except Exception:  # of many types; the reader below says what is wrong in a line
        pixels = 0
    if pixels > limits.pixels:
        limit = limits.pixels // 1_000_000
        raise BadUpload(f"{name}: {pixels // 1_000_000} megapixels; choose a copy of up to {limit}", 413)
    try:
        return read_photo(data, name)
    except BadInput as error:
        raise BadUpload(str(error), 415) from error


def shown_name(filename: str | None) -> str:
    """Return how a photo is called in answers: on one line, and not longer than is useful."""
    return " ".join((filename or "").split())[:200] or "photo"
