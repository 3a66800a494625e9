"""The S3 server: where it is, and who we are there.

Decides that both are said the way every AWS tool understands: AWS_* variables, profiles, roles. Credentials come from
botocore's chain and are renewed before they expire, also in the middle of an epoch. A server on plain http is one that
its URL says so of.
"""

from __future__ import annotations

from datetime import UTC, timedelta
from typing import Any, cast
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError
from botocore.session import Session
from obstore.store import S3Store
from pydantic_settings import BaseSettings, SettingsConfigDict

from geostream.errors import Refused

SILENCE = timedelta(seconds=15)  # a server that sends nothing for so long has forgotten us


class _S3Environment(BaseSettings):
    """The AWS_* variables that say where the server is (botocore reads those that say who we are)."""

    model_config = SettingsConfigDict(env_prefix="AWS_")

    endpoint_url_s3: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    default_region: str | None = None


class _Credentials:
    """obstore's credential provider over botocore's chain: environment, shared files, SSO, roles."""

    def __init__(self) -> None:
        try:
            self._chain = Session().get_credentials()
        except BotoCoreError as error:
            raise Refused(f"S3 credentials: {error}; correct AWS_PROFILE or the shared credentials file") from error
        if self._chain is None:
            raise Refused("no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")

    def __call__(self) -> Any:
        frozen = self._chain.get_frozen_credentials()  # renews them when they are about to expire
        expiry = getattr(self._chain, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expiry and expiry.astimezone(UTC),  # obstore takes no other time zone
        }


def client_options(address: str, retries: int) -> dict[str, Any]:
    """obstore's options for a client that repeats a request ``retries`` times, within a minute."""
    return {
        "client_options": {
            "timeout": timedelta(days=1),  # else 30 s, whatever the size
            "read_timeout": SILENCE,
            "allow_http": address.startswith("http://"),
        },
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=60)},
    }


def s3_client(url: str, *, retries: int) -> S3Store:
    """obstore's client for ``s3://bucket/prefix``."""
    environment = _S3Environment()
    endpoint = environment.endpoint_url_s3 or environment.endpoint_url
    config = {"region": environment.region or environment.default_region or "us-east-1"}
    if endpoint:
        config["endpoint"] = endpoint
    parts = urlsplit(url)
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        config=cast("Any", config),
        credential_provider=_Credentials(),
        **client_options(endpoint or "", retries),
    )
