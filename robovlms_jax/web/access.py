"""Who may open a page of this project: the rules that keep other web pages, and other people, from using it.

A browser lets any page it shows open a websocket to this machine. So the page's origin must be the host it was asked
for at, and without a token that host must be a name of this machine, which a foreign name that is made to point here
(DNS rebinding) is not.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import re
import secrets
import socket
import urllib.parse

LOCAL = ("localhost", "127.0.0.1", "[::1]")
LIVE = "/live"
"""Path of the page's websocket."""


@dataclasses.dataclass(frozen=True)
class Access:
    """host: the address that is listened at. token: what a visitor's address must say; "": nothing is asked."""

    host: str = "127.0.0.1"
    token: str = ""

    @classmethod
    def at(cls, host: str, token: str = "") -> Access:
        """With a random token where none is given and others than this machine can reach it."""
        return cls(host, token or ("" if _bracketed(host) in LOCAL else secrets.token_urlsafe(16)))

    def address(self, port: int) -> str:
        """What people open, the token included."""
        name = LOCAL[0] if self.host in ("127.0.0.1", "::1", "0.0.0.0", "::") else _bracketed(self.host)
        return f"http://{name}:{port}/" + (f"?token={self.token}" if self.token else "")

    @property
    def is_open(self) -> bool:
        """Whether it listens at all addresses, and not at this machine's own alone."""
        return self.host in ("0.0.0.0", "::")

    def from_elsewhere(self, port: int) -> str:
        """As `address`, by this machine's name, for other computers that know it."""
        return self.address(port).replace(LOCAL[0], socket.gethostname(), 1)

    def refusal(self, path: str, host: str | None, origin: str | None) -> tuple[int, str] | None:
        """Why a request is not answered, as an HTTP status and a sentence; None: it is.

        Args:
          path: with its query.
          host, origin: of the request's headers.
        """
        if not host:
            return 400, "The request names no host."
        name = _name(host)
        if not self.token and name not in (*LOCAL, _bracketed(self.host)):
            return 403, f"This page is served at {LOCAL[0]} only, not at {name[:80]}."
        if origin is not None and _origin_host(origin) != host.lower():
            return 403, "Another web page may not use this one."
        try:
            parts = urllib.parse.urlsplit(path)
        except ValueError:
            return 400, "The request's path is no address."
        given = urllib.parse.parse_qs(parts.query).get("token", [""])
        if self.token and not hmac.compare_digest(given[0].encode(), self.token.encode()):
            return 401, "The address lacks the token. Copy it whole from the terminal: it ends with ?token=..."
        return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host.lower()


def _name(host: str) -> str:
    """Without the port."""
    return re.sub(r":\d*$", "", host.lower())


def _origin_host(origin: str) -> str:
    try:
        parts = urllib.parse.urlsplit(origin.lower())
    except ValueError:
        return ""  # of no host
    return parts.netloc if parts.scheme in ("http", "https") else ""


def page_headers(page: str) -> dict[str, str]:
    """Headers of the page: it may run its own script and style, talk to its own server, and load nothing else."""
    script, style = (_digests(page, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }


def _digests(page: str, tag: str) -> str:
    """What the policy calls the page's own scripts or styles: a checksum of each."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
    sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{value}'" for value in sums) or "'none'"
