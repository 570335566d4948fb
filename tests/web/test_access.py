"""The address that people are told to open."""

from __future__ import annotations

import socket

from robovlms_jax.web.access import Access


def test_other_hosts_get_a_token_and_an_address_that_a_browser_opens():
    assert Access.at("127.0.0.1").address(8000) == Access.at("LOCALHOST").address(8000) == "http://localhost:8000/"
    assert Access.at("::1").token == "" != Access.at("0.0.0.0").token
    assert Access.at("fe80::1", "t").address(80) == "http://[fe80::1]:80/?token=t"


def test_who_listens_everywhere_is_told_an_address_for_other_computers(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "workshop")
    everywhere = Access.at("0.0.0.0", "t")
    assert everywhere.is_open and not Access().is_open and not Access.at("workshop").is_open
    assert everywhere.address(8000) == "http://localhost:8000/?token=t"
    assert everywhere.from_elsewhere(8000) == "http://workshop:8000/?token=t"


def test_addresses_that_are_none_are_refused_and_not_stumbled_over():
    here = Access.at("127.0.0.1")
    assert here.refusal("/", "localhost:80", None) is None
    assert here.refusal("//[", "localhost:80", None) == (400, "The request's path is no address.")
    assert here.refusal("/", "localhost:80", "http://[")[0] == 403
