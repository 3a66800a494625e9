"""What an S3 server refuses is told by its own code, with the advice that fits, on one line."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from geostream.errors import AlreadyExists, Changed, NotFound, Refused, StoreError, Unanswered, Unsupported
from geostream.store import Store, conditional
from geostream.store.conditional import PROBE, probe
from geostream.store.errors import explained
from tests.scripted_server import Answer, Bucket, Request, ScriptedServer, s3_error, scripted_server

KEY, SECRET, TOKEN = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "a-session-token"
SIGNATURE = "67f7a9aa6a2d9c8a1e9b3b0d4a5c6d7e8f90123456789abcdef0123456789abc"
# What servers repeat of a request.
REPEATED = (
    f"<AWSAccessKeyId>{KEY}</AWSAccessKeyId><SignatureProvided>{SIGNATURE}</SignatureProvided>"
    f"<StringToSign>AWS4-HMAC-SHA256</StringToSign><Token-0>{TOKEN}</Token-0><HostId>h</HostId>"
)


async def _stream(store: Store) -> None:
    async for _ in store.stream_range("x", 0, 5):
        pass


ASK: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("x"),
    "range": lambda store: store.read_range("x", 0, 5),
    "stream": lambda store: asyncio.run(_stream(store)),
    "list": lambda store: store.list(),
    "check": lambda store: store.check(),
    "write": lambda store: store.write("x", b"1"),
    "write large": lambda store: store.write("x", bytes(12 * 2**20)),
    "write new": lambda store: store.write("x", b"1", if_absent=True),
    "delete": lambda store: store.delete("x"),
    "size": lambda store: store.size("x"),
    "columns": lambda store: store.read_table("x", columns=["a"]),
}


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    values = {"ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "SESSION_TOKEN": TOKEN, "CONFIG_FILE": "/none"}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("geostream.store.store.RETRIES", 0)
    monkeypatch.setattr("geostream.store.conditional.FIRST_PAUSE", 0.001)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    with scripted_server(lambda _: Answer(404)) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr(conditional, "_sound", set())  # an earlier server may have had the same port
        monkeypatch.setattr(conditional, "_weak", {})
        yield running


def refused(ask: Callable[[], object], kind: type[StoreError] = StoreError) -> str:
    """The one line of exactly this kind of error."""
    with pytest.raises(StoreError) as error:
        ask()
    assert type(error.value) is kind
    line = str(error.value)
    assert "\n" not in line and "<" not in line and "Debug" not in line and len(line) < 500
    assert line.startswith("s3://bucket/a")
    for secret in (KEY, SECRET, TOKEN, SIGNATURE, "AWS4-HMAC"):
        assert secret not in line
    return line


CLOCK = "The difference between the request time and the current time is too large."
REGION = "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-south-2'"
CODES: list[tuple[int, str, str, str, type[StoreError], tuple[str, ...]]] = [
    (403, "RequestTimeTooSkewed", CLOCK, "", Refused, ("clock",)),
    (400, "ExpiredToken", "The provided token has expired.", "", Refused, ("expired", "AWS_")),
    (400, "TokenRefreshRequired", "The provided token must be refreshed.", "", Refused, ("expired",)),
    (400, "InvalidToken", "The provided token is malformed", "", Refused, ("AWS_SESSION_TOKEN",)),
    (403, "InvalidAccessKeyId", f"The key {KEY} you provided does not exist", "", Refused, ("AWS_ACCESS_KEY_ID",)),
    (403, "SignatureDoesNotMatch", "Check your key", "", Refused, ("AWS_SECRET_ACCESS_KEY",)),
    (403, "AllAccessDisabled", "All access to this object has been disabled.", "", Refused, ("provider",)),
    (403, "AccountProblem", "There is a problem with your account", "", Refused, ("account",)),
    (
        400,
        "AuthorizationHeaderMalformed",
        REGION,
        "<Region>eu-south-2</Region>",
        StoreError,
        ("AWS_REGION", "eu-south-2"),
    ),
    (400, "AuthorizationHeaderMalformed", REGION, "", StoreError, ("AWS_REGION", "eu-south-2")),
    (400, "AuthorizationHeaderMalformed", "a non-empty Access Key must be provided", "", StoreError, ("non-empty",)),
    (400, "IllegalLocationConstraintException", "The eu-south-2 location", "", StoreError, ("eu-south-2",)),
    (403, "SecondLevelDomainForbidden", "Use OSS third level domain.", "", StoreError, ("addressing_style",)),
    (403, "PathStyleDomainForbidden", "Use virtual-hosted style", "", StoreError, ("addressing_style",)),
    (404, "NoSuchBucket", "The specified bucket does not exist", "", StoreError, ("bucket does not exist",)),
    (400, "InvalidBucketName", "The specified bucket is not valid.", "", StoreError, ("URL",)),
    (403, "QuotaExceeded", "", "", StoreError, ("quota",)),
    (507, "XMinioStorageFull", "Storage backend has reached its minimum", "", StoreError, ("full",)),
    (400, "EntityTooLarge", "Your proposed upload exceeds the maximum", "", StoreError, ("--shard-mib",)),
    (403, "InvalidObjectState", "The operation is not valid", "", StoreError, ("archived",)),
    (400, "KMS.DisabledException", "arn:aws:kms:x:1:key/k is disabled.", "", StoreError, ("KMS", "is disabled")),
    (400, "KMS.KMSInvalidStateException", "", "", StoreError, ("KMS",)),
    (503, "SlowDown", "Please reduce your request rate.", "", Unanswered, ("busy",)),
    (500, "InternalError", "We encountered an internal error.", "", Unanswered, ()),
    (429, "TooManyRequests", "", "", Unanswered, ()),
    (400, "RequestTimeout", "Your socket connection was not read from", "", Unanswered, ()),
    (409, "OperationAborted", "A conflicting operation is in progress", "", Unanswered, ()),
    (418, "UnheardOf", f"Signature={SIGNATURE} &amp; {SECRET} of {KEY} are odd", "", StoreError, ("are odd",)),
    (403, "UnheardOf", "A new rule", "", Refused, ("A new rule", "AWS_ACCESS_KEY_ID")),
    (401, "UnheardOf", "", "", Refused, ("AWS_ACCESS_KEY_ID",)),
    (409, "UnheardOf", "Not in this state", "", StoreError, ("Not in this state",)),
]


@pytest.mark.parametrize(
    ("status", "code", "message", "more", "kind", "named"),
    CODES,
    ids=[f"{one[0]}-{one[1]}" for one in CODES],
)
def test_codes(
    server: ScriptedServer,
    status: int,
    code: str,
    message: str,
    more: str,
    kind: type[StoreError],
    named: tuple[str, ...],
) -> None:
    server.answer = lambda _: s3_error(status, code, message, REPEATED + more)
    store = Store.open("s3://bucket/a")
    for name in ("read", "range", "stream", "list", "check", "write", "write large", "delete"):
        if (name, status) == ("delete", 404):
            continue  # what is not there needs no removing
        line = refused(lambda name=name: ASK[name](store), kind)  # type: ignore[misc]
        assert code in line
        assert all(word in line for word in named)
        assert ("access refused" in line) is (kind is Refused)


@pytest.mark.parametrize(
    ("ask", "right"),
    [
        ("read", "s3:GetObject"),
        ("range", "s3:GetObject"),
        ("stream", "s3:GetObject"),
        ("list", "s3:ListBucket"),
        ("check", "s3:ListBucket"),
        ("write", "s3:PutObject"),
        ("write large", "s3:PutObject"),
        ("write new", "s3:PutObject"),
        ("delete", "s3:DeleteObject"),
    ],
)
def test_what_is_denied(server: ScriptedServer, ask: str, right: str) -> None:
    said = "User: arn:aws:iam::123456789012:user/reader is not authorized"
    server.answer = lambda _: s3_error(403, "AccessDenied", said, REPEATED)
    line = refused(lambda: ASK[ask](Store.open("s3://bucket/a")), Refused)
    assert "AccessDenied" in line and right in line and said in line


def test_denied_without_a_signature(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    server.answer = lambda _: s3_error(403, "AccessDenied")
    assert "AWS_SKIP_SIGNATURE" in refused(Store.open("s3://bucket/a").check, Refused)


@pytest.mark.parametrize("ask", ["size", "columns"])
@pytest.mark.parametrize(
    ("status", "kind", "named"),
    [
        (400, Refused, ("400", "HEAD", "region")),
        (403, Refused, ("403", "HEAD", "s3:GetObject", "s3:ListBucket")),
        (404, NotFound, ()),
        (405, StoreError, ("405",)),
        (501, StoreError, ("501",)),
        (503, Unanswered, ("503",)),
    ],
)
def test_an_answer_without_a_body(
    server: ScriptedServer, ask: str, status: int, kind: type[StoreError], named: tuple[str, ...]
) -> None:
    server.answer = lambda _: Answer(status)
    line = refused(lambda: ASK[ask](Store.open("s3://bucket/a")), kind)
    assert all(word in line for word in named)


@pytest.mark.parametrize("ask", ["read", "list", "write", "delete", "size"])
def test_another_region(server: ScriptedServer, ask: str) -> None:
    server.answer = lambda _: s3_error(301, "PermanentRedirect", "use the specified endpoint")
    line = refused(lambda: ASK[ask](Store.open("s3://bucket/a")))
    assert "PermanentRedirect" in line and "AWS_REGION" in line


@pytest.mark.parametrize("body", [b"<!doctype html><p>\n\nnone<p>", b"", b'{"error": "x"}'])
def test_what_is_no_s3_server(server: ScriptedServer, body: bytes) -> None:
    server.answer = lambda _: Answer(200, body)
    assert "AWS_ENDPOINT_URL" in refused(Store.open("s3://bucket/a").list)
    server.answer = lambda _: Answer(400, body)
    assert "400" in refused(lambda: Store.open("s3://bucket/a").read("x"))
    server.answer = lambda _: Answer(403, body)
    assert "403" in refused(lambda: Store.open("s3://bucket/a").read("x"), Refused)


@pytest.mark.parametrize("ask", ["range", "stream"])
def test_a_server_that_sends_no_ranges(server: ScriptedServer, ask: str) -> None:
    server.answer = lambda _: Answer(
        200, b"0123456789", {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    )
    assert "range" in refused(lambda: ASK[ask](Store.open("s3://bucket/a")), Unsupported)


def test_a_panic_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """No setting comes that far; should the library fail so elsewhere, it is told like any other failure."""
    client = S3Store("bucket", config={"endpoint": "127.0.0.1:9", "region": "x"}, credential_provider=_some)

    def ask() -> None:
        with explained("s3://bucket/a"):
            obstore.get(client, "x")

    assert "obstore" in refused(ask)
    assert "panicked" in capfd.readouterr().err


def _some() -> Any:
    return {"access_key_id": "a", "secret_access_key": "b", "token": None, "expires_at": None}


# only where there is none


def puts(server: ScriptedServer) -> list[bool]:
    """Of each put, whether it was conditional."""
    return [one.is_conditional for one in server.requests if one.method == "PUT"]


NO_HEADER = "A header you provided implies functionality that is not implemented"
UNKNOWING = [(501, "NotImplemented", NO_HEADER), (501, "", ""), (400, "NotImplemented", NO_HEADER)]
UNKNOWING += [(400, "InvalidArgument", "If-None-Match is not supported"), (400, "InvalidRequest", "")]


@pytest.mark.parametrize(("status", "code", "message"), UNKNOWING)
def test_a_server_without_conditional_puts(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, status: int, code: str, message: str
) -> None:
    """Found out once: from then on, and in other stores of the bucket, it is looked first."""
    answer = s3_error(status, code, message) if code else Answer(status, b"<html>")
    bucket = Bucket(put=lambda request: answer if request.is_conditional else None)
    server.answer = bucket.answer
    store = Store.open("s3://bucket/a")
    with caplog.at_level(logging.WARNING, "geostream"):
        store.write("x", b"1", if_absent=True)
        assert puts(server) == [True, False]
        with pytest.raises(AlreadyExists):
            store.write("x", b"2", if_absent=True)
        store.child("b").write("y", b"3", if_absent=True)
    assert puts(server) == [True, False, False]
    assert bucket.objects == {"a/x": b"1", "a/b/y": b"3"}
    [line] = [one.getMessage() for one in caplog.records]
    assert "s3://bucket" in line and (code or str(status)) in line and "\n" not in line


def test_a_server_that_ignores_the_condition(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    bucket = Bucket(heeds=False)
    bucket.objects["a/x"] = b"another's"
    server.answer = bucket.answer
    store = Store.open("s3://bucket/a")
    with pytest.raises(AlreadyExists):  # also before it is known for what it is
        store.write("x", b"1", if_absent=True)
    with caplog.at_level(logging.WARNING, "geostream"):
        store.write("y", b"2", if_absent=True)
        assert puts(server) == [True, True]
        with pytest.raises(AlreadyExists):
            store.write("y", b"3", if_absent=True)
        store.write("z", b"4", if_absent=True)
    assert puts(server) == [True, True, False]
    assert bucket.objects == {"a/x": b"another's", "a/y": b"2", "a/z": b"4"}
    [line] = [one.getMessage() for one in caplog.records]
    assert "If-None-Match" in line


def test_a_server_that_heeds_it_is_asked_no_more(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = Bucket().answer
    store = Store.open("s3://bucket/a")
    for name in ("x", "y", "z"):
        store.write(name, b"1", if_absent=True)
        with pytest.raises(AlreadyExists):
            store.write(name, b"2", if_absent=True)
    assert all(puts(server)) and len(puts(server)) == 6 + 1
    assert [one.method for one in server.requests].count("HEAD") == 1
    assert not caplog.records


def test_who_may_not_look_may_still_write(server: ScriptedServer) -> None:
    """AWS says 403 to HEAD where there is nothing and nobody may list."""
    bucket = Bucket()
    server.answer = lambda request: Answer(403) if request.method == "HEAD" else bucket.answer(request)
    Store.open("s3://bucket/a").write("x", b"1", if_absent=True)
    assert bucket.objects == {"a/x": b"1"}


def test_another_fault_is_not_put_down_to_the_header(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = Bucket(put=lambda _: s3_error(400, "InvalidArgument", "no such storage class")).answer
    store = Store.open("s3://bucket/a")
    for _ in range(2):
        assert "no such storage class" in refused(lambda: store.write("x", b"1", if_absent=True))
    assert puts(server) == [True, False] * 2 and not caplog.records


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted", ""])
@pytest.mark.parametrize("times", [1, 3])
def test_a_conflict_is_tried_again(server: ScriptedServer, code: str, times: int) -> None:
    left = [times]

    def put(request: Request) -> Answer | None:
        left[0] -= 1
        return s3_error(409, code) if left[0] >= 0 else None

    bucket = Bucket(put=put)
    server.answer = bucket.answer
    Store.open("s3://bucket/a").write("x", b"1", if_absent=True)
    assert bucket.objects == {"a/x": b"1"}


def test_a_conflict_that_stays_is_no_object(server: ScriptedServer) -> None:
    server.answer = Bucket(put=lambda _: s3_error(409, "ConditionalRequestConflict")).answer
    line = refused(lambda: Store.open("s3://bucket/a").write("x", b"1", if_absent=True), Unanswered)
    assert "ConditionalRequestConflict" in line and len(puts(server)) == 8


def test_a_conflict_that_another_writer_has_won(server: ScriptedServer) -> None:
    bucket = Bucket()

    def put(request: Request) -> Answer | None:
        bucket.objects["a/x"] = b"another's"
        return s3_error(409, "ConditionalRequestConflict") if len(puts(server)) == 1 else None

    bucket.put = put
    server.answer = bucket.answer
    with pytest.raises(AlreadyExists):
        Store.open("s3://bucket/a").write("x", b"1", if_absent=True)
    assert bucket.objects == {"a/x": b"another's"}


@pytest.mark.parametrize("code", ["FileAlreadyExists", "ObjectAlreadyExists"])
def test_a_conflict_that_is_the_object(server: ScriptedServer, code: str) -> None:
    server.answer = Bucket(put=lambda _: s3_error(409, code)).answer
    with pytest.raises(AlreadyExists):
        Store.open("s3://bucket/a").write("x", b"1", if_absent=True)
    assert len(puts(server)) == 1


def test_an_answer_that_was_lost(server: ScriptedServer) -> None:
    """The server had written the object, and says at the second try that it is there."""
    bucket = Bucket()

    def put(request: Request) -> Answer | None:
        if len(puts(server)) > 1:
            return None
        bucket.objects["a/x"] = request.body
        return s3_error(500, "InternalError")

    bucket.put = put
    server.answer = bucket.answer
    Store.open("s3://bucket/a").write("x", b"1", if_absent=True)
    assert bucket.objects == {"a/x": b"1"}


def test_a_conflict_without_a_condition(server: ScriptedServer) -> None:
    server.answer = lambda _: s3_error(409, "OperationAborted")
    assert "OperationAborted" in refused(lambda: Store.open("s3://bucket/a").write("x", b"1"), Unanswered)


# replacing


def replaced(store: Store, data: bytes) -> None:
    store.replace("x", data, store.read_with_info("x"))


def test_a_replacement_whose_answer_was_lost(server: ScriptedServer) -> None:
    """It is no lost race: the object holds what was written."""
    bucket = Bucket(objects={"a/x": b"0"})

    def put(request: Request) -> Answer | None:
        if len(puts(server)) > 1:
            return None
        bucket.objects["a/x"] = request.body
        return s3_error(500, "InternalError")

    bucket.put = put
    server.answer = bucket.answer
    replaced(Store.open("s3://bucket/a"), b"1")
    assert bucket.objects == {"a/x": b"1"}


def test_a_replacement_that_another_writer_has_won(server: ScriptedServer) -> None:
    bucket = Bucket(objects={"a/x": b"0"})

    def put(request: Request) -> Answer | None:
        bucket.objects["a/x"] = b"another's"
        return s3_error(500, "InternalError") if len(puts(server)) == 1 else None

    bucket.put = put
    server.answer = bucket.answer
    with pytest.raises(Changed):
        replaced(Store.open("s3://bucket/a"), b"1")
    assert bucket.objects == {"a/x": b"another's"}


def test_a_server_that_cannot_replace_conditionally(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    refusal = s3_error(501, "NotImplemented")
    bucket = Bucket(put=lambda request: refusal if request.is_conditional else None, objects={"a/x": b"0"})
    server.answer = bucket.answer
    store = Store.open("s3://bucket/a")
    seen = store.read_with_info("x")
    with caplog.at_level(logging.WARNING, "geostream"):
        replaced(store, b"1")
        replaced(store, b"2")
        with pytest.raises(Changed):
            store.replace("x", b"3", seen)
    assert puts(server) == [True, False, False] and bucket.objects == {"a/x": b"2"}
    [line] = [one.getMessage() for one in caplog.records]
    assert "If-Match" in line and "NotImplemented" in line and "\n" not in line


def test_a_server_that_ignores_the_tag(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    bucket = Bucket(heeds=False, objects={"a/x": b"0"})
    server.answer = bucket.answer
    store = Store.open("s3://bucket/a")
    seen = store.read_with_info("x")
    bucket.objects["a/x"] = b"another's"
    with pytest.raises(Changed):  # also before it is known for what it is
        store.replace("x", b"1", seen)
    with caplog.at_level(logging.WARNING, "geostream"):
        replaced(store, b"2")
        assert puts(server) == [True, True]
        with pytest.raises(Changed):
            store.replace("x", b"3", seen)
    assert bucket.objects == {"a/x": b"2"}
    [line] = [one.getMessage() for one in caplog.records]
    assert "If-Match" in line


def test_a_server_that_heeds_the_tag_is_asked_no_more(server: ScriptedServer) -> None:
    bucket = Bucket(objects={"a/x": b"0"})
    server.answer = bucket.answer
    store = Store.open("s3://bucket/a")
    for number in range(3):
        replaced(store, str(number).encode())
    assert all(puts(server)) and len(puts(server)) == 3 + 1 and bucket.objects == {"a/x": b"2"}


# the probe


def test_the_probe(server: ScriptedServer) -> None:
    bucket = Bucket()
    server.answer = bucket.answer
    assert probe(Store.open("s3://bucket/a")) is None
    names = {one.path for one in server.requests}
    assert len(names) == 1 and names.pop().startswith(f"/bucket/a/{PROBE}")
    assert bucket.objects == {} and server.requests[-1].method == "DELETE"


@pytest.mark.parametrize("heeds", [True, False])
def test_the_probe_tells_what_is_weaker(server: ScriptedServer, heeds: bool) -> None:
    refusal = s3_error(501, "NotImplemented")
    bucket = Bucket(heeds, put=lambda request: refusal if heeds and request.is_conditional else None)
    server.answer = bucket.answer
    warning = probe(Store.open("s3://bucket/a"))
    assert warning is not None and ("NotImplemented" if heeds else "If-None-Match") in warning
    assert bucket.objects == {}


def test_the_probe_where_nothing_may_be_written(server: ScriptedServer) -> None:
    server.answer = Bucket(put=lambda _: s3_error(403, "AccessDenied")).answer
    assert "s3:PutObject" in refused(lambda: probe(Store.open("s3://bucket/a")), Refused)


def test_the_probe_where_nothing_may_be_removed(server: ScriptedServer) -> None:
    bucket = Bucket()
    denied = s3_error(403, "AccessDenied")
    server.answer = lambda request: denied if request.method == "DELETE" else bucket.answer(request)
    line = refused(lambda: probe(Store.open("s3://bucket/a")), Refused)
    assert "s3:DeleteObject" in line and next(iter(bucket.objects)) in line
