"""How an engine's page is let be read: the key that is sent, and the authority that its certificate is of.

The files are the operator's secrets: what they hold is sent to the engine that they are named for, and nowhere else.
"""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from jouletrace.config import ConfigError, EngineTarget, read_token
from jouletrace.followed import FollowedFiles, Note

KEY: Final = "engines.targets"


@dataclass(frozen=True, slots=True)
class Door:
    """What one engine asks for."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    tls: ssl.SSLContext | bool = True
    """True for the authorities that this machine trusts."""
    server_name: str | None = None
    """The name that the certificate must have, where it is not the URL's."""


OPEN: Final = Door()
"""An engine that asks for nothing."""


def doors_of(targets: Sequence[EngineTarget]) -> dict[str, FollowedFiles[Door]]:
    """Return by URL the doors of those engines that have one; raises ConfigError. `run` of each keeps it current."""
    return {
        target.url.rstrip("/"): FollowedFiles(KEY, partial(_door, target))
        for target in targets
        if target.authorization is not None or target.tls_config is not None
    }


def _door(target: EngineTarget, note: Note) -> Door:
    headers: dict[str, str] = {}
    if target.authorization is not None:
        file = Path(target.authorization.credentials_file)
        note(file)
        credentials = read_token(f"{KEY}: {target.url}: authorization.credentials_file", file)
        headers["Authorization"] = f"{target.authorization.type} {credentials}"
    tls = target.tls_config
    if tls is None:
        return Door(headers)
    if tls.ca_file is not None:
        note(Path(tls.ca_file))
    try:
        # With a file: its authorities instead of those that the machine trusts, as in Prometheus.
        context = ssl.create_default_context(cafile=tls.ca_file)
    except OSError as error:
        reason = (getattr(error, "reason", None) or error.strerror or "not PEM").replace("_", " ").lower()
        raise ConfigError(
            f"{KEY}: {target.url}: tls_config.ca_file: {tls.ca_file} cannot be used ({reason}); "
            "name a file with certificates in PEM that the daemon's user may read"
        ) from None
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return Door(headers, context, tls.server_name)
