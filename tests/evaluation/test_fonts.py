"""Korean in pictures."""

from __future__ import annotations

import logging

import pytest

from robovlms_jax.evaluation.report import fonts


@pytest.fixture(autouse=True)
def forget():
    fonts.korean_font.cache_clear()
    yield
    fonts.korean_font.cache_clear()


@pytest.mark.parametrize(
    ("text", "latin"),
    [
        ("박스를 왼쪽으로", "bakseureul oenjjokeuro"),
        ("컵까지 가세요", "keopkkaji gaseyo"),
        ("두 박스 사이", "du bakseu sai"),
        ("open 문, 1!", "open mun, 1!"),
    ],
)
def test_hangul_is_spelt_in_latin_letters(text, latin):
    assert fonts.romanize(text) == latin


def test_without_a_font_korean_is_spelt_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(fonts, "_KOREAN", ("no such font.ttf",))
    with caplog.at_level(logging.INFO):
        assert [fonts.with_font("컵까지", 12)[0] for _ in range(2)] == ["keopkkaji"] * 2
        assert fonts.with_font("the cup", 12)[0] == "the cup"
    assert len(caplog.records) == 1


def test_with_a_font_of_the_system_korean_stays(monkeypatch):
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setattr(fonts, "_KOREAN", (path,))
    text, font = fonts.with_font("컵까지", 12)
    assert text == "컵까지" and font.path == path
