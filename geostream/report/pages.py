"""Fill the HTML templates of ``geostream/report/templates``.

Every page is one file that needs nothing else: its style sheet is inline, its pictures are ``data:`` URIs, and it has
no script. All text is escaped; only the SVG that matplotlib draws goes in as it is.
"""

from __future__ import annotations

import base64
from typing import Any

import jinja2


def render(template: str, **data: Any) -> str:
    """Return a template's page as HTML.

    Args:
        template: Name of a file in ``geostream/report/templates``.
        data: What the template shows. A name that the template uses and that is missing raises ``UndefinedError``.
    """
    return _environment().get_template(template).render(data)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("geostream.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "jpeg_uri": _jpeg_uri}
    return environment


def _cell(value: object, percent: bool = False) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1%}" if percent else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _jpeg_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
