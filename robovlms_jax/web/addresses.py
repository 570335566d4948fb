"""Can a program listen at an address? Found out before anything is loaded, and said with the way out."""

from __future__ import annotations

import errno
import socket

_NOT_OURS = (errno.EADDRNOTAVAIL, socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_FAMILY)


def check(host: str, port: int, *, option: str = "--") -> None:
    """Raises OSError that says what to change, see `why`. A port that is free now may be taken a moment later."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(why(error, host, port, option=option)) from error


def why(error: OSError, host: str, port: int, *, option: str = "--") -> str:
    """Why nobody can listen there, and what to do. option: what the names of the options begin with."""
    if error.errno in _NOT_OURS or isinstance(error, socket.gaierror):
        help_text = (
            f"This machine has no such address. Choose one of its own with {option}host: 127.0.0.1 (this machine "
            "alone) or 0.0.0.0 (everybody who can reach it)"
        )
    elif error.errno in (errno.EACCES, errno.EPERM):
        help_text = f"Choose a port above 1023 with {option}port"
    else:
        other = port + 1 if port < 65535 else 8000
        help_text = f"Choose another port with {option}port {other} (0: any that is free), or end what listens there"
    return f"nobody can listen at {host}:{port} ({error.strerror or error}). {help_text}."
