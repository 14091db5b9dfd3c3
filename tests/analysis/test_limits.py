"""What a budget may be: amounts, units, hours and tokens, and the line that refuses others."""

import pytest

from analysis.advice.evidence import Limit, parse_limit
from embedscale.cli import main


def test_budgets_are_read_with_their_units():
    day = 1e15 * 86400
    for text, flop in {"1e17": 1e17, "100 PFLOP": 1e17, "0.1EFLOP": 1e17, "2 PFLOP-days": 2 * day}.items():
        assert parse_limit(text).flop == pytest.approx(flop)
    assert parse_limit("24 GPU-hours") == Limit(gpu_hours=24.0)
    assert parse_limit("1,500,000 GFLOP", "2,000.5E6") == Limit(flop=pytest.approx(1.5e15), tokens=2000.5e6)
    assert parse_limit(None, "2e9") == Limit(tokens=2e9)
    assert parse_limit("6×10^18 FLOP", "2 billion tokens") == Limit(flop=6e18, tokens=2e9)
    assert parse_limit("1 500 device hours") == Limit(gpu_hours=1500.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0"], "budget: 0 is out of range; allowed: above 0"),
        (["-1e17"], "budget: -1e17 is out of range; allowed: above 0"),
        (["nan"], "budget: nan is out of range; allowed: above 0"),
        (["2e9", "tokens"], "budget: '2e9 tokens' is not an amount with a known unit; allowed: 1e17, 100 PFLOP"),
        (["--tokens", "2 PFLOP"], "--tokens: '2 PFLOP' is not an amount with a known unit; allowed: 2e9, 2B"),
        (["5", "bananas"], "budget: '5 bananas' is not an amount with a known unit"),
        (["1e999"], "budget: 1e999 is out of range"),
        ([], "budget: nothing is given; allowed: a budget such as 1e17, --tokens, or both"),
        (["--tokens", "-3"], "--tokens: -3 is out of range; allowed: above 0"),
        (["1,5e17"], "budget: '1,5e17' was found; the comma does not separate thousands: write 1.5 or 1,500,000"),
        (["--tokens", "1,50"], "--tokens: '1,50' was found; the comma does not separate thousands"),
    ],
)
def test_a_wrong_budget_is_refused_in_one_line(paper_folder, words, message, capsys):
    assert main(["recipe", str(paper_folder), *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"embedscale: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "1e60"], "--tokens: 1e60 is out of range; allowed: at most 1e30 tokens"),
        (["--tokens", "1"], "--tokens: 1 tokens is less than one pair costs; allowed: at least 78 tokens"),
    ],
)
def test_absurd_tokens_are_refused_as_tokens(paper_folder, words, said, capsys):
    assert main(["recipe", str(paper_folder), *words]) == 2
    assert capsys.readouterr().err == f"embedscale: {said}\n"
