"""Where and how a policy is served."""

from __future__ import annotations

import dataclasses
import pathlib
import ssl


def require_token(token: object) -> str:
    """A token that a header of HTTP can carry, or "". Raises ValueError, which does not repeat it."""
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            "token: expected printable ASCII characters without spaces, found others (a line break at its end, where "
            "it was read from a file?)."
        )
    return token


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine reach it only if you say so, such as with 0.0.0.0."""
    port: int = 8000
    """0: any that is free."""
    token: str = ""
    """What clients must show as `Authorization: Bearer TOKEN` (or `Api-Key TOKEN`, as openpi's client sends it)."""
    token_file: str = ""
    """File with the token, which other users of this machine then cannot read in the list of processes."""
    certificate: str = ""
    """PEM file for TLS (wss://)."""
    key: str = ""
    """PEM file of its private key; empty: it is in the certificate's file."""
    max_batch: int = 0
    """Steps of one call of the policy; 0: as many as there are slots."""
    max_wait_s: float = 0.002
    """How long a step waits for those of other robots to share a call."""
    reading_threads: int = 2
    """Threads that unpack large messages and decode compressed pictures, beside the one that runs the policy."""
    max_message_bytes: int = 64 * 2**20
    max_picture_pixels: int = 4_000_000
    request_timeout_s: float = 60.0
    """An answer that takes longer is an error, and the connection is closed."""
    send_timeout_s: float = 10.0
    """A client that does not read its answers is dropped after this."""
    idle_timeout_s: float = 600.0
    """A client that sends nothing gives its slot back after this; 0: never."""
    drain_timeout_s: float = 30.0
    """How long running requests may take after SIGTERM."""

    def __post_init__(self):
        for field in ("max_wait_s", "idle_timeout_s", "max_batch"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        positive = ("max_message_bytes", "max_picture_pixels", "request_timeout_s", "send_timeout_s", "drain_timeout_s")
        for field in (*positive, "reading_threads"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be above 0.")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must be 0 ... 65535.")
        if self.token and self.token_file:
            raise ValueError("token and token_file are both given; give one of them.")
        if self.key and not self.certificate:
            raise ValueError("key is given without a certificate; TLS needs both.")

    def secret(self) -> str:
        """The token, "" for none. Raises ValueError for a file that has none, or one that no header can carry,
        OSError for one that is not there."""
        if not self.token_file:
            return require_token(self.token)
        token = pathlib.Path(self.token_file).read_text().strip()
        if not token:
            raise ValueError(f"token_file {self.token_file!r} is empty; expected one line with the token.")
        return require_token(token)


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises ValueError that names the file which cannot be used."""
    if not config.certificate:
        return None
    for name in ("certificate", "key"):
        file = getattr(config, name)
        if file and not pathlib.Path(file).is_file():
            raise ValueError(f"{name} {file!r} is no file; expected a PEM file.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.certificate, config.key or None)
    except (OSError, ssl.SSLError) as error:
        files = f"certificate {config.certificate!r}" + (f" with key {config.key!r}" if config.key else "")
        raise ValueError(
            f"{files} cannot be used for TLS ({error}): expected PEM files of a certificate and of its private key."
        ) from error
    return context
