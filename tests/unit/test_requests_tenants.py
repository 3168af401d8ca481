import numpy as np
import pytest

from jouletrace.requests.tenants import OTHER, Accounts


def test_a_flood_of_names_ends_in_other() -> None:
    accounts = Accounts(models=2, tenants_per_model=200)
    numbers = {accounts.number(f"m{n % 5}", f"t{n}", "e") for n in range(100_000)}
    assert len(numbers) <= 3 * 201
    assert {model for model, _, _ in accounts.keys} == {"m0", "m1", OTHER}
    assert accounts.number("m0", "t0", "e") == accounts.number("m0", "t0", "e")
    assert accounts.keys[accounts.number("m0", "one more", "e")] == ("m0", OTHER, "e")


def test_joules_go_to_their_accounts_also_beyond_the_first_columns() -> None:
    accounts = Accounts(models=10, tenants_per_model=1000)
    numbers = np.array([accounts.number("m", f"t{n}", "e") for n in range(500)])
    accounts.add(np.concatenate((numbers, numbers)), np.full(1000, 1.0), np.full(1000, 2.0))
    assert {(prefill, decode) for _, prefill, decode, _ in accounts} == {(2.0, 4.0)}


def test_idle_is_spread_by_recent_use() -> None:
    accounts = Accounts(models=10, tenants_per_model=10)
    a, b = accounts.number("m", "a", "e"), accounts.number("m", "b", "e")
    accounts.number("m", "elsewhere", "f")
    accounts.add(np.array([a]), np.array([30.0]), np.array([0.0]))
    accounts.fade(600)
    accounts.add(np.array([b]), np.array([0.0]), np.array([5.0]))
    accounts.spread_idle("e", 100.0, ("?", "?"))
    assert (accounts.idle[a], accounts.idle[b]) == pytest.approx((75.0, 25.0))
    accounts.fade(1e9)
    accounts.spread_idle("e", 100.0, ("?", "?"))
    assert (accounts.idle[a], accounts.idle[b]) == pytest.approx((125.0, 75.0))


def test_idle_of_an_engine_that_served_nobody_has_a_bearer() -> None:
    accounts = Accounts(models=10, tenants_per_model=10)
    accounts.spread_idle("e", 7.0, ("model", "nobody"))
    assert list(accounts) == [(("model", "nobody", "e"), 0.0, 0.0, 7.0)]
