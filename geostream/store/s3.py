"""Find the S3 server and the credentials as AWS tools do, and make clients from them.

The library botocore finds both: in AWS_* variables, the shared configuration files, profiles, roles and single sign-on.
Both clients, obstore and s3fs, get what it found, so they send the same requests to the same server. obstore's own
reading of the environment is overridden. Two variables are read that botocore does not know: AWS_REGION and
AWS_SKIP_SIGNATURE. Credentials are renewed before they expire, also in the middle of an epoch. Unencrypted http is used
only where the endpoint begins with ``http://``.

Asking botocore takes a fifth of a second the first time. Its answer is kept until the variables or files change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import EndpointProviderError
from botocore.loaders import create_loader
from botocore.session import Session
from obstore.exceptions import BaseError
from obstore.store import S3Store

from geostream.errors import Refused, StoreError

READ_TIMEOUT = timedelta(seconds=15)  # after so long without a byte, the request is given up
RETRY_DEADLINE = 120.0  # seconds that a training waits for a server that is away, with reads as with writes
PATIENT_RETRIES = 100  # more than there is time for
YES, NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")
SHARED_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
SERVER = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?", re.IGNORECASE)

Environment = tuple[object, ...]


@dataclass(frozen=True)
class S3Access:
    """The address of a bucket, and how requests to it are sent."""

    url: str  # of the bucket; a slash and an object's name may follow
    region: str
    unsigned: bool
    roots: bytes | None  # certificates that are trusted in addition to the system's

    @property
    def is_directory_bucket(self) -> bool:
        """Whether this is a directory bucket of S3 Express One Zone."""
        return ".s3express-" in self.url


def s3_access(bucket: str) -> S3Access:
    """Find a bucket's address and settings.

    Args:
        bucket: The bucket's name.

    Raises:
        StoreError: The configuration is wrong; the message names the setting.
    """
    return _access(bucket, is_unsigned(), _environment())


def s3_client(url: str, *, retries: int) -> S3Store:
    """Make an obstore client.

    Args:
        url: ``s3://bucket/prefix``.
        retries: How often a request is repeated after a temporary failure.

    Raises:
        StoreError: The configuration is wrong, or there are no credentials; the message names the setting.
    """
    parts = urlsplit(url)
    access = s3_access(parts.netloc)
    options = client_options(access.url, retries)
    if access.roots:
        options["client_options"]["root_certificate"] = access.roots
    config = {
        "aws_endpoint_url_s3": access.url,  # this spelling overrides all variables that obstore reads
        "virtual_hosted_style_request": "true",  # says that the URL has the bucket already, in the host or the path
        "region": access.region,
        "skip_signature": str(access.unsigned).lower(),
        "s3_express": str(access.is_directory_bucket).lower(),
        "conditional_put": "etag",
        "disable_bulk_delete": "true",  # objects are deleted one by one, and some servers have no bulk delete
    }
    credentials = _no_credentials if access.unsigned else _Credentials()
    try:
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            config=cast("Any", config),
            credential_provider=credentials,
            **options,
        )
    except (BaseError, ValueError) as error:  # of variables that only obstore reads, on how objects are stored
        what = str(error).split("\n\nDebug source:")[0]
        raise StoreError(f"S3 configuration: {what}; correct the AWS_* variables") from error


def s3_files(bucket: str) -> Any:
    """Make an s3fs filesystem for a bucket, with the same settings as :func:`s3_client`.

    Raises:
        StoreError: The configuration is wrong; the message names the setting.
    """
    import fsspec

    access = s3_access(bucket)
    return fsspec.filesystem(
        "s3",
        session=_session(_environment()),
        anon=access.unsigned,
        client_kwargs={"region_name": access.region},
        use_listings_cache=False,  # other processes write here, and a cached listing would hide what they commit
        default_block_size=2**20,
    )


def client_options(address: str, retries: int) -> dict[str, Any]:
    """Return options for an obstore client.

    Args:
        address: URL of the server.
        retries: How often a request is repeated after a temporary failure, within a minute; PATIENT_RETRIES means as
            often as RETRY_DEADLINE allows.
    """
    deadline = timedelta(seconds=RETRY_DEADLINE if retries == PATIENT_RETRIES else 60)
    pauses = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=8), "base": 2}
    return {
        "client_options": {
            "timeout": timedelta(days=1),  # the default, 30 s, is too short for large objects
            "read_timeout": READ_TIMEOUT,
            "allow_http": address.startswith("http://"),
        },
        "retry_config": {"max_retries": retries, "retry_timeout": deadline, "backoff": pauses},
    }


def is_unsigned() -> bool:
    """Return whether requests are sent without credentials, as for public buckets.

    Raises:
        StoreError: AWS_SKIP_SIGNATURE is neither true nor false.
    """
    said = os.environ.get("AWS_SKIP_SIGNATURE", "").strip().lower()
    if said not in YES + NO:
        raise StoreError(f"AWS_SKIP_SIGNATURE={said!r}: write true or false")
    return said in YES


class _Credentials:
    """Give obstore the credentials that botocore finds: in the environment, shared files, SSO or roles."""

    def __init__(self) -> None:
        with _credentials_explained():
            self._chain = Session().get_credentials()
        if self._chain is None:
            raise Refused(
                "no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or "
                "AWS_SKIP_SIGNATURE=true for a public bucket"
            )

    def __call__(self) -> Any:
        with _credentials_explained():
            frozen = self._chain.get_frozen_credentials()  # renews them when they are about to expire
        expiry = getattr(self._chain, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expiry and expiry.astimezone(UTC),  # obstore accepts only UTC
        }


def _no_credentials() -> Any:
    """Fail if an unsigned request needs credentials; without a provider, obstore would look for some itself."""
    raise AssertionError("an unsigned request asked for credentials")


@contextmanager
def _credentials_explained() -> Iterator[None]:
    """Turn whatever botocore raises while it looks for credentials into an error of one line."""
    try:
        yield
    except Exception as error:  # from botocore, the shared files, STS, or a credential_process
        line = _line(error)
        signed_on = re.search(r"\bsso\b", line, re.IGNORECASE)
        advice = "run aws sso login" if signed_on else "correct AWS_PROFILE or the shared credentials file"
        raise Refused(f"S3 credentials: {line}; {advice}") from error


def _environment() -> Environment:
    """Return all that botocore's answer depends on: the AWS_* variables, and when the shared files were written."""
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return (*variables, *(_stamp(os.environ.get(name) or usual) for name, usual in SHARED_FILES.items()))


def _stamp(path: str) -> tuple[str, int, int] | None:
    with suppress(OSError, RuntimeError):  # no such file, no home
        file = Path(path).expanduser()
        return str(file), file.stat().st_mtime_ns, file.stat().st_size
    return None


@lru_cache(maxsize=64)
def _access(bucket: str, unsigned: bool, _: Environment) -> S3Access:
    asked: list[str] = []

    def note(params: dict[str, Any], **_: Any) -> Any:
        """Note the request that botocore is about to send, and answer in place of the server."""
        asked.append(params["url"])
        return SimpleNamespace(status_code=200), {}

    session = Session()
    try:
        session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        # Only the address is wanted here. Without signatures, botocore looks for no credentials.
        client = session.create_client("s3", region_name=region, config=Config(signature_version=UNSIGNED))
        client.meta.events.register("before-call.s3.HeadBucket", note)
        client.head_bucket(Bucket=bucket)
        roots = session.get_config_variable("ca_bundle")
    except Exception as error:  # a ValueError for a bad endpoint, botocore's own errors otherwise
        if isinstance(error, ValueError | EndpointProviderError):
            _check_endpoint(session, str(error))
        raise Refused(
            f"S3 configuration: {_line(error)}; correct AWS_PROFILE, the AWS_* variables or the shared configuration "
            "files"
        ) from error
    [url] = asked
    if not _is_server(url) or not _is_server(client.meta.endpoint_url):
        _check_endpoint(session, "")
        raise StoreError(f"s3://{bucket}: botocore's URL of the bucket is none, {url!r}")
    region = client.meta.region_name
    return S3Access(
        url=url.rstrip("/"),
        region="us-east-1" if region == "aws-global" else region,
        unsigned=unsigned,
        roots=_read_roots(roots) if roots else None,
    )


@lru_cache(maxsize=1)
def _loader(path: str | None) -> Any:
    """Make botocore's loader of service descriptions; it caches them, and reading them takes the longest."""
    return create_loader(path)


def _check_endpoint(session: Any, complaint: str) -> None:
    """Raise StoreError, saying where the endpoint is set, if botocore complains of it or it is no server's URL."""
    for where, value in _endpoints(session):
        if value and (value in complaint or not _is_server(value)):
            shown = re.sub(r"[^/]*@", "…@", value)
            raise StoreError(f"{where}: {shown!r} is not the URL of a server; write http://host:port or https://host")


def _is_server(url: str) -> bool:
    with suppress(ValueError):
        return bool(SERVER.fullmatch(url)) and urlsplit(url).port != 0
    return False


def _endpoints(session: Any) -> Iterator[tuple[str, str | None]]:
    """Yield the places where an endpoint may be set, in botocore's order, each with its value."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        yield name, os.environ.get(name)
    profile, section = session.get_scoped_config(), session.full_config.get("services", {})
    for name in (profile.get("services"), "s3"):
        section = section.get(name) if isinstance(section, dict) else None
    if isinstance(section, dict):
        yield f"endpoint_url of s3 in [services {profile['services']}]", section.get("endpoint_url")
    yield f"endpoint_url of the profile {session.profile or 'default'!r}", profile.get("endpoint_url")


def _read_roots(path: str) -> bytes:
    said = f"AWS_CA_BUNDLE (or ca_bundle of the profile): {path}"
    try:
        roots = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise StoreError(f"{said}: {error.strerror}") from error
    if b"-----BEGIN CERTIFICATE-----" not in roots:
        raise StoreError(f"{said}: holds no certificate in PEM form")
    return roots


@lru_cache(maxsize=8)
def _session(_: Environment) -> Any:
    """Make an aiobotocore session, one for each state of the settings, so that s3fs can reuse its filesystem."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession()
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    return session


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__
