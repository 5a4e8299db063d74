"""Readers and cases: the Van Dyke data to every printed digit, and identities that must hold."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.mrmc import (
    Cells,
    Group,
    areas,
    components,
    estimate,
    jackknifed,
    means,
    of_arm,
    of_change,
    omnibus,
)
from brainfm_cli.learning.scores import weighted_auroc
from brainfm_cli.learning.uncertainty import delong

# Ratings 1 to 5 of 69 cases without and 45 with aortic dissection, a line per reader, first spin-echo, then cine MRI (Van Dyke et al. 1993, as
# distributed with the OR-DBM MRMC software).
VAN_DYKE = """
122151111111411111111131311214111113121211233131133111111221111332111555545554555434245555555154454553555115554451
232222222322522232222222422223222222222222222222222222222432232222222535555542555442225555555243354552425225555352
222235112242422232221232411322112224121412112222223211211221151421212545555555555542355555555252255552555225555552
111111311111111111112111211112111111111111111111331111111111111311111555555555555555155555555554544553555125555555
351211112221211122113221111211211231221113332111211111111341231212113525255551545452235555554144322151515115553552
333222223213122222211111421312214323123122233111333113412421241442111535555554555544335555555355355554455535555551
322222223222222122221222322222212212222231223222222222322322222222122535555552555344245455545252355532425525555552
242222322211132222121121411512112122212221132111233113221232341242121525555555555354145555555253355543555534555551
221111312111122111211111321212111122112111112121212211111212111323211545555554555455555555555455445555555535555555
223122221222111222122212322321212222112121132122332122221222231233111525455555455343335555555251332532545533555553
"""


@pytest.fixture(scope="module")
def ratings() -> np.ndarray:
    """(arms, readers, cases)."""
    return np.array([[int(digit) for digit in line] for line in VAN_DYKE.split()], float).reshape(2, 5, 114)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.repeat([False, True], [69, 45])


def test_van_dyke_by_delong(ratings: np.ndarray, truth: np.ndarray):
    """MRMCaov's output, every printed digit."""
    cells = areas(ratings, truth)
    printed = [[".919646", ".858776", ".903865", ".973108", ".829791"], [".947826", ".905314", ".921739", ".999356", ".929952"]]
    assert [[f"{value:.6f}"[1:] for value in row] for row in cells.values] == printed
    found = components(cells)
    assert (f"{found.error_variance:.10f}", f"{found.cov1:.10f}") == ("0.0007921325", "0.0003420090")
    assert (f"{found.cov2:.10f}", f"{found.cov3:.10f}") == ("0.0003395265", "0.0002358497")
    assert (f"{found.ms_arm:.9f}", f"{found.ms_arm_reader:.10f}") == ("0.004796171", "0.0005510306")
    test = omnibus(found, 2, 5, "random")
    assert (f"{test.statistic:.6f}", test.df1, f"{test.df2:.5f}", f"{test.p:.8f}") == ("4.484854", 1, "15.06611", "0.05123303")
    change = estimate(of_change(cells, 0, 1, range(5)))
    assert (f"{change.value:.8f}", f"{change.low:.7f}", f"{change.high:.7f}") == ("-0.04380032", "-0.0878672", "0.0002666")
    assert (f"{change.df:.5f}", f"{change.p:.8f}") == ("15.06611", "0.05123303")


def test_van_dyke_by_the_jackknife(ratings: np.ndarray, truth: np.ndarray):
    """OR-DBM MRMC 2.51's printout of the same data: three analyses, and single arms."""
    cells = jackknifed([[weighted_auroc(truth.astype(int), row) for row in arm] for arm in ratings], 114)
    found = components(cells)
    assert [f"{value:.8f}" for value in (found.error_variance, found.cov1, found.cov2, found.cov3)] == [
        "0.00080229", "0.00034661", "0.00034407", "0.00023903",
    ]  # fmt: skip
    random, readers, cases = (omnibus(found, 2, 5, variant) for variant in ("random", "fixed readers", "fixed cases"))
    assert (f"{random.statistic:.2f}", f"{random.df2:.2f}", f"{random.p:.4f}") == ("4.46", "15.26", "0.0517")
    assert (f"{readers.statistic:.5f}", f"{readers.p:.4f}", readers.df2) == ("5.47595", "0.0193", None)
    assert (f"{cases.statistic:.2f}", f"{cases.df2:.0f}", f"{cases.p:.4f}") == ("8.70", "4", "0.0420")
    printed = {
        "random": ("-0.08796", "0.00036", "0.0517"),
        "fixed readers": ("-0.08049", "-0.00711", "0.0193"),
        "fixed cases": ("-0.08502", "-0.00258", "0.0420"),
    }
    for variant, expected in printed.items():
        change = estimate(of_change(cells, 0, 1, range(5)), variant=variant)
        assert (f"{change.low:.5f}", f"{change.high:.5f}", f"{change.p:.4f}") == expected
    single = {
        ("random", 0): ("0.03317360", "0.82522360", "0.96885048"),
        ("random", 1): ("0.02156637", "0.89413783", "0.98753689"),
        ("fixed readers", 0): ("0.02428971", "0.84943008", "0.94464399"),
        ("fixed readers", 1): ("0.01677632", "0.90795637", "0.97371835"),
        ("fixed cases", 0): ("0.02482994", "0.82809808", "0.96597599"),
        ("fixed cases", 1): ("0.01615303", "0.89598936", "0.98568536"),
    }
    for (variant, arm), expected in single.items():
        mean = estimate(of_arm(cells, arm, range(5)), variant=variant)
        assert (f"{mean.error:.8f}", f"{mean.low:.8f}", f"{mean.high:.8f}") == expected
    fifth = estimate(of_change(cells, 0, 1, [4]), variant="fixed readers")
    assert (f"{fifth.value:.5f}", f"{fifth.low:.5f}", f"{fifth.high:.5f}", f"{fifth.p:.4f}") == (
        "-0.10016",
        "-0.18651",
        "-0.01381",
        "0.0230",
    )


def test_covariances_are_delong_s(ratings: np.ndarray, truth: np.ndarray):
    found = delong(truth.astype(int), ratings.reshape(10, 114))
    cells = areas(ratings, truth)
    np.testing.assert_allclose(cells.values.ravel(), found.areas)
    np.testing.assert_allclose(cells.covariance(), found.covariance, atol=1e-15)


def test_the_contrast_of_two_arms_is_the_omnibus_test(ratings: np.ndarray, truth: np.ndarray):
    cells = areas(ratings, truth)
    found = components(cells)
    for variant in ("random", "fixed readers", "fixed cases"):
        change, test = estimate(of_change(cells, 1, 0, range(5)), variant=variant), omnibus(found, 2, 5, variant)
        assert (change.value / change.error) ** 2 == pytest.approx(test.statistic)
        assert change.p == pytest.approx(test.p)


def test_equal_arms_give_no_difference_and_no_interval(ratings: np.ndarray, truth: np.ndarray):
    change = estimate(of_change(areas(ratings[[0, 0]], truth), 1, 0, range(5)))
    assert change.value == 0.0
    assert change.low is None
    assert "no interval" in change.reason


def test_what_is_not_read_is_left_out(ratings: np.ndarray, truth: np.ndarray):
    scores = ratings.copy()
    scores[1, 4] = np.nan
    scores[0, 0, :9] = np.nan
    cells = areas(scores, truth)
    assert np.isnan(cells.values[1, 4])
    assert components(cells) is None
    assert len(of_change(cells, 1, 0, range(5)).values) == 4
    alone = delong(truth[9:].astype(int), scores[0, :1, 9:])
    assert cells.values[0, 0] == pytest.approx(alone.areas[0])
    assert cells.influence[0, 0] @ cells.influence[0, 0] == pytest.approx(alone.covariance[0, 0])


def test_arms_that_share_no_case_are_independent(generator: np.random.Generator):
    scores, truth = generator.normal(size=(2, 1, 80)), np.tile([False, True], 40)
    scores[0, :, :40], scores[1, :, 40:] = np.nan, np.nan
    covariance = areas(scores, truth).covariance()
    assert covariance[0, 1] == 0.0
    assert (np.diag(covariance) > 0).all()


def test_two_groups_of_readers(ratings: np.ndarray, truth: np.ndarray):
    cells = areas(ratings, truth)
    first, second = of_arm(cells, 0, [0, 1]), of_arm(cells, 0, [2, 3, 4])
    gap = estimate(first, second)
    assert gap.value == pytest.approx(cells.values[0, :2].mean() - cells.values[0, 2:].mean())
    assert gap.error > estimate(first, second, variant="fixed readers").error
    # with ever more readers who agree, only cases are left: the same reader many times
    many = Group(values=np.tile(cells.values[0, :1], 50), influence=np.tile(cells.influence[0, :1], (50, 1)))
    model = Group(values=cells.values[0, 3:4], influence=cells.influence[0, 3:4], fixed=True)
    paired = delong(truth.astype(int), ratings[0, [0, 3]])
    assert estimate(many, model).error == pytest.approx(paired.difference(0, 1)[1])
    assert estimate(many, model).p == pytest.approx(paired.difference(0, 1)[2])


def test_one_reader_says_nothing_of_others(ratings: np.ndarray, truth: np.ndarray):
    cells = areas(ratings, truth)
    assert "one reader" in estimate(of_arm(cells, 0, [2])).reason
    assert estimate(of_arm(cells, 0, [2]), variant="fixed readers").low is not None
    assert estimate(of_arm(cells, 0, [])).reason == "nobody read"


def test_means_over_cases(generator: np.random.Generator):
    numbers = generator.normal(size=(1, 2, 50))
    cells = means(numbers)
    np.testing.assert_allclose(cells.values, numbers.mean(2))
    np.testing.assert_allclose(cells.covariance(), np.cov(numbers[0]) / 50)
    assert np.isnan(means(np.full((1, 1, 5), np.nan)).values).all()


def test_the_jackknife_of_a_mean_is_its_variance(generator: np.random.Generator):
    numbers = generator.normal(size=30)
    cells = jackknifed([[lambda weights: weights @ numbers / weights.sum(1), None]], 30)
    assert cells.influence[0, 0] @ cells.influence[0, 0] == pytest.approx(numbers.var(ddof=1) / 30)
    assert np.isnan(cells.values[0, 1])


def test_three_arms(generator: np.random.Generator):
    truth = np.tile([False, True], 30)
    scores = truth + generator.normal(size=(3, 4, 60))
    cells: Cells = areas(scores, truth)
    test = omnibus(components(cells), 3, 4, "random")
    assert test.df1 == 2
    assert 0 < test.p < 1


def test_a_reader_without_cases_of_one_class_is_refused():
    with pytest.raises(InputDatasetError, match="reader 2 of arm 1"):
        areas(np.array([[[1.0, 2, 3, 4], [1.0, 2, np.nan, np.nan]]]), np.array([False, False, True, True]))
