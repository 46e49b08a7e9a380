"""Certificates for tests of TLS, made with the `openssl` program: an authority, a server and a client."""

import subprocess
from pathlib import Path

from reference.disk_model import tool


def make_certificates(folder: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> Path:
    """Fill a folder with the files that QEMU, nbdkit and libnbd expect; returns it.

    Args:
        folder: is made.
        names: what the server's certificate is for, as in a "subject alternative name".
    """
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run([tool("openssl"), *arguments], cwd=folder, check=True, capture_output=True)

    def key(name: str) -> list[str]:
        return [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            f"{name}-key.pem",
        ]

    openssl("req", "-x509", *key("ca"), "-out", "ca-cert.pem", "-subj", "/CN=authority", "-days", "2")
    for name, use in (("server", "serverAuth"), ("client", "clientAuth")):
        extensions = folder / f"{name}.cnf"
        extensions.write_text(f"extendedKeyUsage={use}\nsubjectAltName={names}\nkeyUsage=digitalSignature\n")
        openssl("req", "-new", *key(name), "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"),
            *("-out", f"{name}-cert.pem", "-days", "2", "-extfile", extensions.name),
        )
    return folder
