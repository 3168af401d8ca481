import ssl
from pathlib import Path

import pytest
from tests.certificates import Authority

from jouletrace.config import ConfigError, EngineAuthorization, EngineTarget, EngineTlsConfig
from jouletrace.engines.doors import doors_of

URL = "https://127.0.0.1:8000"


def target(tmp_path: Path, **tls: object) -> EngineTarget:
    key = EngineAuthorization(credentials_file=str(tmp_path / "key"))
    return EngineTarget(url=URL + "/", authorization=key, tls_config=EngineTlsConfig(**tls) if tls else None)  # type: ignore[arg-type]


def test_an_engine_that_asks_for_nothing_has_no_door() -> None:
    assert doors_of([EngineTarget(url=URL)]) == {}


async def test_a_key_is_read_again_and_a_broken_one_keeps_the_old(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("hunter2\n")
    door = doors_of([target(tmp_path)])[URL]
    assert door.value.headers == {"Authorization": "Bearer hunter2"}
    assert "hunter2" not in repr(door.value)
    key.write_text("")
    await door.look()
    assert (door.value.headers, door.is_current) == ({"Authorization": "Bearer hunter2"}, False)
    key.write_text("hunter3")
    await door.look()
    assert (door.value.headers, door.is_current) == ({"Authorization": "Bearer hunter3"}, True)


def test_a_given_authority_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    authority = Authority(tmp_path)
    door = doors_of([target(tmp_path, ca_file=str(authority.file), server_name="engine.example")])[URL].value
    assert isinstance(door.tls, ssl.SSLContext)
    [known] = door.tls.get_ca_certs(binary_form=True)
    assert ssl.DER_cert_to_PEM_cert(known).strip() == authority.file.read_text().strip()
    assert (door.tls.verify_mode, door.tls.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert door.server_name == "engine.example"


def test_verification_is_skipped_on_demand_alone(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    door = doors_of([target(tmp_path, insecure_skip_verify=True)])[URL].value
    assert isinstance(door.tls, ssl.SSLContext)
    assert (door.tls.verify_mode, door.tls.check_hostname) == (ssl.CERT_NONE, False)


@pytest.mark.parametrize("content", ["", "two words", "x" * 1025])
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(ConfigError) as caught:
        doors_of([target(tmp_path)])
    assert str(caught.value).startswith(f"engines.targets: {URL}/: authorization.credentials_file: {tmp_path / 'key'}")
    assert "words" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_what_is_no_authority_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "key").write_text("k")
    if content is not None:
        (tmp_path / "ca.pem").write_text(content)
    with pytest.raises(ConfigError, match=r"tls_config\.ca_file: .*ca\.pem cannot be used"):
        doors_of([target(tmp_path, ca_file=str(tmp_path / "ca.pem"))])
