"""The S3 server: where it is, and who we are there.

botocore answers both, as it does for every AWS tool: from AWS_* variables, the shared configuration files, profiles,
roles and single sign-on. What it finds goes to obstore and to s3fs alike, so both ask the same server in the same way,
and what obstore would read from the environment by itself does not count. Two variables are read that other AWS tools
know and botocore does not: AWS_REGION and AWS_SKIP_SIGNATURE. Credentials are renewed before they expire, also in the
middle of an epoch. Plain http is spoken only where the endpoint says ``http://``.

Asking botocore takes a fifth of a second the first time. An answer is kept for as long as the variables and files that
it comes from stay as they are.
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

READ_TIMEOUT = timedelta(seconds=15)  # a server that sends nothing for so long has forgotten us
YES, NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")
SHARED_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
SERVER = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?", re.IGNORECASE)

Environment = tuple[object, ...]


@dataclass(frozen=True)
class S3Access:
    """Where a bucket is, and how it is spoken to."""

    url: str  # of the bucket; an object's name follows behind a slash
    region: str
    unsigned: bool
    roots: bytes | None  # certificates that are trusted besides the system's

    @property
    def is_directory_bucket(self) -> bool:
        return ".s3express-" in self.url


def s3_access(bucket: str) -> S3Access:
    """What botocore says of the bucket. Raises StoreError, with the setting at fault, where it cannot say."""
    return _access(bucket, is_unsigned(), _environment())


def s3_client(url: str, *, retries: int) -> S3Store:
    """obstore's client for ``s3://bucket/prefix``."""
    parts = urlsplit(url)
    access = s3_access(parts.netloc)
    options = client_options(access.url, retries)
    if access.roots:
        options["client_options"]["root_certificate"] = access.roots
    config = {
        "aws_endpoint_url_s3": access.url,  # the one of its names that goes before all of obstore's environment
        "virtual_hosted_style_request": "true",  # which is to say that the bucket is in the URL, wherever
        "region": access.region,
        "skip_signature": str(access.unsigned).lower(),
        "s3_express": str(access.is_directory_bucket).lower(),
        "conditional_put": "etag",
        "disable_bulk_delete": "true",  # one object a request is deleted anyway, and some servers have no other way
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
    except (BaseError, ValueError) as error:  # of how objects are stored obstore reads the environment itself
        what = str(error).split("\n\nDebug source:")[0]
        raise StoreError(f"S3 configuration: {what}; correct the AWS_* variables") from error


def s3_files(bucket: str) -> Any:
    """s3fs's filesystem for the bucket, by the same settings."""
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
    """obstore's options for a client that repeats a request ``retries`` times, within a minute."""
    return {
        "client_options": {
            "timeout": timedelta(days=1),  # else 30 s, whatever the size
            "read_timeout": READ_TIMEOUT,
            "allow_http": address.startswith("http://"),
        },
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=60)},
    }


def is_unsigned() -> bool:
    """Whether requests go without credentials, as public buckets may be read. Raises StoreError for other words."""
    said = os.environ.get("AWS_SKIP_SIGNATURE", "").strip().lower()
    if said not in YES + NO:
        raise StoreError(f"AWS_SKIP_SIGNATURE={said!r}: write true or false")
    return said in YES


class _Credentials:
    """obstore's credential provider over botocore's chain: environment, shared files, SSO, roles."""

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
            "expires_at": expiry and expiry.astimezone(UTC),  # obstore takes no other time zone
        }


def _no_credentials() -> Any:
    """obstore's credential provider where nothing is signed: never asked, but without one it looks for its own."""
    raise AssertionError("an unsigned request asked for credentials")


@contextmanager
def _credentials_explained() -> Iterator[None]:
    """Turn whatever botocore raises while it looks for credentials into one line."""
    try:
        yield
    except Exception as error:  # of botocore's own, of the shared files, of STS, of a program that was asked
        line = _line(error)
        signed_on = re.search(r"\bsso\b", line, re.IGNORECASE)
        advice = "run aws sso login" if signed_on else "correct AWS_PROFILE or the shared credentials file"
        raise Refused(f"S3 credentials: {line}; {advice}") from error


def _environment() -> Environment:
    """All that botocore's answer depends on: the AWS_* variables, and when the shared files were written."""
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
        """Take the place of the server: botocore calls this with the request that it is about to send."""
        asked.append(params["url"])
        return SimpleNamespace(status_code=200), {}

    session = Session()
    try:
        session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        # Where is asked here, and not who: without signatures, nobody looks for credentials.
        client = session.create_client("s3", region_name=region, config=Config(signature_version=UNSIGNED))
        client.meta.events.register("before-call.s3.HeadBucket", note)
        client.head_bucket(Bucket=bucket)
        roots = session.get_config_variable("ca_bundle")
    except Exception as error:  # a ValueError for a bad endpoint, botocore's own for the rest
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
    """botocore's reader of what it knows of services, which keeps what it has read: the longest part of asking."""
    return create_loader(path)


def _check_endpoint(session: Any, complaint: str) -> None:
    """Raise StoreError where botocore complains of the configured endpoint, or it is none; say where it is written."""
    for where, value in _endpoints(session):
        if value and (value in complaint or not _is_server(value)):
            shown = re.sub(r"[^/]*@", "…@", value)
            raise StoreError(f"{where}: {shown!r} is not the URL of a server; write http://host:port or https://host")


def _is_server(url: str) -> bool:
    with suppress(ValueError):
        return bool(SERVER.fullmatch(url)) and urlsplit(url).port != 0
    return False


def _endpoints(session: Any) -> Iterator[tuple[str, str | None]]:
    """Where an endpoint may be written, in the order in which botocore looks, and what is written there."""
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
    """aiobotocore's session by the settings of now; s3fs shares a filesystem among those who come with the same."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession()
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    return session


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__
