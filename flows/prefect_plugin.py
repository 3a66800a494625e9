"""Complete a bare deployment name on Prefect's command line, as in ``prefect deployment run shard-vigor``.

Prefect's command takes FLOW/DEPLOYMENT only, and ends in a traceback on anything else. Plugins have one hook,
which runs while ``prefect`` is imported, before the command line is read. There the bare name is looked up on the
server and replaced in ``sys.argv``. Every other command, every option and the full form are left as they are.

In a checkout whose stack is up (``make up``) all Prefect commands are pointed at that stack's server, unless
PREFECT_API_URL or a profile says otherwise. A bare name costs one request to the server.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import anyio
from prefect.plugins import HookContext, SetupResult, register_hook

STACK = Path("runs", "stack", "stack.json")
FLAGS = {"--watch", "--no-watch"}  # the options of `deployment run` that take no value
MOST_NAMES = 10
TIMEOUT = 15.0  # seconds; Prefect gives up on plugins after 20


@register_hook
async def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Complete the command line, and return the stack's address for Prefect to apply; None where there is none.

    Args:
        ctx: not used; Prefect passes it.

    Raises:
        SystemExit: the bare name cannot be completed; the reason is on stderr.
    """
    if not is_prefect_command():
        return None
    profile, arguments = split_profile(sys.argv[1:])
    address = None if profile else stack_address()
    if (position := bare_name(arguments)) is not None:
        full = await _complete(arguments[position], profile, address)
        sys.argv[len(sys.argv) - len(arguments) + position] = full
    return None if address is None else SetupResult(env={"PREFECT_API_URL": address}, note="the stack of `make up`")


def is_prefect_command() -> bool:
    """Return whether this process is ``prefect …`` or ``python -m prefect …``, not a program that imports Prefect."""
    if sys.argv[0] == "-m":  # while the module is being imported, sys.argv does not name it yet
        original = sys.orig_argv
        return "-m" in original[:-1] and original[original.index("-m") + 1] == "prefect"
    return Path(sys.argv[0]).name == "prefect"


def split_profile(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the profile chosen before the command, if any, and the arguments from the command on."""
    profile, rest = None, list(arguments)
    while rest and rest[0].startswith("-"):
        option, equals, value = rest.pop(0).partition("=")
        if option in ("-p", "--profile"):
            profile = value if equals else rest.pop(0) if rest else None
    return profile, rest


def stack_address() -> str | None:
    """Return the API URL of this checkout's stack; None where none is up, or the user's environment names a server."""
    if "PREFECT_API_URL" in os.environ or "PREFECT_PROFILE" in os.environ:
        return None
    try:
        address = json.loads(STACK.read_text())["prefect_api_url"]
    except (OSError, ValueError, KeyError):
        return None
    return str(address) if address else None


def bare_name(arguments: Sequence[str]) -> int | None:
    """Return the index of a bare NAME in ``deployment run … NAME …``; None where the arguments are something else.

    Any option but FLAGS takes the next argument as its value, unless it is written ``--option=value``.

    Args:
        arguments: of the command line, from the command on.
    """
    if len(arguments) < 3 or arguments[0] not in ("deployment", "deployments") or arguments[1] != "run":
        return None
    if "--help" in arguments:
        return None
    position = 2
    while position < len(arguments) and arguments[position].startswith("-"):
        option = arguments[position]
        if option == "--":
            position += 1
            break
        position += 1 if option in FLAGS or "=" in option else 2
    if position >= len(arguments) or not arguments[position] or "/" in arguments[position]:
        return None
    return position


async def _complete(name: str, profile: str | None, address: str | None) -> str:
    """Return FLOW/DEPLOYMENT for the name, as the server knows it; end the command with one line where that fails."""
    from prefect.settings import get_current_settings

    with _settings(profile, address):
        url = get_current_settings().api.url
        if url is None:
            _refuse("no Prefect server is known; start one with `make up`, or set PREFECT_API_URL")
        try:
            with anyio.fail_after(TIMEOUT):
                names = await _deployments()
        except Exception as error:  # whatever it is, the command could not go on either
            reason = (str(error) or type(error).__name__).splitlines()[0]
            _refuse(f"cannot ask the Prefect server at {url} ({reason}); is it up? `make up` starts one")
    matches = [full for full in names if full.split("/", 1)[1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        _refuse(f"deployment name {name!r} is ambiguous; write one of {', '.join(matches)}")
    known = ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
    _refuse(f"no deployment is named {name!r}; there {f'are {known}' if names else 'is none, `make up` deploys'}")


@contextmanager
def _settings(profile: str | None, address: str | None) -> Iterator[None]:
    """Apply Prefect's settings as the command itself will see them."""
    from prefect.context import use_profile
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with ExitStack() as stack:
        if profile is not None:
            try:
                stack.enter_context(use_profile(profile, override_environment_variables=True))
            except KeyError:
                _refuse(f"unknown profile {profile!r}")
        if address is not None:
            stack.enter_context(temporary_settings({PREFECT_API_URL: address}))
        yield


async def _deployments() -> list[str]:
    """Return the full names of all deployments on the server, sorted."""
    from prefect.client.orchestration import get_client

    names: list[str] = []
    async with get_client() as client:
        while page := await client.read_deployments(limit=200, offset=len(names)):
            flows = {flow_id: (await client.read_flow(flow_id)).name for flow_id in {one.flow_id for one in page}}
            names += [f"{flows[one.flow_id]}/{one.name}" for one in page]
    return sorted(names)


def _refuse(reason: str) -> NoReturn:
    print(f"prefect deployment run: {reason}", file=sys.stderr)
    raise SystemExit(1)
