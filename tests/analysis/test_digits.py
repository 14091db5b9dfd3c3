"""A value and its interval are printed with the digits that the interval supports, and with the same ones."""

import pytest

from embedscale.texts import measured, within


@pytest.mark.parametrize(
    ("value", "ends", "texts"),
    [
        (2.3299, (2.2941, 2.3689), ("2.330", "2.294 … 2.369")),
        (2.3299, (2.014, 2.769), ("2.33", "2.01 … 2.77")),
        (2.3299, (1.02, 4.1), ("2.3", "1.0 … 4.1")),
        (7.0413e6, (6.7214e6, 7.5921e6), ("7.04e6", "6.72e6 … 7.59e6")),
        (9.98e6, (9.52e6, 1.052e7), ("1.00e7", "9.5e6 … 1.05e7")),
        (81234.0, (27312.0, 312345.0), ("8.1e4", "2.7e4 … 3.1e5")),
        (3.0, None, ("3", "–")),
        (5.78123, (5.78123, 5.78123), ("5.781", "5.781 … 5.781")),
        (-0.0123, (-0.0314, 0.0111), ("-0.012", "-0.031 … 0.011")),
    ],
)
def test_a_value_has_the_digits_of_its_interval(value, ends, texts):
    assert measured(value, ends) == texts


def test_a_value_without_an_interval_says_so():
    assert within(2.33, (2.01, 2.77), "95 %") == "2.33 (95 %: 2.01 … 2.77)"
    assert within(2.33, None, "95 %") == "2.33 (no interval)"
