"""NBD URIs by the rules of RFC 3986 and of the NBD project's doc/uri.md."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.storage.disk import DiskError
from vmbus.storage.images import NbdDisk, open_disk
from vmbus.storage.images.nbd_uri import NbdAddress, TlsOptions, is_nbd_uri, parse_uri


@pytest.mark.parametrize(
    ("uri", "endpoint", "export"),
    [
        ("nbd://example.com:10809/export", ("example.com", 10809), "export"),
        ("nbd://example.com", ("example.com", 10809), ""),
        ("nbd://example.com:/", ("example.com", 10809), ""),
        ("nbd://example.com//disk", ("example.com", 10809), "/disk"),
        ("nbd://example.com/hello%20world", ("example.com", 10809), "hello world"),
        ("nbd://example.com/a+b&c=d", ("example.com", 10809), "a+b&c=d"),
        ("nbd://example.com/%C3%BC/%23%3F%25", ("example.com", 10809), "ü/#?%"),
        ("nbd://somebody@example.com/x", ("example.com", 10809), "x"),
        ("nbd://[::1]:99/x", ("::1", 99), "x"),
        ("nbd://[fe80::1%25eth0]/x", ("fe80::1%eth0", 10809), "x"),
        ("NBD://example.com/X", ("example.com", 10809), "X"),
        ("nbd+unix:///?socket=/tmp/a+b.sock", "/tmp/a+b.sock", ""),
        ("NBD+Unix:///x?socket=/tmp/a%20b", "/tmp/a b", "x"),
        ("nbd+unix:///x?socket=/tmp/a b=c", "/tmp/a b=c", "x"),
        ("nbd+unix:///?socket=nbd.sock", "nbd.sock", ""),
        ("nbd+unix:///?socket=%00/abstract", "\0/abstract", ""),
        ("nbd+unix:///?socket=/tmp/%FF", "/tmp/\udcff", ""),
        ("nbd+unix:?socket=/tmp/s", "/tmp/s", ""),
        ("nbd+unix:///" + "n" * 4096 + "?socket=/tmp/s", "/tmp/s", "n" * 4096),
    ],
)
def test_where_they_lead(uri: str, endpoint: tuple[str, int] | str, export: str) -> None:
    assert is_nbd_uri(uri)
    assert parse_uri(uri) == NbdAddress(endpoint, export)


@pytest.mark.parametrize(
    ("uri", "tls"),
    [
        ("nbds://host/x", TlsOptions(hostname="host")),
        ("NBDS://host/x?tls-hostname=other&tls-verify-peer=1", TlsOptions(hostname="other")),
        ("nbds://host/x?tls-type=x509&tls-verify-peer=0", TlsOptions(hostname="host", verify=False)),
        ("nbds://[fe80::1%25eth0]/x", TlsOptions(hostname="fe80::1")),
        ("nbds+unix:///x?socket=s", TlsOptions()),
        ("nbds+unix://alice@/?socket=s&tls-certificates=a%2Fb", TlsOptions(certificates=Path("a/b"))),
    ],
)
def test_how_they_are_encrypted(uri: str, tls: TlsOptions) -> None:
    assert parse_uri(uri).tls == tls


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("nbd:localhost:10809", "no host is named"),  # QEMU's form of old
        ("nbd:unix:/tmp/s", "no host is named"),
        ("nbd:///x", "no host is named, expected nbd://"),
        ("nbd://host:port/x", "host or port is not valid"),
        ("nbd://host:0/x", "0 is no port"),
        ("nbd://host:65536/x", "65536 is no port"),
        ("nbd://::1/x", "written in brackets"),
        ("nbd://host/x?socket=/tmp/s", r"needs the scheme nbd\+unix"),
        ("nbds://host/x?socket=/tmp/s", r"needs the scheme nbds\+unix"),
        ("nbd+unix:///x", "no socket is named"),
        ("nbd+unix:///x?socket=", "no socket is named"),
        ("nbd+unix:///x?socket=a&socket=b", "'socket' is there twice"),
        ("nbd+unix://host/x?socket=a", "a Unix socket has no host"),
        ("nbd+unix:///x?socket=a%00b", "cannot contain NUL"),
        ("nbd+unix:///x?socket=a&timeout=5", "parameter 'timeout' is not known"),
        ("nbd+unix:///x?Socket=a", "no socket is named"),
        ("nbd+unix:///%00?socket=a", "export's name cannot contain NUL"),
        ("nbd+unix:///%FF?socket=a", "export's name is not UTF-8"),
        ("nbd+unix:///" + "n" * 4097 + "?socket=/tmp/s", "at most 4096 bytes"),
        ("nbd+unix:///" + "%C3%BC" * 2049 + "?socket=/tmp/s", "at most 4096 bytes"),
        ("nbd+unix:///x?socket=100%", "followed by two hexadecimal digits"),
        ("nbd+unix:///x?socket=a#b", "no fragment"),
        ("nbd+unix:///x?socket=a\nb", "control characters"),
        ("nbd+vsock:///x", r"nbd\+vsock: is not supported"),
        ("nbds+ssh://host/x", r"nbds\+ssh: is not supported"),
        ("nbd://host/x?tls-verify-peer=0", "tls-verify-peer needs the scheme nbds"),
        ("nbd+unix:///x?socket=a&tls-certificates=d", "tls-certificates needs the scheme nbds"),
        ("nbds://host/x?tls-type=psk", "not with pre-shared keys"),
        ("nbds://host/x?tls-psk-file=keys", "not with pre-shared keys"),
        ("nbds://host/x?tls-type=anon", "or anonymously"),
        ("nbds://host/x?tls-verify-peer=maybe", "tls-verify-peer is 0 or 1"),
        ("nbds://host/x?tls-hostname=a%00b", "tls-hostname cannot contain NUL"),
        ("nbds://host/x?tls-certificates=/etc%00", "tls-certificates cannot contain NUL"),
        ("nbds://host/x?tls-priority=NORMAL", "parameter 'tls-priority' is not known"),
    ],
)
def test_what_is_refused_in_words(uri: str, sentence: str) -> None:
    """As an NBD URI: never is it taken for the name of a file."""
    with pytest.raises(DiskError, match=sentence) as caught:
        open_disk(uri)
    assert str(caught.value).startswith(uri[:20])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_time_limits_that_are_none(timeout: float) -> None:
    with pytest.raises(DiskError, match=r"a time limit of .* is not possible"):
        NbdDisk("nbd+unix:///?socket=/nowhere", timeout=timeout)


@pytest.mark.parametrize("name", ["nbd", "nbd.raw", "nbdx:y", "./nbd://host", "images/nbd:1", "xnbd://host"])
def test_files_are_no_uris(name: str) -> None:
    assert not is_nbd_uri(name)


@given(
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=60),
    st.integers(1, 65535),
)
def test_any_name_survives_percent_encoding(name: str, port: int) -> None:
    quoted = "".join(f"%{byte:02X}" for byte in name.encode())
    assert parse_uri(f"nbd://h:{port}/{quoted}") == NbdAddress(("h", port), name)
    if name:
        assert parse_uri(f"nbd+unix:///?socket={quoted}").endpoint == name


@given(st.text(max_size=80))
def test_anything_is_taken_apart_or_refused(rest: str) -> None:
    for scheme in ("nbd:", "nbds://", "nbd+unix:///", "NBDS+UNIX:///?socket=", "nbds://h/?"):
        try:
            parse_uri(scheme + rest)
        except DiskError as error:
            assert str(error).isprintable()  # noqa: PT017  (either is right)
