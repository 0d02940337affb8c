"""The estimators: scikit-learn's contract, the training loop against a plain one, tensors and back, every refusal."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.special import erf
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from neureasoner.errors import UserError
from neureasoner.probes.detectors.estimators import KINDS, BoostingProbe, LogisticProbe, MLPProbe, make_estimator

SMALL = {
    "mlp": {"hidden": 16, "epochs": 8},
    "logistic": {"C": 0.3},
    "boosting": {"max_iter": 10, "min_samples_leaf": 5},
}


def data(n=300, d=6, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, d)) * np.arange(1, d + 1) + 10).astype(np.float32)
    y = (x[:, 2] - 10 + rng.normal(size=n) > 2.5).astype(int)
    return x, y


def small(kind, **more):
    return make_estimator(kind, **(SMALL[kind] | more))


@parametrize_with_checks([MLPProbe(hidden=16, epochs=20), LogisticProbe(), BoostingProbe(max_iter=10)])
def test_contract_of_scikit_learn(estimator, check):
    check(estimator)


def standardised(x, train):
    train = np.asarray(train, dtype=np.float64)
    sd = train.std(axis=0)
    return np.clip((np.asarray(x, dtype=np.float64) - train.mean(axis=0)) / np.where(sd > 1e-8, sd, 1), -8, 8)


def plain_training(x, y, xv, yv, hidden, dropout, lr, weight_decay, batch, epochs, patience, seed):
    """The recipe of core.md §1.7.1 written out: the network of the best epoch, and (loss, AUROC) of every epoch."""
    inputs = torch.tensor(standardised(x, x), dtype=torch.float32)
    held = torch.tensor(standardised(xv, x), dtype=torch.float32)
    targets, held_targets = torch.tensor(y, dtype=torch.float32), torch.tensor(yv, dtype=torch.float32)
    weight = torch.tensor((y == 0).sum() / (y == 1).sum(), dtype=torch.float32)
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(x.shape[1], hidden), torch.nn.GELU(), torch.nn.Dropout(dropout)]
    layers += [torch.nn.Linear(hidden, hidden), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(hidden, 1)]
    net = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    history, kept, best, since = [], None, (-1.0, 0.0), 0
    for _ in range(epochs):
        net.train()
        order = torch.randperm(len(y))
        for begin in range(0, len(y), batch):
            rows = order[begin : begin + batch]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                net(inputs[rows]).squeeze(1), targets[rows], pos_weight=weight
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            logits = net(held).squeeze(1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, held_targets, pos_weight=weight)
        area = roc_auc_score(yv, logits.numpy())
        history.append((loss.item(), area))
        if (round(area, 3), -loss.item()) > best:
            best, kept, since = (round(area, 3), -loss.item()), deepcopy(net), 0
        else:
            since += 1
            if since == patience:
                break
    return kept.double(), history


def test_mlp_trains_as_a_plain_loop_does_and_returns_its_best_epoch():
    (x, y), (xv, yv), (xt, _) = data(), data(80, seed=1), data(40, seed=2)
    settings = {"hidden": 24, "dropout": 0.2, "lr": 5e-3, "weight_decay": 0.1, "epochs": 30, "patience": 3, "seed": 5}
    net, history = plain_training(x, y, xv, yv, batch=300 // 16, **settings)
    got = make_estimator("mlp", batch_size=256, **settings).fit(x, y, validation=(xv, yv))
    assert 3 < len(history) < 30  # it stopped early, and not on the last epoch
    np.testing.assert_allclose([h["loss"] for h in got.history_], [h[0] for h in history], atol=1e-6)
    np.testing.assert_allclose([h["auroc"] for h in got.history_], [h[1] for h in history], atol=1e-6)
    with torch.no_grad():
        want = net(torch.tensor(standardised(xt, x)))[:, 0].numpy()
    np.testing.assert_allclose(got.decision_function(xt), want, rtol=1e-9, atol=1e-9)


def test_batch_size_is_the_cap_of_few_samples():
    (x, y), settings = data(), {"hidden": 8, "epochs": 2, "seed": 1}
    wide, narrow, other = (make_estimator("mlp", batch_size=b, **settings).fit(x, y) for b in (256, 18, 12))
    np.testing.assert_array_equal(wide.decision_function(x), narrow.decision_function(x))  # 300 // 16 = 18
    assert (wide.decision_function(x) != other.decision_function(x)).any()


def test_mlp_scores_in_double_precision_with_exact_gelu():
    x, y = data()
    mlp = small("mlp").fit(x, y)
    w = {k: v.numpy() for k, v in mlp.to_tensors().items()}
    h = standardised(x, x)
    for i in (0, 3, 6):
        h = h @ w[f"mlp.{i}.weight"].T + w[f"mlp.{i}.bias"]
        h = h if i == 6 else h * (1 + erf(h / np.sqrt(2))) / 2
    np.testing.assert_allclose(mlp.decision_function(x), h[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_logistic_is_scikit_learn_on_standardised_features(c):
    (x, y), (xt, _) = data(), data(40, seed=2)
    xt[0] = 1e6  # clipped at 8 standard deviations
    newton = LogisticRegression(C=c, class_weight="balanced", solver="newton-cholesky", tol=1e-10)
    want = newton.fit(standardised(x, x), y).decision_function(standardised(xt, x))
    got = make_estimator("logistic", C=c).fit(x, y)
    np.testing.assert_allclose(got.decision_function(xt), want, rtol=1e-3, atol=1e-3)
    assert got.coef_.shape == (6,) and np.abs(got.coef_).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_learns_repeats_and_answers_in_the_users_labels(kind):
    (x, y), (xt, yt) = data(), data(400, seed=2)
    words = np.where(y == 1, "wrong", "fine")
    state = torch.random.get_rng_state()
    a, b = small(kind).fit(x, words, (x, words)), small(kind).fit(x, words)
    assert torch.equal(state, torch.random.get_rng_state())
    assert a.classes_.tolist() == ["fine", "wrong"] and a.n_features_in_ == 6
    logits, p = a.decision_function(xt), a.predict_proba(xt)
    assert logits.shape == (400,) and logits.dtype == np.float64 and p.shape == (400, 2)
    np.testing.assert_allclose(p[:, 1], 1 / (1 + np.exp(-logits)))
    np.testing.assert_array_equal(p.sum(axis=1), 1)
    np.testing.assert_array_equal(a.predict(xt), np.where(p[:, 1] > 0.5, "wrong", "fine"))
    assert roc_auc_score(yt, logits) > 0.9
    np.testing.assert_array_equal(logits, b.decision_function(xt))
    np.testing.assert_array_equal(logits, clone(a).fit(x, words).decision_function(xt))


@pytest.mark.parametrize("kind", KINDS)
def test_classes_weigh_the_same(kind):
    rng = np.random.default_rng(0)
    y = (np.arange(600) % 10 == 0).astype(int)
    x = rng.normal(size=(600, 2)) + y[:, None]  # unweighted, one positive in ten would hardly ever be predicted
    assert small(kind).fit(x, y).predict(x[y == 1]).astype(bool).mean() > 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_constant_and_huge_columns_and_every_memory_layout(kind):
    (x, y), (xt, _) = data(), data(40, seed=2)
    plain = small(kind).fit(x, y)
    more = np.concatenate([x, np.full((300, 1), 7.0), np.zeros((300, 1))], axis=1)
    fitted = small(kind).fit(more, y)
    assert fitted.scale_[-2:].tolist() == [1, 1] and np.isfinite(fitted.decision_function(more)).all()
    for variant in (np.asfortranarray(xt), xt.astype(np.float64), xt.tolist(), np.repeat(xt, 2, axis=0)[::2]):
        np.testing.assert_array_equal(plain.decision_function(variant), plain.decision_function(xt))
    far = xt.copy()
    far[:, 0], xt[:, 0] = 1e30, plain.mean_[0] + 9 * plain.scale_[0]
    np.testing.assert_array_equal(plain.decision_function(far), plain.decision_function(xt))


@pytest.mark.parametrize("kind", KINDS)
def test_works_in_cross_validation(kind):
    assert cross_val_score(small(kind), *data(), scoring="roc_auc", cv=3).mean() > 0.85


@pytest.mark.parametrize("kind", ["mlp", "logistic"])
def test_tensors_and_back_bit_for_bit(kind):
    (x, y), (xt, _) = data(), data(40, seed=2)
    fitted = small(kind).fit(x, y)
    tensors = fitted.to_tensors()
    assert {"scaler.mean", "scaler.scale"} < set(tensors)
    assert all(k.startswith((f"{kind}.", "scaler.")) and v.dtype == torch.float64 for k, v in tensors.items())
    again = small(kind).from_tensors(tensors)
    np.testing.assert_array_equal(again.decision_function(xt), fitted.decision_function(xt))
    assert again.n_features_in_ == 6 and again.predict(xt).tolist() == fitted.predict(xt).tolist()
    for broken in (
        {k: v for k, v in tensors.items() if k != "scaler.mean"},
        {k: v[:3] if k == "scaler.mean" else v for k, v in tensors.items()},
        {k: v for k, v in tensors.items() if not k.endswith(("coef", "mlp.0.weight"))},
    ):
        with pytest.raises(UserError, match=f"damaged tensors of kind '{kind}'"):
            small(kind).from_tensors(broken)


def test_saving_is_refused_by_name():
    x, y = data()
    boosting = small("boosting").fit(x, y)
    with pytest.raises(UserError, match="estimator 'boosting' is for comparison and cannot be saved; use mlp or log"):
        boosting.to_tensors()
    with pytest.raises(UserError, match="'boosting' is for comparison"):
        small("boosting").from_tensors(small("logistic").fit(x, y).to_tensors())
    with pytest.raises(UserError, match=r"labels 0 and 1 can be saved, these are \[3, 4\]"):
        small("logistic").fit(x, y + 3).to_tensors()


def test_unknown_kinds_and_settings_are_refused():
    with pytest.raises(UserError, match="estimator 'svm' is unknown; use one of mlp, logistic, boosting"):
        make_estimator("svm")
    with pytest.raises(UserError, match="estimator 'logistic' has no setting 'hidden'; it has C, max_iter"):
        make_estimator("logistic", hidden=3)
    assert make_estimator("mlp", seed=4, hidden=3).get_params()["seed"] == 4
    assert "seed" not in make_estimator("logistic", seed=4).get_params()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data_is_refused(kind):
    x, y = data()
    with pytest.raises(UserError, match="both classes, got one class only: 1"):
        small(kind).fit(x, np.ones(300, dtype=int))
    with pytest.raises(UserError, match="Only binary classification"):
        small(kind).fit(x, y + (np.arange(300) % 2) * 2)
    with pytest.raises(UserError, match=r"validation has labels \[0, 2\], training \[0, 1\]"):
        small(kind).fit(x, y, validation=(x, 2 * y))
    fitted = small(kind).fit(x, y)
    with pytest.raises(ValueError, match=r"X has 5 features, but .* is expecting 6"):
        fitted.decision_function(x[:, :5])
    for value in (np.nan, np.inf, 1e39):
        bad = x.astype(np.float64)
        bad[7, 4] = value
        for use in (fitted.decision_function, lambda b: small(kind).fit(b, y), lambda b: fitted.predict(b.tolist())):
            with pytest.raises(UserError, match=r"NaN or infinity in column 4 \(1 of 6 columns\)"):
                use(bad)
