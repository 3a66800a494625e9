"""Show Sphinx's roles in docstrings (``:class:`~geostream.store.Store```) as plain names on the API page."""

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Replace each role by the name in code type, without its module where a tilde asks for that."""
    return ROLE.sub(lambda role: f"<code>{role[2].rpartition('.')[2] if role[1] else role[2]}</code>", html)
