"""The page at ``/``: one file without anything from elsewhere."""

from pathlib import Path

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""Content security policy: what stands in the page, and requests to this server."""


def html() -> bytes:
    """The page."""
    return Path(__file__).with_name("page.html").read_bytes()
