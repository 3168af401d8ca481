"""Certificates for tests: made by trustme, as files that a web configuration can name."""

from collections.abc import Sequence
from pathlib import Path

import trustme


class Authority:
    """A certificate authority of one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.file = folder / f"ca-{id(self)}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, *names: str) -> tuple[Path, Path]:
        """Write a certificate for these host names and addresses, and its key; return both files."""
        issued = self._ca.issue_cert(*names)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        write_anew(cert, b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        write_anew(key, issued.private_key_pem.bytes())
        return cert, key


def write_anew(file: Path, content: bytes) -> None:
    """Write a file as rotation does: complete under another name, then moved over the old one."""
    beside = file.with_suffix(".new")
    beside.write_bytes(content)
    beside.replace(file)


def tls_section(cert: Path, key: Path, *more: str) -> str:
    """Return `tls_server_config` as text."""
    lines: Sequence[str] = (f"cert_file: {cert.name}", f"key_file: {key.name}", *more)
    return "tls_server_config:\n" + "".join(f"  {line}\n" for line in lines)
