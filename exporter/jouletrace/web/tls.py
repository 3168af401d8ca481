"""TLS as the web configuration asks for it, and the names in a client's certificate."""

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from jouletrace.config import FILE_LIMIT_BYTES, ConfigError
from jouletrace.followed import Note
from jouletrace.web.web_config import CIPHERS, CURVES, ClientAuth, TlsServerConfig, TlsVersion

_VERSIONS: Final = {TlsVersion.TLS12: ssl.TLSVersion.TLSv1_2, TlsVersion.TLS13: ssl.TLSVersion.TLSv1_3}
_VERIFICATION: Final = {
    ClientAuth.NONE: ssl.CERT_NONE,
    ClientAuth.IF_GIVEN: ssl.CERT_OPTIONAL,
    ClientAuth.REQUIRED: ssl.CERT_REQUIRED,
}


@dataclass(frozen=True, slots=True)
class Pems:
    """Certificates and key, in PEM, read once: all listeners have the same, also while files are being rotated."""

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes
    """Empty where clients show no certificate."""


def read_pems(tls: TlsServerConfig, note: Note) -> Pems:
    """Return what the configuration holds or its files do; raises ConfigError naming the key."""

    def content(name: str) -> bytes:
        file = getattr(tls, f"{name}_file")
        if file is None:
            return (getattr(tls, name) or "").encode()
        note(Path(file))
        try:
            with Path(file).open("rb") as opened:
                return opened.read(FILE_LIMIT_BYTES)
        except OSError as error:
            raise ConfigError(
                f"tls_server_config.{name}_file: {file} cannot be read ({error.strerror}); "
                "name a file that the daemon's user may read"
            ) from None

    return Pems(content("cert"), content("key"), content("client_ca"))


def server_context(tls: TlsServerConfig, pems: Pems) -> ssl.SSLContext:
    """Return the context for new connections; raises ConfigError naming the key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[tls.min_version]
    context.maximum_version = _VERSIONS[tls.max_version]
    context.set_alpn_protocols(["http/1.1"])
    if tls.prefer_server_cipher_suites:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    names = [CIPHERS[suite] for suite in tls.cipher_suites if suite in CIPHERS]
    if names:
        try:
            context.set_ciphers(":".join(names))
        except ssl.SSLError as error:
            raise _refused("cipher_suites", error, "this machine's OpenSSL has none of them: name others") from None
    for curve in tls.curve_preferences:
        context.set_ecdh_curve(CURVES[curve])
    _load_pair(context, tls, pems)
    _load_client_authorities(context, tls, pems)
    context.verify_mode = _VERIFICATION[tls.client_auth_type]
    return context


def _load_pair(context: ssl.SSLContext, tls: TlsServerConfig, pems: Pems) -> None:
    def no_passphrase() -> str:
        # Without this OpenSSL asks for it on the terminal.
        raise ConfigError(
            f"tls_server_config.key_file: {tls.key_file or 'the key'} is encrypted; "
            "write it without a passphrase (openssl pkey -in OLD -out NEW), mode 0400"
        )

    with _file_of(pems.cert) as cert, _file_of(pems.key) as key:
        try:
            context.load_cert_chain(cert, key, no_passphrase)
        except ssl.SSLError as error:
            shown = f"{tls.cert_file or 'cert'} and {tls.key_file or 'key'}"
            raise _refused("cert_file", error, f"write a certificate and its own key, in PEM, into {shown}") from None


def _load_client_authorities(context: ssl.SSLContext, tls: TlsServerConfig, pems: Pems) -> None:
    if tls.client_auth_type is ClientAuth.NONE:
        return
    try:
        with _file_of(pems.client_ca) as file:
            context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        shown = tls.client_ca_file or "client_ca"
        raise _refused("client_ca_file", error, f"write certificates in PEM into {shown}") from None


@contextmanager
def _file_of(content: bytes) -> Iterator[str]:
    """Yield the path of a file in memory: OpenSSL reads files, and a key must not touch the disk."""
    descriptor = os.memfd_create("jouletrace")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _refused(key: str, error: ssl.SSLError, mend: str) -> ConfigError:
    reason = (error.reason or "not PEM").replace("_", " ").lower()
    return ConfigError(f"tls_server_config.{key}: OpenSSL refuses it ({reason}); {mend}")


def names_of(certificate: Mapping[str, Any]) -> frozenset[str]:
    """Return the subject alternative names of a peer's certificate as `ssl` decodes it: DNS, IP, e-mail and URI."""
    return frozenset(
        value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address", "email", "URI")
    )
