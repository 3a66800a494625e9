"""Where the S3 server is and who we are there, as botocore says it; obstore and s3fs are told the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from geostream.errors import GeostreamError, Refused, StoreError
from geostream.store import Store, table_bytes
from geostream.store.s3 import s3_access
from tests.scripted_server import Answer, Request, ScriptedServer, content, scripted_server

TABLE = pa.table({"x": [1, 2, 3], "y": [4, 5, 6]})
KEY, OTHER_KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "AKIAI44QH8DHBEXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
PROFILES = f"""
[default]
aws_access_key_id = {KEY}
aws_secret_access_key = {SECRET}
[named]
aws_access_key_id = {OTHER_KEY}
aws_secret_access_key = {SECRET}
"""


class Asked(NamedTuple):
    """What a request said."""

    host: str
    path: str
    region: str | None
    key: str | None


@dataclass
class Aws:
    """The AWS configuration of one test, and a web proxy that answers for every host it names."""

    folder: Path
    patch: pytest.MonkeyPatch
    proxy: ScriptedServer

    def configure(self, config: str = "", credentials: str = PROFILES, **variables: str) -> None:
        """Write both shared files and set AWS_* variables, given by their lower-case names without AWS_."""
        (self.folder / "config").write_text(config)
        (self.folder / "credentials").write_text(credentials)
        for name, value in variables.items():
            self.patch.setenv(f"AWS_{name.upper()}", value)

    def asked(self, store: Store) -> Asked:
        """What obstore and s3fs say to the server, which is the same."""
        both = []
        for ask in (lambda: store.read("t.parquet"), lambda: store.read_table("t.parquet", columns=["x"])):
            self.proxy.requests.clear()
            ask()
            [one] = {_asked(request) for request in self.proxy.requests}
            both.append(one)
        assert both[0] == both[1]
        return both[0]


def _asked(request: Request) -> Asked:
    url = urlsplit(request.path)
    signed = re.search(r"Credential=([^/]+)/\d+/([^/]+)/s3/", request.headers.get("authorization", ""))
    host = request.headers["host"]
    assert url.netloc in ("", host)  # a proxy is sent the whole URL
    return Asked(host, url.path, signed and signed[2], signed and signed[1])


def _serve(request: Request) -> Answer:
    return content(request, table_bytes(TABLE))


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with scripted_server(_serve) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield Aws(tmp_path, monkeypatch, proxy)


HERE, THERE = "http://here.test", "http://there.test:9000"
IN_PROFILE = f"[default]\nendpoint_url = {HERE}\n[profile named]\nendpoint_url = {THERE}\nregion = eu-south-2\n"
IN_SERVICES = f"[default]\nendpoint_url = {HERE}\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = {THERE}\n"
VIRTUAL = "[default]\ns3 =\n  addressing_style = virtual\n"
PATH = VIRTUAL.replace("virtual", "path")
AUTO = VIRTUAL.replace("virtual", "auto")

FOUND = [
    ("the default profile", IN_PROFILE, {}, Asked("here.test", "/bucket/a/t.parquet", "us-east-1", KEY)),
    (
        "another profile",
        IN_PROFILE,
        {"profile": "named"},
        Asked("there.test:9000", "/bucket/a/t.parquet", "eu-south-2", OTHER_KEY),
    ),
    ("a services section", IN_SERVICES, {}, Asked("there.test:9000", "/bucket/a/t.parquet", "us-east-1", KEY)),
    (
        "a variable before a services section",
        IN_SERVICES,
        {"endpoint_url": HERE},
        Asked("here.test", "/bucket/a/t.parquet", "us-east-1", KEY),
    ),
    (
        "S3's own variable before the general one",
        IN_PROFILE,
        {"endpoint_url": THERE, "endpoint_url_s3": HERE + "/base/"},
        Asked("here.test", "/base/bucket/a/t.parquet", "us-east-1", KEY),
    ),
    (
        "an empty variable",
        IN_PROFILE,
        {"endpoint_url": "", "endpoint_url_s3": ""},
        Asked("here.test", "/bucket/a/t.parquet", "us-east-1", KEY),
    ),
    (
        "a region by variable, before the profile's",
        IN_PROFILE,
        {"profile": "named", "default_region": "sa-east-1"},
        Asked("there.test:9000", "/bucket/a/t.parquet", "sa-east-1", OTHER_KEY),
    ),
    (
        "AWS_REGION before AWS_DEFAULT_REGION",
        IN_PROFILE,
        {"default_region": "sa-east-1", "region": "auto"},
        Asked("here.test", "/bucket/a/t.parquet", "auto", KEY),
    ),
    (
        "the bucket in the host's name",
        VIRTUAL,
        {"endpoint_url": HERE},
        Asked("bucket.here.test", "/a/t.parquet", "us-east-1", KEY),
    ),
    (
        "the bucket in the path",
        PATH,
        {"endpoint_url": HERE},
        Asked("here.test", "/bucket/a/t.parquet", "us-east-1", KEY),
    ),
    ("auto: in the path", AUTO, {"endpoint_url": HERE}, Asked("here.test", "/bucket/a/t.parquet", "us-east-1", KEY)),
    ("no signature", IN_PROFILE, {"skip_signature": "true"}, Asked("here.test", "/bucket/a/t.parquet", None, None)),
    ("a signature", IN_PROFILE, {"skip_signature": "0"}, Asked("here.test", "/bucket/a/t.parquet", "us-east-1", KEY)),
    (
        "keys by variable",
        IN_PROFILE,
        {"access_key_id": OTHER_KEY, "secret_access_key": SECRET},
        Asked("here.test", "/bucket/a/t.parquet", "us-east-1", OTHER_KEY),
    ),
]
# Of these obstore reads what botocore does not.
NOT_BOTOCORES = {
    "endpoint": THERE,
    "virtual_hosted_style_request": "true",
    "allow_http": "false",
    "conditional_put": "disabled",
    "s3_express": "true",
    "proxy_url": "http://127.0.0.1:9",
    "bucket": "another",
    "endpoint_url_sts": THERE,
}


@pytest.mark.parametrize(("config", "variables", "expected"), [case[1:] for case in FOUND], ids=[c[0] for c in FOUND])
@pytest.mark.parametrize("more", [{}, NOT_BOTOCORES], ids=["", "and obstore's own"])
def test_both_libraries_ask_as_botocore_would(
    aws: Aws, config: str, variables: dict[str, str], expected: Asked, more: dict[str, str]
) -> None:
    aws.configure(config, **variables, **more)
    assert aws.asked(Store.open("s3://bucket/a")) == expected


IGNORED = [
    {"endpoint_url": HERE, "ignore_configured_endpoint_urls": "true"},
    {"endpoint_url_s3": HERE, "ignore_configured_endpoint_urls": "true"},
    {"profile": "named", "ignore_configured_endpoint_urls": "true"},
    {"profile": "ignoring", "endpoint_url": HERE},
]


@pytest.mark.parametrize("variables", IGNORED, ids=str)
def test_an_endpoint_that_is_to_be_ignored(aws: Aws, variables: dict[str, str]) -> None:
    """Then it is AWS itself. Of what is encrypted, the proxy sees which host is asked for."""
    aws.proxy.answer = lambda _: Answer(403)
    aws.patch.setattr("geostream.store.store.RETRIES", 0)
    aws.patch.setattr("s3fs.core.S3FileSystem.retries", 1)
    aws.patch.setenv("AWS_MAX_ATTEMPTS", "1")
    ignoring = "[profile ignoring]\nignore_configured_endpoint_urls = true\nregion = eu-south-2\n"
    aws.configure(IN_PROFILE + ignoring, PROFILES + PROFILES.split("[named]")[1].join(["[ignoring]", ""]), **variables)
    aws.patch.setenv("https_proxy", aws.proxy.url)
    store = Store.open("s3://bucket/a")
    host = "bucket.s3.amazonaws.com" if "profile" not in variables else "bucket.s3.eu-south-2.amazonaws.com"
    for ask in (lambda: store.child("b").read("x"), lambda: store.filesystem()[0].cat_file("bucket/a/x")):
        aws.proxy.requests.clear()
        with pytest.raises(Exception, match=r"bucket|proxy"):
            ask()
        assert {(one.method, one.path) for one in aws.proxy.requests} == {("CONNECT", f"{host}:443")}


@pytest.mark.parametrize(
    ("bucket", "variables", "url"),
    [
        ("bucket", {}, "https://bucket.s3.amazonaws.com"),
        ("bucket", {"region": "eu-west-1"}, "https://bucket.s3.eu-west-1.amazonaws.com"),
        ("bucket", {"region": "cn-north-1"}, "https://bucket.s3.cn-north-1.amazonaws.com.cn"),
        ("with.dots", {"region": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/with.dots"),
        (
            "bucket",
            {"region": "eu-west-1", "use_dualstack_endpoint": "true"},
            "https://bucket.s3.dualstack.eu-west-1.amazonaws.com",
        ),
        (
            "b--usw2-az1--x-s3",
            {"region": "us-west-2"},
            "https://b--usw2-az1--x-s3.s3express-usw2-az1.us-west-2.amazonaws.com",
        ),
        ("bucket", {"endpoint_url": "http://127.0.0.1:8333"}, "http://127.0.0.1:8333/bucket"),
        ("bucket", {"endpoint_url": "http://[::1]:8333"}, "http://[::1]:8333/bucket"),
        ("bucket", {"endpoint_url": "HTTP://minio:9000/"}, "http://minio:9000/bucket"),
    ],
)
def test_urls_of_buckets(aws: Aws, bucket: str, variables: dict[str, str], url: str) -> None:
    aws.configure(**variables)
    assert s3_access(bucket).url == url


def test_settings_that_change_are_seen(aws: Aws) -> None:
    aws.configure(IN_PROFILE)
    assert aws.asked(Store.open("s3://bucket/a")).host == "here.test"
    aws.configure(IN_PROFILE.replace("here.test", "moved.test"))
    assert aws.asked(Store.open("s3://bucket/a")).host == "moved.test"
    aws.configure(IN_PROFILE, endpoint_url=THERE, access_key_id=OTHER_KEY, secret_access_key=SECRET)
    assert aws.asked(Store.open("s3://bucket/a"))[::3] == ("there.test:9000", OTHER_KEY)


def test_asking_botocore_is_done_once(aws: Aws) -> None:
    aws.configure(IN_PROFILE)
    s3_access("bucket")
    began = time.perf_counter()
    for _ in range(100):
        s3_access("bucket")
    assert time.perf_counter() - began < 0.1


# endpoints that are none

ODD = ["127.0.0.1:8333", "minio", "//minio", "http:/x", "http//x", "http://", "   ", "http://a b", " http://a"]
ODD += ["http://a:99999", "http://a:9x", "http://a:80:90", "http://[::1", "ftp://a", "http://a?x=1", "http://a#x"]
ODD += ["http://a_b:9000", "http://-a", "http://a\\x", "https://ü.de", "http://a:0"]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_is_none(aws: Aws, capfd: pytest.CaptureFixture[str], name: str, value: str) -> None:
    aws.configure()
    aws.patch.setenv(name, value)
    line = refused(Store.open("s3://bucket/a").check)
    assert f"{name}: {value!r}" in line
    assert refused(Store.open("s3://bucket/a").filesystem) == line
    assert capfd.readouterr().err == ""  # a panic says so there


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ("[default]\nendpoint_url = minio:9000\n", "profile 'default'"),
        ("[default]\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = minio:9000\n", "[services mine]"),
    ],
)
def test_an_endpoint_in_a_file_that_is_none(aws: Aws, config: str, where: str) -> None:
    aws.configure(config)
    line = refused(lambda: Store.open("s3://bucket/a").check())
    assert where in line and "'minio:9000'" in line


def test_a_password_in_an_endpoint_is_not_shown(aws: Aws) -> None:
    aws.configure(endpoint_url="http://user:hidden@minio:9000")
    line = refused(lambda: Store.open("s3://bucket/a").check())
    assert "AWS_ENDPOINT_URL" in line and "minio:9000" in line and "hidden" not in line and "user" not in line


# other settings that are none

SSO = """
[default]
sso_session = mine
sso_account_id = 123456789012
sso_role_name = reader
region = eu-south-2
[sso-session mine]
sso_start_url = https://mine.awsapps.com/start
sso_region = eu-south-2
sso_registration_scopes = sso:account:access
"""
FAILING = f"[default]\ncredential_process = {sys.executable} -c 'raise SystemExit(\"no card in the reader\")'\n"
BAD = [
    ("unknown profile", {"profile": "nobody"}, "", PROFILES, "nobody"),
    ("malformed config", {}, "[default\nregion = x\n", PROFILES, "config"),
    ("malformed credentials", {}, "", "aws_access_key_id = x\n", "credentials"),
    ("half of the keys", {}, "", f"[default]\naws_access_key_id = {KEY}\n", "aws_secret_access_key"),
    ("half of the variables", {"access_key_id": KEY}, "", "", "AWS_SECRET_ACCESS_KEY"),
    ("no keys", {}, "", "", "AWS_ACCESS_KEY_ID"),
    ("a services section that is not there", {"endpoint_url": ""}, "[default]\nservices = mine\n", PROFILES, "mine"),
    ("a region that is none", {"region": "eu west"}, "", PROFILES, "eu west"),
    ("a number that is none", {"max_attempts": "x", "endpoint_url": HERE}, "", PROFILES, "'x'"),
    ("a signature that is neither", {"skip_signature": "maybe"}, "", PROFILES, "AWS_SKIP_SIGNATURE"),
    ("certificates that are not there", {"ca_bundle": "/no/such.pem"}, "", PROFILES, "/no/such.pem"),
    ("single sign-on, never signed on", {}, SSO, "", "SSO"),
    ("a program that fails", {}, FAILING, "", "no card in the reader"),
    ("a role of nobody", {}, "[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = y\n", "", "y"),
]


ASK: tuple[Callable[[Store], object], ...] = (Store.check, lambda store: store.read_table("x", columns=["a"]))


def ask_bucket(ask: Callable[[Store], object]) -> None:
    ask(Store.open("s3://bucket/a"))


@pytest.mark.parametrize(
    ("variables", "config", "credentials", "named"), [case[1:] for case in BAD], ids=[c[0] for c in BAD]
)
def test_settings_that_are_none(aws: Aws, variables: dict[str, str], config: str, credentials: str, named: str) -> None:
    aws.configure(config, credentials, **({"endpoint_url": HERE} | variables))
    for ask in ASK:
        line = refused(partial(ask_bucket, ask))
        assert named in line and SECRET not in line and "HERE" not in line
        assert "AWS_ENDPOINT_URL" not in line


@pytest.mark.parametrize("name", ["unsigned_payload", "checksum_algorithm", "request_payer"])
def test_how_objects_are_stored_is_obstores(aws: Aws, name: str) -> None:
    """These only obstore has, and reads them itself: what it does not take is one line, too."""
    aws.configure(endpoint_url=HERE, **{name: "maybe"})
    assert "maybe" in refused(Store.open("s3://bucket/a").check)


def test_single_sign_on_that_has_expired(aws: Aws) -> None:
    aws.configure(SSO, "", endpoint_url=HERE)
    for name in ("botocore.tokens.SSOTokenProvider", "botocore.credentials.SSOProvider"):
        aws.patch.setattr(f"{name}._SSO_TOKEN_CACHE_DIR", str(aws.folder))
    past = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    token = {
        "startUrl": "https://mine.awsapps.com/start",
        "region": "eu-south-2",
        "accessToken": "a",
        "expiresAt": past,
    }
    (aws.folder / f"{hashlib.sha1(b'mine').hexdigest()}.json").write_text(json.dumps(token))
    line = refused(lambda: Store.open("s3://bucket/a").check(), Refused)
    assert "aws sso login" in line and "expired" in line


# roles

ASSUMED = """<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>
<AccessKeyId>ASIAROLE</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>token</SessionToken>
<Expiration>{until}</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"""
ROLE = (
    "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = default\nregion = us-east-1\n"
)


@pytest.fixture
def sts(aws: Aws) -> Iterator[ScriptedServer]:
    until = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    with scripted_server(lambda _: Answer(200, ASSUMED.format(until=until).encode())) as server:
        aws.configure(ROLE, profile="role", endpoint_url_sts=server.url, endpoint_url_s3=HERE)
        yield server


def test_a_role_is_assumed(aws: Aws, sts: ScriptedServer) -> None:
    assert aws.asked(Store.open("s3://bucket/a")) == ("here.test", "/bucket/a/t.parquet", "us-east-1", "ASIAROLE")
    assert len(sts.requests) == 2 and all(b"role%2Freader" in one.body for one in sts.requests)


def test_a_role_that_may_not_be_assumed(aws: Aws, sts: ScriptedServer) -> None:
    said = "User: x is not authorized to perform: sts:AssumeRole"
    body = f"<ErrorResponse><Error><Code>AccessDenied</Code><Message>{said}</Message></Error></ErrorResponse>"
    sts.answer = lambda _: Answer(403, body.encode())
    for ask in ASK:
        line = refused(partial(ask_bucket, ask), Refused)
        assert "sts:AssumeRole" in line and "AccessDenied" in line and "AWS_PROFILE" in line


# certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here -addext subjectAltName=IP:127.0.0.1"
    extra = ["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *extra], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def tls(aws: Aws, certificate: tuple[Path, Path]) -> Iterator[ScriptedServer]:
    server = ScriptedServer(_serve)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    server.start()
    aws.configure(endpoint_url=f"https://127.0.0.1:{server.port}")
    yield server
    server.stop()


def test_certificates_of_ones_own(aws: Aws, tls: ScriptedServer, certificate: tuple[Path, Path]) -> None:
    store = Store.open("s3://bucket/a")
    aws.patch.setattr("geostream.store.store.RETRIES", 0)
    line = refused(lambda: store.read("t.parquet"))
    assert "certificate" in line and "AWS_CA_BUNDLE" in line
    aws.configure(ca_bundle=str(certificate[0]))
    store = Store.open("s3://bucket/a")
    assert store.read("t.parquet") == table_bytes(TABLE)
    assert store.read_table("t.parquet", columns=["x"]).num_rows == 3


def test_tls_where_there_is_none(aws: Aws) -> None:
    aws.patch.setattr("geostream.store.store.RETRIES", 0)
    aws.configure(endpoint_url=f"https://127.0.0.1:{aws.proxy.port}")
    assert "TLS" in refused(lambda: Store.open("s3://bucket/a").check())


def refused(ask: Callable[[], Any], kind: type[GeostreamError] = StoreError) -> str:
    """The one line of the error that asking ends in."""
    with pytest.raises(kind) as error:
        ask()
    text = str(error.value)
    assert "\n" not in text and "<" not in text and "Traceback" not in text
    return text
