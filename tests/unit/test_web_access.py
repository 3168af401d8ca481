"""The web configuration in force, before an application that is served over real sockets."""

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import bcrypt
import pytest
from aiohttp import web
from structlog.testing import capture_logs
from tests.certificates import Authority, tls_section, write_anew

from jouletrace.config import ConfigError
from jouletrace.web import access
from jouletrace.web.access import Access
from jouletrace.web.application import errors
from jouletrace.web.entrance import Entrance
from jouletrace.web.serve import WebServer

WORD = "s3cret"
USERS = f"basic_auth_users:\n  alice: {bcrypt.hashpw(b'opensesame', bcrypt.gensalt(4)).decode()}\n"
ALICE = {"Authorization": "Basic " + base64.b64encode(b"alice:opensesame").decode()}
TOKEN = {"Authorization": f"Bearer {WORD}"}
HEADERS = "http_server_config:\n  headers:\n    Strict-Transport-Security: max-age=60\n"


class Rig:
    """An application with a page, a probe, and a route with rules of its own, behind a web configuration."""

    def __init__(self, folder: Path, config: str | None) -> None:
        self.file = folder / "web.yml"
        if config is not None:
            self.file.write_text(config)
        self.entrance = Entrance(tokens=[WORD], max_body_bytes=1)
        self.access = Access(None if config is None else self.file, self.entrance)
        app = web.Application(middlewares=[errors])
        own = [web.get("/v1/own", self._answer_own)]
        app.add_routes([web.get("/metrics", self._answer), web.get("/v1/live", self._answer), *own])
        app.add_routes([web.get("/-/healthy", self._answer)])
        self.access.guard(app, own_rules=own)
        self._server = WebServer(app, tls=lambda: self.access.tls)
        self._socket = folder / "web.sock"
        self._session: aiohttp.ClientSession
        self.changes = 0
        self.access.on_change(self._changed)

    async def _answer(self, _: web.Request) -> web.Response:
        return web.Response(text="here")

    async def _answer_own(self, request: web.Request) -> web.Response:
        return await self._answer(request)

    def _changed(self) -> None:
        self.changes += 1

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Rig"]:
        await self._server.start(["127.0.0.1:0", f"unix:{self._socket}"])
        try:
            yield self
        finally:
            await self._server.stop()
            self.access.close()

    async def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, tls: ssl.SSLContext | None = None
    ) -> tuple[int, str, Mapping[str, str]]:
        connector = aiohttp.TCPConnector(ssl=tls or True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get(self._server.urls[0] + path, headers=headers) as response,
        ):
            return response.status, await response.text(), response.headers

    async def get_over_socket(self, path: str) -> int:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self._socket))) as session,
            session.get(f"http://localhost{path}") as response,
        ):
            return response.status

    async def reload(self, config: str) -> None:
        write_anew(self.file, config.encode())
        assert self.access.followed is not None
        with capture_logs():
            await self.access.followed.reload()


async def test_without_a_file_everybody_is_answered(tmp_path: Path) -> None:
    async with Rig(tmp_path, None).serving() as rig:
        assert [(await rig.get(path))[0] for path in ("/metrics", "/v1/own", "/-/healthy")] == [200] * 3
        assert rig.access.followed is None


async def test_users_come_in_and_so_does_the_token(tmp_path: Path) -> None:
    async with Rig(tmp_path, USERS).serving() as rig:
        for headers, status in (({}, 401), (ALICE, 200), (TOKEN, 200), ({"Authorization": "Bearer other"}, 401)):
            assert (await rig.get("/metrics", headers))[0] == status
        assert await rig.get_over_socket("/metrics") == 401
        # Probes have no passwords, and routes with rules of their own ask for other things.
        assert [(await rig.get(path))[0] for path in ("/-/healthy", "/v1/own")] == [200, 200]
        assert (await rig.get("/no/such/page"))[0] == 401


async def test_a_password_that_is_changed_while_it_is_checked_lets_nobody_in(tmp_path: Path) -> None:
    dear = bcrypt.hashpw(b"opensesame", bcrypt.gensalt(12)).decode()  # A quarter of a second to check.
    async with Rig(tmp_path, f"basic_auth_users: {{alice: {dear}}}\n").serving() as rig:
        asking = asyncio.create_task(rig.get("/metrics", ALICE))
        while not rig.access._passwords._waiting:  # noqa: ASYNC110 - the other side's state
            await asyncio.sleep(0.001)
        await rig.reload(f"basic_auth_users: {{bob: {dear}}}\n")
        assert (await asking)[0] == 401


async def test_refusals_are_json_below_v1(tmp_path: Path) -> None:
    async with Rig(tmp_path, USERS).serving() as rig:
        status, text, headers = await rig.get("/v1/live")
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="jouletrace", charset="UTF-8"')
        assert text.startswith('{"error": {"status": 401, "message": "User or password is missing or wrong')
        assert (await rig.get("/metrics"))[1].startswith("User or password is missing or wrong")


async def test_asking_too_often_is_refused_by_address(tmp_path: Path) -> None:
    async with Rig(tmp_path, "rate_limit: {interval: 1h, burst: 2}\n").serving() as rig:
        answers = [await rig.get("/metrics") for _ in range(3)]
        assert [status for status, _, _ in answers] == [200, 200, 429]
        assert answers[2][2]["Retry-After"] == "1"
        # Probes are not counted.
        assert (await rig.get("/-/healthy"))[0] == 200


async def test_headers_of_the_file_are_on_every_answer(tmp_path: Path) -> None:
    async with Rig(tmp_path, HEADERS + USERS).serving() as rig:
        for path, status in (("/-/healthy", 200), ("/metrics", 401), ("/v1/own", 200)):
            answer = await rig.get(path)
            assert (answer[0], answer[2]["Strict-Transport-Security"]) == (status, "max-age=60")


async def test_certificates_without_an_allowed_name_are_refused_everywhere(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    section = tls_section(
        *authority.issue("server", "127.0.0.1"),
        f"client_ca_file: {authority.file}",
        "client_auth_type: RequireAndVerifyClientCert",
        "client_allowed_sans: [prometheus.example]",
    )
    async with Rig(tmp_path, section).serving() as rig:
        for name, status in (("prometheus.example", 200), ("somebody.example", 403)):
            context = ssl.create_default_context(cafile=authority.file)
            context.load_cert_chain(*authority.issue("client", name))
            for path in ("/metrics", "/v1/own", "/-/healthy"):
                assert (await rig.get(path, tls=context))[0] == status
        # The mode of a Unix socket says who may connect; nobody shows a certificate there.
        assert await rig.get_over_socket("/metrics") == 200


async def test_connections_of_an_older_certificate_end_with_their_next_answer(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    section = tls_section(*authority.issue("server", "127.0.0.1"))
    rig = Rig(tmp_path, section)
    context = ssl.create_default_context(cafile=authority.file)
    async with rig.serving():
        port = int(rig._server.urls[0].rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        for ends in (False, True):
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (b"Connection: close" in await asyncio.wait_for(reader.readuntil(b"here"), 5)) is ends
            authority.issue("server", "127.0.0.1")
            await rig.reload(section)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_who_is_let_in_has_changed_or_not(tmp_path: Path) -> None:
    """A renewed certificate, and headers, leave all that stands alone."""
    authority, other = Authority(tmp_path), Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")

    def section(*more: str) -> str:
        return tls_section(*pair, f"client_ca_file: {tmp_path / 'ca.pem'}", *more)

    asks, given = "client_auth_type: RequireAndVerifyClientCert", "client_auth_type: VerifyClientCertIfGiven"
    write_anew(tmp_path / "ca.pem", authority.file.read_bytes())
    rig = Rig(tmp_path, section(asks))
    await rig.reload(section(asks))
    authority.issue("server", "127.0.0.1")
    await rig.reload(section(asks) + HEADERS + "rate_limit: {interval: 1ms, burst: 9}\n")
    assert (rig.changes, rig.entrance.rules) == (0, 0)
    write_anew(tmp_path / "ca.pem", other.file.read_bytes())
    await rig.reload(section(asks))
    assert rig.changes == 1
    await rig.reload(section(given))
    assert rig.changes == 2
    await rig.reload(section(given) + USERS)
    await rig.reload(section(given))
    assert (rig.changes, rig.entrance.rules) == (4, 4)
    await rig.reload(section(given) + "nonsense: 1\n")
    assert (rig.changes, rig.access.followed is not None and rig.access.followed.is_current) == (4, False)
    rig.access.close()


def test_a_file_is_checked_with_those_that_it_names(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server", "127.0.0.1")
    file = tmp_path / "web.yml"
    file.write_text(tls_section(cert, key))
    access.check(str(file))
    access.check("")
    key.unlink()
    with pytest.raises(ConfigError, match=r"^.*web\.yml: tls_server_config\.key_file: .*server\.key cannot be read"):
        access.check(str(file))
