"""Turn the object store libraries' errors into geostream's: one line with the URL, the server's code and what to do.

The advice follows from the server's error code. The class of the error says what a program can do: Refused where
credentials may be about to be renewed, Unanswered where trying again may help, StoreError where it will not. Keys and
signatures are removed from the line, because some servers repeat parts of the request in their answer.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnection
from obstore import exceptions as obexc

from geostream.errors import AlreadyExists, Changed, NotFound, Refused, StoreError, Unanswered, Unsupported
from geostream.store.s3 import is_unsigned

DEBUG = "\n\nDebug source:"  # in obstore's messages, before pages of debug output
# How obstore words its errors, before the debug output.
METHOD, STATUS = re.compile(r"Error performing ([A-Z]+) "), re.compile(r"status code: (\d{3})[^:]*: ?(.*)", re.S)
BODY = re.compile(r"Server returned error response: (.*)", re.S)  # S3 may say 200 and mean an error
CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)|certificate verify failed")
OUR_CREDENTIALS = re.compile(r"External AWS credential provider: (?:[\w.]+: )?(.*)", re.S)
# Removed from messages: keys and signatures, and whatever could be a part of one.
SECRETS = re.compile(
    r"(?i:signature|credential|token|key(?: ?id)?)[=:]\S+|[A-Za-z0-9/+=]{40,}|\b(?=\w*\d)[A-Z0-9]{16,}\b"
)
SHOWN = 200  # characters of a server's message that are shown

RIGHTS = {"list": "s3:ListBucket", "read": "s3:GetObject", "write": "s3:PutObject", "delete": "s3:DeleteObject"}
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
EXPIRED = "the temporary credentials have expired; get new ones (aws sso login, or all three AWS_ variables anew)"
REGION = "the bucket is in another region than requests are signed for; set AWS_REGION to the bucket's"
VIRTUAL = (
    "the server wants the bucket in the host's name; set addressing_style = virtual for s3, in the profile in "
    "~/.aws/config"
)
FULL = "the store is full, or its quota is used up; make room, or have the quota raised"
# Codes of refused credentials, with what to do. They become Refused, because credentials may be renewed meanwhile.
REFUSALS = {
    "RequestTimeTooSkewed": "this machine's clock and the server's differ; set the clock (NTP)",
    "RequestExpired": "the request came too late; set this machine's clock (NTP)",
    "ExpiredToken": EXPIRED,
    "ExpiredTokenException": EXPIRED,
    "TokenRefreshRequired": EXPIRED,
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to these keys; set all three anew, or unset it",
    "InvalidAccessKeyId": f"the server does not know the access key; check {KEYS}, and that the endpoint is its server",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; check {KEYS}",
    "AllAccessDisabled": "the provider has disabled all access to the bucket; ask the provider",
    "AccountProblem": "the account has a problem, as an unpaid bill; ask the provider",
    "NotSignedUp": "the account is not signed up for this service; ask the provider",
    "UserSuspended": "the account is suspended; ask the provider",
}
REMEDIES = {
    "NoSuchBucket": "the bucket does not exist; create it or correct the URL",
    "InvalidBucketName": "no bucket can be called so; correct the URL",
    "PermanentRedirect": REGION,
    "TemporaryRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "IllegalLocationConstraintException": REGION,
    "SecondLevelDomainForbidden": VIRTUAL,  # Alibaba
    "PathStyleDomainForbidden": VIRTUAL,  # Tencent
    "VirtualHostDomainRequired": VIRTUAL,  # Huawei
    "InvalidPathAccess": VIRTUAL,  # Volcano Engine
    "QuotaExceeded": FULL,
    "XMinioStorageFull": FULL,
    "XMinioAdminBucketQuotaExceeded": FULL,
    "EntityTooLarge": "the object is larger than the server takes; write smaller shards (--shard-mib)",
    "InvalidObjectState": "the object is archived; restore it from there (S3 Glacier), then try again",
    "NotImplemented": "the server does not offer what this needs",
}
KMS = "the key that the bucket is encrypted with cannot be used; check its state, and the rights to it in KMS"
PASSING = {
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
NEVER = (501, 505, 507)  # the 5xx codes for which trying again does not help


@dataclass(frozen=True)
class Answer:
    """A server's answer that refuses a request."""

    verb: str  # what was asked: list, read, write or delete
    status: int = 0  # HTTP status; 0 where no answer came
    code: str = ""  # the server's error code; "" where it gave none
    message: str = ""
    region: str = ""  # the one that the server expects
    is_head: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Answer:
        """Read the server's answer from an error of obstore, s3fs or botocore."""
        if client_error := _client_error(error):
            return cls._of_client_error(client_error)
        text = str(error).split(DEBUG)[0]
        method = request[1] if (request := METHOD.search(text)) else "GET"
        if "list request" in text:
            verb = "list"
        else:
            verb = {"GET": "read", "HEAD": "read", "DELETE": "delete"}.get(method, "write")
        if "redirect without LOCATION" in text:  # its body is lost
            return cls(verb, 301, "PermanentRedirect", is_head=method == "HEAD")
        if found := BODY.search(text):
            return cls(verb, 503, *_elements(found[1]))
        if found := STATUS.search(text):
            return cls(verb, int(found[1]), *_elements(found[2]), is_head=method == "HEAD")
        return cls(verb)

    @classmethod
    def _of_client_error(cls, error: ClientError) -> Answer:
        said, name = error.response.get("Error", {}), error.operation_name
        code, status = str(said.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
        verb = "list" if "List" in name else "read" if name.startswith(("Get", "Head")) else "write"
        is_head = name.startswith("Head")  # botocore puts the status where there is no code
        return cls(
            "delete" if name.startswith("Delete") else verb,
            int(status),
            "" if code.isdigit() else code,
            "" if code.isdigit() else str(said.get("Message", "")),
            str(said.get("Region", "")),
            is_head,
        )

    @property
    def is_conflict(self) -> bool:
        """Whether this is a 409 because of another request at the same time; AWS then wants it sent again."""
        return self.status == 409 and self.code in ("", "ConditionalRequestConflict", "OperationAborted")

    @property
    def is_passing(self) -> bool:
        """Whether the failure is temporary, so that trying again may help."""
        busy = self.status >= 500 and self.status not in NEVER
        return self.is_conflict or busy or self.status in (408, 429) or self.code in PASSING

    @property
    def refuses_a_header(self) -> bool:
        """Whether the server may not know a header that the request had."""
        odd = self.code in ("InvalidArgument", "InvalidRequest", "NotImplemented", "NotSupported", "UnsupportedHeader")
        return self.status == 501 or (self.status == 400 and odd)

    def said(self) -> str:
        """Return the server's code, or the status in words where it gave no code."""
        names = {status.value: status.phrase for status in HTTPStatus}
        return self.code or f"{self.status} {names.get(self.status, '')}".rstrip()


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn errors of the object store libraries into geostream's.

    Args:
        url: The URL that the errors name.

    Raises:
        StoreError: In place of a library's error: one line with the URL and what to do.
    """
    try:
        yield
    except StoreError:
        raise
    except (obexc.BaseError, BotoCoreError, ClientError, OSError, NotImplementedError) as error:
        raise translated(url, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # obstore's, which is no Exception
            raise
        raise StoreError(f"{url}: obstore failed ({_line(error)}); this is a fault of the library") from error


def translated(url: str, error: BaseException) -> StoreError:
    """Return geostream's error for one of obstore, s3fs or botocore.

    Args:
        url: The URL that was asked for.
        error: The library's error.

    Returns:
        A StoreError, or the kind of it that says what a program can do about it.
    """
    if found := OUR_CREDENTIALS.search(str(error).split(DEBUG)[0]):
        return Refused(f"{url}: access refused: {_shown(found[1])}")
    if (asked := _client_error(error)) and "Role" in asked.operation_name:
        return Refused(f"{url}: access refused: S3 credentials: {_line(asked)}; correct the role of AWS_PROFILE")
    answer = Answer.of(error)
    if isinstance(error, obexc.AlreadyExistsError) and (answer.status != 409 or _is_there(url, answer)):
        return AlreadyExists(f"{url}: exists already")
    if isinstance(error, obexc.PreconditionError):
        return Changed(f"{url}: replaced by somebody else meanwhile")
    if isinstance(error, FileNotFoundError) and answer.code not in REMEDIES:
        return NotFound(f"{url}: no such object")
    if answer.status:
        return _answered(url, answer)
    return _unanswered(url, error)


def _is_there(url: str, answer: Answer) -> bool:
    """Return whether a 409 means that the object exists, as on Azure; on S3 it may mean that two requests met."""
    return not url.startswith("s3://") or "Exist" in answer.code


def _answered(url: str, answer: Answer) -> StoreError:
    """Return the error for a server's refusal."""
    said = answer.said()
    if answer.is_passing:
        return Unanswered(f"{url}: {said}: the server is busy, or has a fault of its own; try again", "busy")
    if url.startswith(("http://", "https://")):
        return _of_web_server(url, answer)
    if advice := _remedy(answer):
        return StoreError(f"{url}: {said}: {advice}")
    if answer.status in (401, 403) or answer.code in REFUSALS or (answer.is_head and answer.status == 400):
        return Refused(f"{url}: access refused: {said}: {_refusal(url, answer)}")
    message = _shown(answer.message)
    return StoreError(f"{url}: cannot {answer.verb}: {said}{f': {message}' if message else ''}")


def _of_web_server(url: str, answer: Answer) -> StoreError:
    if answer.status in (401, 403):
        return Refused(f"{url}: access refused: {answer.said()}; https stores are read without credentials")
    return StoreError(f"{url}: cannot {answer.verb}: {answer.said()}")


def _remedy(answer: Answer) -> str | None:
    """Return what to do about a refusal that new credentials would not change; None if it is not known."""
    message = _shown(answer.message)
    if answer.code.upper().startswith("KMS"):
        return f"{KMS} ({message})" if message else KMS
    advice = FULL if answer.status == 507 else REMEDIES.get(answer.code)
    if advice is not REGION:
        return advice
    if answer.region or "region" in message:
        return f"{REGION}, {answer.region}" if answer.region else f"{REGION} ({message})"
    return None if message else REGION  # a header may be malformed in other ways, too


def _refusal(url: str, answer: Answer) -> str:
    """Return what to do about credentials that the server refuses."""
    verb, message = answer.verb, _shown(answer.message)
    if not url.startswith("s3://"):
        return f"check the credentials for {url.split(':')[0]}:// in the environment, and that they may {verb} here"
    if answer.code in REFUSALS:
        return REFUSALS[answer.code]
    if is_unsigned():
        return f"nobody may {verb} here without credentials; unset AWS_SKIP_SIGNATURE"
    if answer.is_head:  # the answer has no body, and so no code
        return (
            f"an answer to HEAD tells no more; credentials or region are wrong, the credentials may not {verb} "
            f"({RIGHTS[verb]}), or there is no such object and they may not list ({RIGHTS['list']})"
        )
    if answer.code == "AccessDenied":
        return f"these credentials may not {verb} here; they need {RIGHTS[verb]}{message and f' ({message})'}"
    return f"{message and f'{message}; '}check {KEYS}, and that they may {verb} here ({RIGHTS[verb]})"


def _unanswered(url: str, error: BaseException) -> StoreError:
    """Return the error for a request without an answer; its cause is only in the text, debug output included."""
    text = str(error)
    if "Range request not supported" in text or "non-partial response" in text:
        return Unsupported(
            f"{url}: the server sends no ranges, only whole objects; serve the folder by one that does (as nginx, "
            "Apache and Caddy do), or copy it to a folder here"
        )
    if "://" not in url:
        return StoreError(f"{url}: {' '.join(text.split(DEBUG)[0].split())}")
    if isinstance(error, NotImplementedError):
        return StoreError(f"{url}: {_line(error)}")
    endpoint = "the endpoint (AWS_ENDPOINT_URL, or endpoint_url of the profile)" if url.startswith("s3:") else "the URL"
    if found := CERTIFICATE.search(text):
        said, where = found[1] or "not trusted", "AWS_CA_BUNDLE" if url.startswith("s3:") else "SSL_CERT_FILE"
        return StoreError(f"{url}: the server's certificate is refused ({said}); if it is your own, name it in {where}")
    if "invalid list response" in text:
        return StoreError(f"{url}: what came is no S3 server's answer; is {endpoint} right?")
    if "InvalidContentType" in text or "WRONG_VERSION_NUMBER" in text:
        return StoreError(f"{url}: the server does not speak TLS; correct {endpoint} to http://")
    if any(sign in text for sign in ("onnection refused", "ConnectionRefused", "dns error", "Could not connect")):
        return Unanswered(f"{url}: cannot connect; is the server up, and {endpoint} right?", "dropped")
    if isinstance(error, obexc.BaseError | HTTPClientError | NoConnection):
        stalled = "kind: Timeout" in text or "timeout" in type(error).__name__.lower()
        return Unanswered(f"{url}: {_line(error)}", "stalled" if stalled else "dropped")
    if isinstance(error, BotoCoreError):
        return Refused(f"{url}: access refused: {_line(error)}; check {KEYS}")
    return StoreError(f"{url}: {_line(error)}")


def _client_error(error: BaseException) -> ClientError | None:
    """Return the botocore error that caused one of s3fs; None where there is none."""
    return next((one for one in (error, error.__cause__) if isinstance(one, ClientError)), None)


def _elements(body: str) -> tuple[str, str, str]:
    """Return (code, message, region) from an error's XML; empty texts for any other body."""
    found = (re.search(rf"<{name}>([^<]*)</{name}>", body) for name in ("Code", "Message", "Region"))
    code, message, region = (html.unescape(one[1]).strip() if one else "" for one in found)
    return code, message, region


def _shown(message: str) -> str:
    """Return a server's message on one line, without anything that may be a secret."""
    text = " ".join(message.split()).rstrip(".;")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        text = text.replace(os.environ.get(name) or "\0", "…")
    return SECRETS.sub("…", text)[:SHOWN]


def _line(error: BaseException) -> str:
    """Return the cause from a library's message, without the request, its duration and the debug output."""
    return _shown(str(error).split(DEBUG)[0].rsplit("s - ", 1)[-1])
