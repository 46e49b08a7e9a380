"""NBD URIs (the NBD project's doc/uri.md): what a user writes, taken apart by the rules of RFC 3986.

`+` is a plus here, unlike in web forms, and schemes may be written in capitals. What a URI says and this client cannot
do is refused: a parameter that would be ignored may have been what keeps the data private.
"""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

from vmbus.errors import printable
from vmbus.storage.disk import DiskError

__all__ = ["DEFAULT_PORT", "NbdAddress", "TlsOptions", "is_nbd_uri", "parse_uri"]

DEFAULT_PORT = 10809
MAX_NAME = 4096
"""Bytes of the longest export name (doc/proto.md, "Values")."""
_MAX_URI = 64 << 10
_FORMS = "nbd://host[:port]/[export] or nbd+unix:///[export]?socket=path (nbds with TLS)"
_SCHEME = re.compile(r"nbds?(\+[a-z0-9+.-]*)?:", re.IGNORECASE)
_PARTS = re.compile(
    r"([^:/?#]+):(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL
)  # RFC 3986 appendix B
_AUTHORITY = re.compile(r"(?:[^@]*@)?(\[[^\]]*\]|[^:\[\]]*)(?::([0-9]*))?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_Refuse: TypeAlias = Callable[[str], DiskError]
_TRUTH = {"0": False, "false": False, "1": True, "true": True}


@dataclass(frozen=True)
class TlsOptions:
    """How a connection is encrypted, and who has to be at its other end.

    Attributes:
        certificates: a folder with the authority's ``ca-cert.pem`` and, if the server asks who we are,
            ``client-cert.pem`` and ``client-key.pem``; None means the authorities that this host trusts.
        hostname: the name that the server's certificate must have; empty means any, as for a Unix socket.
        verify: whether the certificate is looked at.
    """

    certificates: Path | None = None
    hostname: str = ""
    verify: bool = True


@dataclass(frozen=True)
class NbdAddress:
    """Where an NBD URI leads.

    Attributes:
        endpoint: a (host, port) pair or a Unix socket's path, which begins with a NUL in the abstract namespace.
        export: the export's name; empty is the server's default.
        tls: how to encrypt the connection, None for no encryption.
    """

    endpoint: tuple[str, int] | str
    export: str
    tls: TlsOptions | None = None


def is_nbd_uri(text: str) -> bool:
    """Whether a string wants to be an NBD URI, a right one or not."""
    return _SCHEME.match(text) is not None


def parse_uri(uri: str) -> NbdAddress:
    """Take an NBD URI apart.

    Raises:
        DiskError: it is none, or says something that is not supported.
    """

    def refuse(why: str) -> DiskError:
        return DiskError(f"{printable(uri)}: {why}", errno.EINVAL)

    match = _PARTS.fullmatch(uri)
    if match is None or len(uri) > _MAX_URI or not is_nbd_uri(uri):
        raise refuse(f"expected {_FORMS}")
    scheme, authority, path, query, fragment = match.groups()
    scheme = scheme.lower()
    if scheme not in ("nbd", "nbds", "nbd+unix", "nbds+unix"):
        raise refuse(f"{scheme}: is not supported, expected {_FORMS}")
    if any(char < " " or char == "\x7f" for char in uri):
        raise refuse("control characters must be percent-encoded")
    if _BAD_ESCAPE.search(uri):
        raise refuse("a % must be followed by two hexadecimal digits (%25 is the % itself)")
    if fragment is not None:
        raise refuse("NBD URIs have no fragment (%23 is the # itself)")
    host, port = _endpoint(authority or "", refuse)
    export = _text(path.removeprefix("/"), "the export's name", refuse)
    if len(export.encode()) > MAX_NAME:
        raise refuse(f"the name of an export has at most {MAX_NAME} bytes")
    parameters = _parameters(query or "", refuse)
    endpoint: tuple[str, int] | str
    if scheme.endswith("+unix"):
        if host or port is not None:
            raise refuse(f"a Unix socket has no host, expected {scheme}:///[export]?socket=path")
        endpoint = os.fsdecode(parameters.pop("socket", b""))
        if not endpoint:
            raise refuse(f"no socket is named, expected {_FORMS}")
        if "\0" in endpoint[1:] or endpoint == "\0":
            raise refuse("a socket's path cannot contain NUL")
    else:
        if not host:
            raise refuse(f"no host is named, expected {_FORMS}")
        if "socket" in parameters:
            raise refuse(f"a socket's path needs the scheme {scheme}+unix")
        endpoint = host, DEFAULT_PORT if port is None else port
    tls = _tls(parameters, host, encrypted=scheme.startswith("nbds"), refuse=refuse)
    if parameters:
        raise refuse(f"the parameter {printable(next(iter(parameters)), 60)!r} is not known")
    return NbdAddress(endpoint, export, tls)


def _text(quoted: str, what: str, refuse: _Refuse) -> str:
    """Percent-decoded text."""
    try:
        text = unquote_to_bytes(quoted).decode()
    except UnicodeError:
        raise refuse(f"{what} is not UTF-8") from None
    if "\0" in text:
        raise refuse(f"{what} cannot contain NUL")
    return text


def _endpoint(authority: str, refuse: _Refuse) -> tuple[str, int | None]:
    """Host and port of the authority. A user's name is for kinds of authentication that are not supported."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise refuse("the host or port is not valid (IPv6 addresses are written in brackets)")
    host = _text(match[1].removeprefix("[").removesuffix("]"), "the host's name", refuse)
    port = int(match[2]) if match[2] else None
    if port is not None and not 0 < port < 1 << 16:
        raise refuse(f"{printable(match[2], 20)} is no port")
    return host, port


def _parameters(query: str, refuse: _Refuse) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        name = _text(key, "a parameter's name", refuse)
        if name in found:
            raise refuse(f"the parameter {printable(name, 60)!r} is there twice")
        found[name] = unquote_to_bytes(value)
        if name.startswith("tls-") and b"\0" in found[name]:
            raise refuse(f"{printable(name, 60)} cannot contain NUL")
    return found


def _tls(parameters: dict[str, bytes], host: str, *, encrypted: bool, refuse: _Refuse) -> TlsOptions | None:
    """Take the parameters about TLS out of the others."""
    given = {key: parameters.pop(key) for key in list(parameters) if key.startswith("tls-")}
    if not encrypted:
        if given:
            raise refuse(f"{printable(next(iter(given)), 60)} needs the scheme nbds or nbds+unix")
        return None
    kind = given.pop("tls-type", b"x509")
    if kind != b"x509" or "tls-psk-file" in given or "tls-username" in given:
        raise refuse("TLS is supported with certificates (x509), not with pre-shared keys or anonymously")
    folder, hostname = given.pop("tls-certificates", b""), given.pop("tls-hostname", b"")
    verify = _TRUTH.get(given.pop("tls-verify-peer", b"1").decode("ascii", "replace"))
    if verify is None:
        raise refuse("tls-verify-peer is 0 or 1")
    if given:
        raise refuse(f"the parameter {printable(next(iter(given)), 60)!r} is not known")
    return TlsOptions(
        certificates=Path(os.fsdecode(folder)) if folder else None,
        hostname=hostname.decode("utf-8", "replace") or host.partition("%")[0],
        verify=verify,
    )
