"""`web.config.yml` of the Prometheus exporter toolkit: TLS, client certificates, passwords, headers, rate limit.

The same file as for other exporters (exporter-toolkit, docs/web-configuration.md). What Python's ssl module cannot do
is refused with what to write instead; keys that nobody knows are refused, as there.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec

from jouletrace.config import FILE_DEPTH, FILE_LIMIT_BYTES, SHOWN_CHARACTERS, ConfigError, parse_duration

MAX_BCRYPT_COST: Final = 16
"""A hash of this cost takes 4 s to check (62 ms at cost 10, twice that with each step); more keeps everybody out."""
_BCRYPT = re.compile(r"\$2[abxy]\$([0-9]{2})\$[./A-Za-z0-9]{53}")
_HEADER_VALUE = re.compile(r"[ -~]*")


class ClientAuth(StrEnum):
    """Whether clients show a certificate."""

    NONE = "NoClientCert"
    IF_GIVEN = "VerifyClientCertIfGiven"
    REQUIRED = "RequireAndVerifyClientCert"


class TlsVersion(StrEnum):
    """A version of TLS."""

    TLS12 = "TLS12"
    TLS13 = "TLS13"


_UNVERIFIED = ("RequestClientCert", "RequireAnyClientCert")
"""Go can take a certificate without looking who signed it; ssl cannot, and it proves nothing."""

CIPHERS: Final[Mapping[str, str]] = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
"""TLS 1.2 suites that Go calls secure (crypto/tls, CipherSuites) by OpenSSL's names (ciphers(1))."""
TLS13_CIPHERS: Final = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""Always on with TLS 1.3, in Go as well as here; naming them has no effect."""
CURVES: Final[Mapping[str, str]] = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
    "X25519": "X25519",
}


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class TlsServerConfig(_Part, frozen=True):
    """`tls_server_config`; files are relative to the web configuration file."""

    cert: str | None = None
    key: str | None = None
    client_ca: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    client_ca_file: str | None = None
    client_auth_type: ClientAuth = ClientAuth.NONE
    client_allowed_sans: tuple[str, ...] = ()
    cipher_suites: tuple[str, ...] = ()
    curve_preferences: tuple[str, ...] = ()
    min_version: TlsVersion = TlsVersion.TLS12
    max_version: TlsVersion = TlsVersion.TLS13
    prefer_server_cipher_suites: bool = True


class Headers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`http_server_config.headers`: those that the toolkit allows."""

    content_security_policy: str | None = msgspec.field(default=None, name="Content-Security-Policy")
    x_frame_options: str | None = msgspec.field(default=None, name="X-Frame-Options")
    x_content_type_options: str | None = msgspec.field(default=None, name="X-Content-Type-Options")
    x_xss_protection: str | None = msgspec.field(default=None, name="X-XSS-Protection")
    strict_transport_security: str | None = msgspec.field(default=None, name="Strict-Transport-Security")

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield those that are set."""
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.encode_name, value


class HttpServerConfig(_Part, frozen=True):
    """`http_server_config`."""

    http2: bool = True
    """Taken, without effect: HTTP/1.1 is spoken here."""
    headers: Headers = Headers()


class RateLimit(_Part, frozen=True):
    """`rate_limit`."""

    interval: str = "0s"
    """Between two requests of a client, once `burst` is used up; 0 is no limit."""
    burst: int = 1

    @property
    def interval_seconds(self) -> float:
        """The interval, in seconds."""
        return parse_duration(self.interval)


class WebConfig(_Part, frozen=True):
    """The file."""

    tls_server_config: TlsServerConfig | None = None
    http_server_config: HttpServerConfig = HttpServerConfig()
    basic_auth_users: Mapping[str, str] = {}
    """Bcrypt hashes by user."""
    rate_limit: RateLimit = RateLimit()


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Refuses: the file, and where in it something stands."""

    file: Path
    lines: dict[str, int]

    def __call__(self, key: str, problem: str, mend: str) -> ConfigError:
        line = self.lines.get(key) or self.lines.get(key.rpartition(".")[0])
        place = f"{self.file}:{line}" if line else str(self.file)
        return ConfigError(f"{place}: {key or 'the file'}: {problem}; {mend}")


def read_web_config(file: Path) -> WebConfig:
    """Return what a file says, its own files as full paths; raises ConfigError with one line, never with a secret."""
    try:
        with file.open("rb") as opened:
            content = opened.read(FILE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"web.config.file: {file} cannot be read ({reason}); name a file that the daemon's user may read"
        ) from None
    if len(content) > FILE_LIMIT_BYTES:
        raise ConfigError(f"web.config.file: {file} is larger than 1 MiB; name a web configuration file")
    lines: dict[str, int] = {}
    refuse = _Refusal(file, lines)
    tree = _tree(content, lines, refuse)
    try:
        config = msgspec.convert(tree, WebConfig)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), refuse) from None
    _check(config, refuse)
    return _with_full_paths(config, file.parent)


def _tree(content: bytes, lines: dict[str, int], refuse: _Refusal) -> dict[str, Any]:
    """Return the file as mappings and lists and note in which line each key stands."""
    import yaml  # noqa: PLC0415  (20 ms that only those pay who have such a file)

    try:
        text = content.decode("utf-8-sig")
        kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        depth = 0
        # The parser in C recurses until the process dies; its events come one by one.
        for event in yaml.parse(text, Loader=kind):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > FILE_DEPTH:
                raise refuse("", "is nested too deeply", "write sections with keys below them")
        loader = kind(text)
        try:
            root: Any = loader.get_single_node()
            if root is None or root.tag == "tag:yaml.org,2002:null":
                return {}
            if root.id != "mapping":
                raise refuse("", "holds no keys", "write keys such as tls_server_config:")
            _walk(root, "", lines, refuse)
            tree: dict[str, Any] = loader.construct_document(root)
            return tree
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise refuse("", "is not UTF-8 text", "save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        # Without the parser's excerpt of the file: it may hold a key or a hash.
        mark = getattr(error, "problem_mark", None)
        if mark is not None:
            lines[""] = mark.line + 1
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise refuse("", f"is not valid YAML ({problem})", "mend this line or the one before it") from None


def _walk(node: Any, prefix: str, lines: dict[str, int], refuse: _Refusal) -> None:
    """Refuse unknown keys and those that stand there twice, which YAML itself lets through."""
    known = _known_keys(prefix.rstrip("."))
    for key_node, value_node in node.value:
        word = key_node.value if isinstance(key_node.value, str) else ""
        name = prefix + word
        if name in lines:
            lines[prefix.rstrip(".")] = key_node.start_mark.line + 1
            raise refuse(_shown(name), "stands there twice", "remove one of the two")
        lines[name] = key_node.start_mark.line + 1
        if known is not None and word not in known:
            near = difflib.get_close_matches(word[:SHOWN_CHARACTERS], known, n=1)
            mend = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise refuse(_shown(name), "is not a known key", mend) from None
        if value_node.id == "mapping":
            _walk(value_node, name + ".", lines, refuse)


def _known_keys(section: str) -> list[str] | None:
    """Return the keys of a section, None where names are free."""
    sections: dict[str, type[msgspec.Struct]] = {
        "": WebConfig,
        "tls_server_config": TlsServerConfig,
        "http_server_config": HttpServerConfig,
        "http_server_config.headers": Headers,
        "rate_limit": RateLimit,
    }
    struct = sections.get(section)
    return None if struct is None else [field.encode_name for field in msgspec.structs.fields(struct)]


def _shown(name: str) -> str:
    clipped = name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in clipped)


def _invalid(message: str, refuse: _Refusal) -> ConfigError:
    """Return the refusal for what msgspec says, such as "Invalid enum value 'TLS11' - at `$.tls_server_config...`"."""
    problem, _, path = message.partition(" - at `$")
    key = path.rstrip("`").lstrip(".").removesuffix("[...]")
    last = key.rpartition(".")[2]
    mends = {
        "client_auth_type": f"write {', '.join(ClientAuth)}",
        "min_version": "write TLS12 or TLS13",
        "max_version": "write TLS12 or TLS13",
    }
    if any(word in problem for word in _UNVERIFIED):
        problem = "a certificate that nobody verifies proves nothing, and Python's ssl cannot ask for one"
    mend = mends.get(last, f"write {_wanted(problem)}")
    return refuse(_shown(key), problem[:1].lower() + problem[1:], mend)


def _wanted(problem: str) -> str:
    match = re.search(r"Expected `([a-z]+)", problem)
    words = {
        "str": "text",
        "int": "a whole number",
        "bool": "true or false",
        "array": "a list",
        "object": "keys below it",
    }
    return words.get(match[1], match[1]) if match else "another value"


def _check(config: WebConfig, refuse: _Refusal) -> None:
    for user, hashed in config.basic_auth_users.items():
        name = f"basic_auth_users.{_shown(user)}"
        match = _BCRYPT.fullmatch(hashed)
        mend = "make one with `htpasswd -nBC 10 USER`"
        if not user or ":" in user:
            raise refuse(name, "is not a user name", "write a name without a colon")
        if match is None:
            raise refuse(name, "is not a bcrypt hash", mend)
        if not 4 <= int(match[1]) <= MAX_BCRYPT_COST:
            raise refuse(name, f"the hash has cost {int(match[1])}, of which 4 to {MAX_BCRYPT_COST} are taken", mend)
    for header, value in config.http_server_config.headers.items():
        if not _HEADER_VALUE.fullmatch(value):
            raise refuse(
                f"http_server_config.headers.{header}", "is not the value of a header", "write ASCII, one line"
            )
    try:
        seconds = config.rate_limit.interval_seconds
    except ValueError:
        raise refuse("rate_limit.interval", "is not a duration", "write one such as 1s or 500ms") from None
    if not 1 <= config.rate_limit.burst <= 1_000_000 or seconds > 86400:
        raise refuse("rate_limit", "is out of range", "write an interval up to 24h and a burst of 1 to 1000000")
    if config.tls_server_config is not None:
        _check_tls(config.tls_server_config, refuse)


def _check_tls(tls: TlsServerConfig, refuse: _Refusal) -> None:
    section = "tls_server_config"
    for name in ("cert", "key", "client_ca"):
        if getattr(tls, name) and getattr(tls, f"{name}_file"):
            raise refuse(f"{section}.{name}", f"is given beside {name}_file", "remove one of the two")
    for name in ("cert", "key"):
        if not getattr(tls, name) and not getattr(tls, f"{name}_file"):
            raise refuse(f"{section}.{name}_file", "is missing", "name the file, in PEM, or remove tls_server_config")
    has_ca = bool(tls.client_ca or tls.client_ca_file)
    if tls.client_auth_type is ClientAuth.NONE and (has_ca or tls.client_allowed_sans):
        raise refuse(
            f"{section}.client_auth_type",
            "asks for no client certificate, so client_ca_file and client_allowed_sans would have no effect",
            f"write {ClientAuth.REQUIRED}",
        )
    if tls.client_auth_type is not ClientAuth.NONE and not has_ca:
        raise refuse(
            f"{section}.client_ca_file", f"is missing, which {tls.client_auth_type} needs", "name the CA's file, in PEM"
        )
    if tls.min_version is TlsVersion.TLS13 and tls.max_version is TlsVersion.TLS12:
        raise refuse(f"{section}.min_version", "is above max_version", "remove max_version")
    for suite in tls.cipher_suites:
        if suite not in CIPHERS and suite not in TLS13_CIPHERS:
            raise refuse(f"{section}.cipher_suites", f"{_shown(suite)} is not known", f"known are {', '.join(CIPHERS)}")
    if len(tls.curve_preferences) > 1 or any(curve not in CURVES for curve in tls.curve_preferences):
        raise refuse(
            f"{section}.curve_preferences",
            "is not one known curve, and Python's ssl takes no more than one",
            f"write one of {', '.join(CURVES)}, or remove the key",
        )


def _with_full_paths(config: WebConfig, folder: Path) -> WebConfig:
    tls = config.tls_server_config
    if tls is None:
        return config
    paths = {
        name: str(folder / getattr(tls, name))
        for name in ("cert_file", "key_file", "client_ca_file")
        if getattr(tls, name)
    }
    return msgspec.structs.replace(config, tls_server_config=msgspec.structs.replace(tls, **paths))
