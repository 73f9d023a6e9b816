"""Reservoirs against NumPy loops from their papers, scikit-learn's Ridge, and scikit-learn's checks of estimators."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastrnn import reservoir
from fastrnn.reservoir import EchoStateNetwork, LegendreRegressor, LiquidStateMachine

ESTIMATORS = {
    "echo state": EchoStateNetwork(20, leak=0.5, bias_scaling=0.1, random_state=0),
    "liquid state": LiquidStateMachine(30, random_state=0),
    "Legendre": LegendreRegressor(4, 8.0),
}
each = pytest.mark.parametrize("name", ESTIMATORS)


def series(T=60, features=2, seed=0):
    """X, and y `[T, 2]` that depends on X of this step and the one before."""
    X = np.random.RandomState(seed).uniform(-1, 1, (T, features))
    before = np.vstack([np.zeros((1, features)), X[:-1]])
    return X, np.stack([X[:, 0] + before[:, -1], before[:, 0] ** 2], axis=1)


def make(name, **options):
    return ESTIMATORS[name].__class__(**ESTIMATORS[name].get_params()).set_params(**options)


def test_echo_states_are_the_paper_s():
    X, y = series()
    for activation, f in {
        "tanh": np.tanh,
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
        "relu": lambda v: v.clip(0),
    }.items():
        leak = np.linspace(0.1, 1, 20)
        esn = make("echo state", activation=activation, leak=leak).fit(X, y)
        h, states = np.zeros(20), []
        for x in X:
            drive = esn.input_weights_ @ x + esn.bias_ + esn.recurrent_weights_ @ h
            h = (1 - leak) * h + leak * f(drive)
            states.append(h)
        np.testing.assert_allclose(esn.features(X), states, rtol=1e-10, atol=1e-12)


def test_random_weights_are_as_asked_for():
    X, y = series(50, 3)
    for units in (100, 300):
        options = {"spectral_radius": 0.7, "connectivity": 0.2, "input_scaling": 0.3, "bias_scaling": 2.0}
        esn = EchoStateNetwork(units, **options, random_state=1).fit(X, y)
        radius = np.abs(np.linalg.eigvals(esn.recurrent_weights_)).max()
        np.testing.assert_allclose(radius, 0.7, rtol=1e-6)
        assert 0.17 < (esn.recurrent_weights_ != 0).mean() < 0.23
        assert 0.28 < np.abs(esn.input_weights_).max() <= 0.3
        assert 1.9 < np.abs(esn.bias_).max() <= 2
    assert (
        esn.recurrent_weights_ == EchoStateNetwork(units, **options, random_state=1).fit(X, y).recurrent_weights_
    ).all()


@each
def test_readout_is_ridge_regression(name):
    X, y = series()
    estimator = make(name, ridge=0.1, washout=7).fit(X, y)
    expected = Ridge(0.1).fit(estimator.features(X)[7:], y[7:])
    np.testing.assert_allclose(estimator.coef_, expected.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(estimator.intercept_, expected.intercept_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(estimator.predict(X), expected.predict(estimator.features(X)), rtol=1e-7, atol=1e-9)
    one = make(name, ridge=0.1, washout=7).fit(X, y[:, 0])
    np.testing.assert_allclose(one.coef_, estimator.coef_[0], rtol=1e-7, atol=1e-9)
    assert one.predict(X).shape == (len(X),)


@each
def test_chunks_and_parts_are_one_series(name, monkeypatch):
    X, y = series()
    whole = make(name, washout=5).fit(X, y)
    seen = []
    real = reservoir.functional.rnn
    monkeypatch.setattr(
        reservoir.functional, "rnn", lambda cell, x, *rest: (seen.append(len(x)), real(cell, x, *rest))[1]
    )
    monkeypatch.setattr(reservoir, "CHUNK", 8)
    found = make(name, washout=5).fit(X, y)
    assert max(seen) == 8  # as much is in memory, however long the series
    parts = make(name, washout=5).fit(X[:21], y[:21]).partial_fit(X[21:], y[21:], continued=True)
    for other in (found, parts):
        np.testing.assert_allclose(other.coef_, whole.coef_, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(other.predict(X), whole.predict(X), rtol=1e-6, atol=1e-8)
    rest = whole.predict(X[21:], make(name).fit(X[:21], y[:21]).state_)
    np.testing.assert_allclose(rest, whole.predict(X)[21:], rtol=1e-9, atol=1e-10)


@each
def test_several_series(name):
    (X, y), (others, targets) = series(), series(40, seed=1)
    estimator = make(name, ridge=0.1, washout=7).fit(X, y).partial_fit(others, targets)
    features = np.concatenate([estimator.features(X)[7:], estimator.features(others)[7:]])
    expected = Ridge(0.1).fit(features, np.concatenate([y[7:], targets[7:]]))
    np.testing.assert_allclose(estimator.coef_, expected.coef_, rtol=1e-7, atol=1e-9)


@each
def test_one_step_at_a_time(name):
    X, y = series()
    estimator = make(name).fit(X, y)
    step = estimator.stream()
    np.testing.assert_allclose([step(x) for x in X], estimator.predict(X), rtol=1e-8, atol=1e-9)
    step = estimator.stream(estimator.state_)
    np.testing.assert_allclose(step.y, estimator.predict(X)[-1], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose([step(x) for x in X], estimator.predict(X, estimator.state_), rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="x: expected 2 features, got 3"):
        step(np.zeros(3))


@each
def test_forecast_feeds_predictions_back(name):
    X, _ = series()
    estimator = make(name).fit(X[:-1], X[1:])
    found = estimator.forecast(4)
    known, expected = X[:-1], []
    for _ in range(4):
        expected.append(estimator.predict(known)[-1])
        known = np.vstack([known, expected[-1]])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    alone = make(name).fit(X[:-1, :1], X[1:, 0])
    assert alone.forecast(3).shape == (3,)
    with pytest.raises(ValueError, match="forecast: expected as many outputs as features, got 1 and 2"):
        make(name).fit(X, X[:, 0]).forecast(3)


def test_spikes_are_the_paper_s():
    """Leaky integrate-and-fire units, with rests; the readout's traces of them."""
    X, y = series(200)
    options = {"tau": 5.0, "trace": 8.0, "refractory": 3, "random_state": 2}
    lsm = LiquidStateMachine(40, **options).fit(X, y)
    v, s, rest, r, spikes, traces = np.zeros(40), np.zeros(40), np.zeros(40, int), np.zeros(40), [], []
    for x in X:
        v = v + (lsm.input_weights_ @ x + lsm.bias_ + lsm.recurrent_weights_ @ s - v) / 5
        v[rest > 0] = 0
        s = (v > 1).astype(float)
        rest = np.where(s > 0, 3, np.maximum(rest - 1, 0))
        v[s > 0] = 0
        r = r + (s - r) / 8
        spikes.append(s > 0)
        traces.append(r)
    assert 0.01 < np.mean(spikes) < 0.25
    np.testing.assert_array_equal(lsm.spikes(X), spikes)
    np.testing.assert_array_equal(lsm.spikes(X[50:], lsm.state_after(X[:50])), spikes[50:])
    np.testing.assert_allclose(lsm.features(X), traces, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="state: expected what this estimator has as state_"):
        lsm.spikes(X, LiquidStateMachine(1).fit(X, y).state_)
    sign = np.sign(lsm.recurrent_weights_)
    assert ((sign >= 0).all(0) | (sign <= 0).all(0)).all()  # a unit excites, or it inhibits
    assert 0 < (sign < 0).any(0).sum() < 20


def test_remembers_a_delayed_input():
    X = np.random.RandomState(0).uniform(-1, 1, (1000, 1))
    smooth = np.convolve(X[:, 0], np.ones(8) / 8, mode="same")[:, None]
    delayed = np.roll(smooth[:, 0], 10)
    scores = [
        estimator.set_params(washout=50).fit(smooth, delayed).score(smooth[50:], delayed[50:], None)
        for estimator in (EchoStateNetwork(100, random_state=0), LegendreRegressor(12, 20.0))
    ]
    assert min(scores) > 0.9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_the_input_is_that_of_the_states(dtype):
    X, y = series()
    esn = make("echo state").fit(X.astype(dtype), y)
    assert esn.features(X.astype(dtype)).dtype == dtype
    np.testing.assert_allclose(esn.predict(X.astype(dtype)), make("echo state").fit(X, y).predict(X), atol=1e-3)
    step = esn.stream()
    np.testing.assert_allclose([step(x) for x in X], esn.predict(X.astype(dtype)), atol=1e-4)
    assert step.y.dtype == np.float64  # as the readout's coefficients


def test_pickled_estimators_predict_the_same():
    X, y = series()
    for name in ESTIMATORS:
        estimator = make(name).fit(X, y)
        again = pickle.loads(pickle.dumps(estimator))
        assert (again.predict(X) == estimator.predict(X)).all()
        assert (again.forecast(3) == estimator.forecast(3)).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("echo state", {"units": 0}, "units: expected an integer of at least 1, got 0"),
        ("echo state", {"activation": "gelu"}, "activation: expected 'tanh', 'sigmoid' or 'relu', got 'gelu'"),
        ("echo state", {"leak": [0.1, 0.2]}, "leak: expected a number between 0 and 1, or 20 of them"),
        ("echo state", {"leak": 2.2}, "leak: expected a number between 0 and 1, or 20 of them, got 2.2"),
        ("echo state", {"spectral_radius": -1}, "spectral_radius: expected a number of at least 0, got -1"),
        ("echo state", {"connectivity": 1.5}, "connectivity: expected a number of at least 0 and at most 1, got 1.5"),
        ("echo state", {"washout": 60}, "washout: expected fewer steps than the series has, 60 samples, got 60"),
        ("liquid state", {"tau": 0.5}, "tau: expected a number of at least 1, got 0.5"),
        ("liquid state", {"refractory": 1.5}, "refractory: expected an integer of at least 0, got 1.5"),
        ("liquid state", {"ridge": float("nan")}, "ridge: expected a number of at least 0, got nan"),
        ("Legendre", {"theta": 0}, "theta: expected a positive number"),
        ("Legendre", {"order": "6"}, "order: expected an integer of at least 1, got '6'"),
    ],
)
def test_bad_parameters(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options).fit(*series())


def test_outputs_stay_as_many():
    X, y = series()
    with pytest.raises(ValueError, match=r"y: expected shape \(60, 2\), got \(60,\)"):
        make("echo state").fit(X, y).partial_fit(X, y[:, 0])


# A step's prediction depends on the steps before it, so samples cannot be permuted, predicted one by one or repeated.
ORDERED = {
    "check_methods_sample_order_invariance": "samples are steps of a series",
    "check_methods_subset_invariance": "samples are steps of a series",
}


@parametrize_with_checks(
    [EchoStateNetwork(10, random_state=0), LiquidStateMachine(10, random_state=0), LegendreRegressor()],
    expected_failed_checks=lambda _: ORDERED,
)
def test_scikit_learn_s_checks(estimator, check):
    check(estimator)


def test_nothing_is_kept_in_memory_of_torch_s_graph():
    X, y = series()
    esn = make("echo state").fit(X, y)
    assert not any(part.requires_grad for own in esn.state_ for part in own)
    assert torch.is_grad_enabled()


def test_says_what_it_needs():
    code = "import sys; sys.modules['sklearn'] = None; import fastrnn; import fastrnn.reservoir"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "fastrnn[reservoir]"' in process.stderr


def test_a_refit_that_fails_leaves_nothing_half_done():
    X, y = series()
    esn = make("echo state", washout=5).fit(X, y)
    with pytest.raises(ValueError, match="washout"):
        esn.partial_fit(X[:3], y[:3])
    esn.set_params(ridge=-1)
    with pytest.raises(ValueError, match="ridge"):
        esn.partial_fit(X, 2 * y)
    esn.set_params(ridge=1e-6).partial_fit(X, 2 * y)
    expected = make("echo state", washout=5).fit(X, y).partial_fit(X, 2 * y)
    assert (esn.coef_ == expected.coef_).all()
    with pytest.raises(ValueError, match="washout"):
        esn.fit(X[:3, :1], y[:3])
    with pytest.raises(NotFittedError):
        esn.predict(X[:, :1])


def test_parameters_that_are_set_later_wait_for_a_fit():
    X, y = series()
    esn = make("echo state").fit(X, y)
    before = esn.predict(X)
    esn.set_params(activation="relu", leak=0.1, units=7)
    assert (esn.predict(X) == before).all()


@each
def test_states_of_others_are_refused(name):
    X, y = series()
    estimator = make(name).fit(X, y)
    others = [make(other).fit(X[:, :1], y).state_ for other in ESTIMATORS if other != name or name == "Legendre"]
    for state in [*others, EchoStateNetwork(1).fit(X, y).state_, X, (), [(None, None)]]:
        for call in (estimator.stream, lambda state: estimator.predict(X, state)):
            with pytest.raises(ValueError, match="state: expected what this estimator has as state_"):
                call(state)


def test_network_without_cycles():
    X, y = series()
    with pytest.warns(UserWarning, match="have no cycle, and so no spectral radius"):
        esn = EchoStateNetwork(10, random_state=3).fit(X, y[:, 0])
    assert 0 < np.abs(esn.recurrent_weights_).max() <= 1
    for units in (100, 300):
        assert not EchoStateNetwork(units, connectivity=0).fit(X, y).recurrent_weights_.any()


def test_states_that_explode_are_an_error():
    X, y = series()
    with pytest.raises(ValueError, match="the states have become infinite"):
        EchoStateNetwork(20, activation="relu", spectral_radius=1e9, random_state=0).fit(X, y)


def test_large_means_do_not_swamp_what_varies():
    """The same features, off by 1e5, in float64: 1e-6 of the variance is left of the 1e-16 at first."""
    X, y = series(400)
    estimator = LegendreRegressor(2, 3.0, ridge=1e-3, washout=20).fit(X + 1e5, y)
    expected = Ridge(1e-3).fit(estimator.features(X + 1e5)[20:], y[20:])
    np.testing.assert_allclose(estimator.coef_, expected.coef_, rtol=1e-5, atol=1e-7)
