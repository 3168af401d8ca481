"""TLS as the web configuration asks for it, and the names in a client's certificate."""

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from jouletrace.config import ConfigError
from jouletrace.web.web_config import CIPHERS, CURVES, ClientAuth, TlsServerConfig, TlsVersion

_VERSIONS: Final = {TlsVersion.TLS12: ssl.TLSVersion.TLSv1_2, TlsVersion.TLS13: ssl.TLSVersion.TLSv1_3}
_VERIFICATION: Final = {
    ClientAuth.NONE: ssl.CERT_NONE,
    ClientAuth.IF_GIVEN: ssl.CERT_OPTIONAL,
    ClientAuth.REQUIRED: ssl.CERT_REQUIRED,
}


def server_context(tls: TlsServerConfig) -> ssl.SSLContext:
    """Return the context for new connections; raises ConfigError naming the key. Reads the files."""
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
    _load_pair(context, tls)
    _load_client_authorities(context, tls)
    context.verify_mode = _VERIFICATION[tls.client_auth_type]
    return context


def _load_pair(context: ssl.SSLContext, tls: TlsServerConfig) -> None:
    def no_passphrase() -> str:
        # Without this OpenSSL asks for it on the terminal.
        raise ConfigError(
            f"tls_server_config.key_file: {tls.key_file or 'the key'} is encrypted; "
            "write it without a passphrase (openssl pkey -in OLD -out NEW), mode 0400"
        )

    with _file_of(tls.cert, tls.cert_file) as cert, _file_of(tls.key, tls.key_file) as key:
        for name, file in (("cert_file", cert), ("key_file", key)):
            try:
                Path(file).open("rb").close()
            except OSError as error:
                raise _unreadable(name, file, error) from None
        try:
            context.load_cert_chain(cert, key, no_passphrase)
        except ssl.SSLError as error:
            shown = f"{tls.cert_file or 'cert'} and {tls.key_file or 'key'}"
            raise _refused("cert_file", error, f"write a certificate and its own key, in PEM, into {shown}") from None


def _load_client_authorities(context: ssl.SSLContext, tls: TlsServerConfig) -> None:
    if tls.client_auth_type is ClientAuth.NONE:
        return
    try:
        context.load_verify_locations(cafile=tls.client_ca_file, cadata=tls.client_ca or None)
    except ssl.SSLError as error:
        shown = tls.client_ca_file or "client_ca"
        raise _refused("client_ca_file", error, f"write certificates in PEM into {shown}") from None
    except OSError as error:
        raise _unreadable("client_ca_file", tls.client_ca_file or "", error) from None


@contextmanager
def _file_of(inline: str | None, file: str | None) -> Iterator[str]:
    """Yield a file's path, for text that of one in memory: OpenSSL reads files, and a key must not touch the disk."""
    if file is not None:
        yield file
        return
    descriptor = os.memfd_create("jouletrace")
    try:
        os.write(descriptor, (inline or "").encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _refused(key: str, error: ssl.SSLError, mend: str) -> ConfigError:
    reason = (error.reason or "not PEM").replace("_", " ").lower()
    return ConfigError(f"tls_server_config.{key}: OpenSSL refuses it ({reason}); {mend}")


def _unreadable(key: str, file: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"tls_server_config.{key}: {file} cannot be read ({error.strerror}); "
        "name a file that the daemon's user may read"
    )


def names_of(certificate: Mapping[str, Any]) -> frozenset[str]:
    """Return the subject alternative names of a peer's certificate as `ssl` decodes it: DNS, IP, e-mail and URI."""
    return frozenset(
        value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address", "email", "URI")
    )
