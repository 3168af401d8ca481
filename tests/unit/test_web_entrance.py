import pytest

from jouletrace.web.entrance import Body, Entrance, is_loopback, names_loopback

WORD = "s3cret"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "::1%lo"])
def test_loopback_addresses(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address", ["", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "localhost", "127.0.0.1:80", "unix:"]
)
def test_all_others_are_not(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("localhost", True), ("localhost:4318", True), ("[::1]:9841", True), ("127.0.0.1", True), ("", False),
     ("evil.example", False), ("localhost.evil.example", False), ("10.0.0.1:9841", False), ("[::1", False)],
)  # fmt: skip
def test_names_of_this_machine(host: str, is_ours: bool) -> None:
    assert names_loopback(host) is is_ours


def test_without_a_token_the_address_decides() -> None:
    entrance = Entrance(max_body_bytes=1)
    assert entrance.stranger("127.0.0.1", {}) is None
    refusal = entrance.stranger("10.0.0.1", {"authorization": f"Bearer {WORD}"})
    assert refusal is not None
    assert refusal.status == 403


@pytest.mark.parametrize("name", ["forwarded", "via", "x-forwarded-for", "x-real-ip"])
def test_who_asks_a_proxy_on_this_machine_may_be_anywhere(name: str) -> None:
    entrance = Entrance(max_body_bytes=1)
    refusal = entrance.stranger("127.0.0.1", {name: "127.0.0.1"})
    assert refusal is not None
    assert (refusal.status, "proxy" in refusal.message) == (403, True)
    assert Entrance(tokens=[WORD], max_body_bytes=1).stranger("127.0.0.1", {name: "x"} | bearer(WORD)) is None


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", f"Basic {WORD}", WORD, "Bearer s3cret\udcff"])
def test_with_a_token_nothing_else_does(authorization: str) -> None:
    entrance = Entrance(tokens=[WORD], max_body_bytes=1)
    assert entrance.stranger("10.0.0.1", {"authorization": f"bearer  {WORD} "}) is None
    refusal = entrance.stranger("127.0.0.1", {"authorization": authorization})
    assert refusal is not None
    assert refusal.status == 401


def test_another_token_counts_at_once() -> None:
    entrance = Entrance(tokens=[WORD], max_body_bytes=1)
    entrance.use_tokens(["other"])
    assert entrance.stranger("10.0.0.1", bearer("other")) is None
    assert entrance.stranger("127.0.0.1", bearer(WORD)) is not None


def test_each_of_several_tokens_is_good() -> None:
    entrance = Entrance(tokens=["first", "second", "third"], max_body_bytes=1)
    answers = [
        entrance.has_token(f"Bearer {word}") for word in ("first", "second", "third", "fourth", "", "first second")
    ]
    assert answers == [True, True, True, False, False, False]
    assert not entrance.has_token("Basic second")


def test_what_was_begun_under_other_rules_can_be_told() -> None:
    entrance = Entrance(tokens=["old"], max_body_bytes=1)
    begun = entrance.rules
    entrance.use_tokens(["old"])
    assert entrance.rules == begun
    entrance.use_tokens(["new", "old"])
    assert entrance.rules != begun


def test_what_a_body_holds_is_counted_once_unless_it_was_packed() -> None:
    plain = b"x" * 100
    assert Body(plain, plain).held_bytes == 100
    assert Body(plain, b"").held_bytes == 100
    assert Body(plain, b"z" * 10).held_bytes == 110
