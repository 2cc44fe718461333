"""Each sampler against a plain reference: all tokens sorted, float64, one sampler at a time, in the given order."""

import math

import numpy as np
import pytest
from golden.sampler_cases import STORED, N, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli.errors import UsageError
from llamacli.text.sampler import Sampler
from llamacli.text.settings import DEFAULT_ORDER, SETTINGS

CASES = cases()
OFF = {"temp": 1.0, "top_p": 1.0}
LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -3.0, -8.0], np.float32)


def softmax(logits):
    best = max(logits.values())
    weights = {id: math.exp(value - best) for id, value in logits.items()}
    total = sum(weights.values())
    return {id: weight / total for id, weight in weights.items()}


def ranked(values):
    """Ids, the largest value first, of equal ones the lowest id."""
    return sorted(values, key=lambda id: (-values[id], id))


class Plain:
    """The definitions, literally, over a dict of logits."""

    def __init__(self, history, **s):
        self.history, self.s = list(history), {name: rule[0] for name, rule in SETTINGS.items()} | s

    def penalties(self, logits):
        s, n = self.s, self.s["repeat_last_n"]
        recent = self.history if n < 0 else self.history[-n:] if n else []
        for id in set(recent) & logits.keys():
            value = logits[id] / s["repeat_penalty"] if logits[id] > 0 else logits[id] * s["repeat_penalty"]
            logits[id] = value - s["presence_penalty"] - s["frequency_penalty"] * recent.count(id)
        return logits

    def dry(self, logits):
        s, n = self.s, self.s["dry_penalty_last_n"]
        recent = self.history if n < 0 else self.history[-n:] if n else []
        longest = {}
        for end in range(len(recent) - 1):
            length = 0
            while length <= end and recent[end - length] == recent[-1 - length] != self.s["breaker"]:
                length += 1
            if length >= s["dry_allowed_length"]:
                longest[recent[end + 1]] = max(length, longest.get(recent[end + 1], 0))
        for id in longest.keys() & logits.keys():
            logits[id] -= s["dry_multiplier"] * s["dry_base"] ** (longest[id] - s["dry_allowed_length"])
        return logits

    def temperature(self, logits):
        temp, span = self.s["temp"], self.s["dynatemp_range"]
        if span and len(logits) > 1:
            entropy = -sum(p * math.log(p) for p in softmax(logits).values() if p) / math.log(len(logits))
            low = max(0.0, temp - span)
            temp = low + (temp + span - low) * entropy ** self.s["dynatemp_exponent"]
        return {id: value / temp for id, value in logits.items()}

    def top_n_sigma(self, logits):
        mean = sum(logits.values()) / len(logits)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in logits.values()) / len(logits))
        least = max(logits.values()) - self.s["top_n_sigma"] * deviation
        return {id: value for id, value in logits.items() if value >= least}

    def top_k(self, logits):
        return {id: logits[id] for id in ranked(logits)[: self.s["top_k"]]}

    def top_p(self, logits):
        return self._up_to(logits, ranked(logits), self.s["top_p"])

    def min_p(self, logits):
        p = softmax(logits)
        return {id: value for id, value in logits.items() if p[id] >= self.s["min_p"] * max(p.values())}

    def typ_p(self, logits):
        p = softmax(logits)
        entropy = -sum(value * math.log(value) for value in p.values() if value)
        return self._up_to(logits, sorted(p, key=lambda id: (abs(-math.log(p[id]) - entropy), id)), self.s["typical_p"])

    def xtc(self, logits):
        p = softmax(logits)
        top = [id for id in ranked(p) if p[id] >= self.s["xtc_threshold"]]
        return {id: value for id, value in logits.items() if id not in top[:-1]}

    @staticmethod
    def _up_to(logits, order, enough):
        p, total, kept = softmax(logits), 0.0, {}
        for id in order:
            kept[id], total = logits[id], total + p[id]
            if total >= enough:
                break
        return kept

    def run(self, logits, order):
        logits = {id: float(value) for id, value in enumerate(logits) if value > -math.inf}
        for name in order:
            logits = getattr(self, name)(logits)
        return logits


ON = {
    "penalties": {"repeat_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "repeat_last_n": 6},
    "dry": {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1},
    "temperature": {"temp": 0.7},
    "dynamic temperature": {"temp": 0.9, "dynatemp_range": 0.6, "dynatemp_exponent": 1.3},
    "top_n_sigma": {"top_n_sigma": 1.1},
    "top_k": {"top_k": 4},
    "typ_p": {"typical_p": 0.8},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.1},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.15},
}
HISTORY = [7, 1, 2, 3, 9, 1, 2, 4, 6, 0, 1, 2]
BREAKER = 6


def compared(logits, history, order, chosen):
    sampler = Sampler(**{**OFF, **chosen}, samplers=order, dry_breakers=[BREAKER], seed=1)
    found = sampler.candidates(np.asarray(logits, np.float32), history)
    chosen = {**chosen, "breaker": BREAKER}
    in_use = [name for name in order if any(key in chosen for key in ON[name])]
    expected = softmax(Plain(history, **{**OFF, **chosen}).run(logits, in_use))
    return dict(zip(found.ids.tolist(), found.probabilities().tolist(), strict=True)), expected


@pytest.mark.parametrize("name", ON)
def test_each_sampler_alone_is_its_definition(name):
    found, expected = compared(LOGITS, HISTORY, DEFAULT_ORDER, ON[name])
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert found != pytest.approx(softmax(dict(enumerate(LOGITS.tolist()))), rel=1e-3), "it has done nothing"


@pytest.mark.parametrize("p, spread", [(0.0, 1.0), (0.3, 0.1), (0.9, 0.01), (0.9, 3.0), (0.999, 0.5)])
def test_typical_among_many_tokens_is_its_definition(p, spread):
    logits = (np.random.default_rng(5).normal(size=5000) * spread).astype(np.float32)
    found = Sampler(**OFF, typical_p=p).candidates(logits)
    expected = Plain([], typical_p=p).typ_p({id: float(value) for id, value in enumerate(logits)})
    assert len(set(found.ids.tolist()) ^ set(expected)) <= 2  # at the border rounding may decide
    assert len(found.ids) >= 1


@settings(max_examples=100)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(sorted(set(ON) - {"dynamic temperature"})), unique=True, max_size=5),
    st.permutations(DEFAULT_ORDER),
    st.lists(st.integers(0, 11), max_size=40),
)
def test_any_chain_in_any_order_is_the_plain_chain(seed, names, order, history):
    """On 300 tokens with values so far apart that rounding has no effect."""
    random = np.random.default_rng(seed)
    logits = random.permutation(np.cumsum(random.uniform(0.02, 0.1, 300)) - 12).astype(np.float32)
    chosen = {key: value for name in names for key, value in ON[name].items()}
    found, expected = compared(logits, history, order, chosen)
    likely = {id: p for id, p in expected.items() if p > 1e-9}  # less likely tokens may have been dropped
    assert {id: found.get(id) for id in likely} == pytest.approx(likely, rel=1e-3)
    assert sum(p for id, p in found.items() if id not in likely) < 1e-6


@pytest.mark.parametrize("n", [2, 63, 64, 1000, 30_000])
@pytest.mark.parametrize("k", [1, 2, 40, 500])
def test_top_k_keeps_the_largest_and_of_equal_ones_the_first(n, k):
    random = np.random.default_rng(n + k)
    for logits in (random.normal(0, 3, n), random.integers(0, 5, n), np.zeros(n), np.linspace(0, 1, n)):
        logits = logits.astype(np.float32)
        logits[1::3] = -np.inf
        expected = np.sort(np.lexsort((np.arange(n), -logits))[:k])
        found = Sampler(**OFF | {"top_k": k}, samplers=("top_k",)).candidates(logits).ids
        assert np.array_equal(found, expected[np.isfinite(logits[expected])])


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("names", [{}, {"top_p"}, {"min_p"}, {"top_p", "min_p"}, {"top_k", "top_p"}, {"penalties", "top_p"}])
def test_the_usual_chains_draw_what_their_candidates_say(names, spread):
    chosen = {"top_p": {"top_p": 0.9}, "min_p": {"min_p": 0.05}, "top_k": {"top_k": 40}, "penalties": {"repeat_penalty": 1.3}}
    given = OFF | {key: value for name in names for key, value in chosen[name].items()}
    random = np.random.default_rng(3)
    for seed in range(20):
        logits = random.normal(0, spread, 5000).astype(np.float32)
        history = random.integers(0, 5000, 64).tolist()
        left = Sampler(**given | {"temp": 0.6}).candidates(logits, history)
        total = np.cumsum(left.weights(), dtype=np.float64)
        expected = left.ids[np.searchsorted(total, np.random.default_rng(seed).random() * total[-1], "right")]
        assert Sampler(**given | {"temp": 0.6}, seed=seed).pick(logits, history) == expected


@pytest.mark.parametrize("n", range(len(CASES)), ids=lambda n: "-".join(CASES[n].order) or f"mirostat {CASES[n].mirostat}")
def test_a_chain_leaves_what_llama_cpp_leaves(n):
    case, expected = CASES[n], np.load(STORED)["p"][n]
    if case.mirostat is not None:
        chosen = {**OFF, "mirostat": 2, "mirostat_tau": case.mirostat}
        drawn = {Sampler(**chosen, seed=seed).pick(case.logits) for seed in range(400)}
        assert set(np.flatnonzero(expected > 0.03)) <= drawn <= set(np.flatnonzero(expected))
        return
    candidates = Sampler(**{**OFF, **case.settings}, samplers=case.order, seed=1).candidates(case.logits, case.history)
    found = np.zeros(N)
    found[candidates.ids if candidates.ids is not None else slice(None)] = candidates.probabilities()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-6)


def test_the_order_decides():
    """0.5 of the weight of the two best is one token, 0.5 of all are two."""
    assert Sampler(**{**OFF, "top_p": 0.45, "top_k": 2}).candidates(LOGITS).ids.tolist() == [0]
    order = ("top_p", "top_k")
    assert Sampler(**{**OFF, "top_p": 0.45, "top_k": 2}, samplers=order).candidates(LOGITS).ids.tolist() == [0, 1]
    assert len(Sampler(**{**OFF, "top_p": 0.45, "top_k": 2}, samplers=()).candidates(LOGITS).ids) == len(LOGITS)


@pytest.mark.parametrize(
    "history, expected",
    [
        ([1, 2, 3, 1, 2], {3: 2}),
        ([1, 2, 3, 4, 1, 2, 3], {4: 3}),
        ([1, 2, 3, 1, 2, 4, 1, 2], {3: 2, 4: 2}),
        ([5, 1, 2, 3, 1, 2, 4, 5, 1, 2], {3: 3, 4: 2}),
        ([1, 1, 1, 1], {1: 3}),
        ([1, 6, 2, 3, 1, 6, 2], {}),  # 6 breaks: only one token since
        ([1, 2, 6, 3, 1, 2, 6], {}),
        ([2, 3], {}),
        ([], {}),
        ([1, 2] * 2000, {1: 3998}),
    ],
)
def test_dry_finds_what_would_carry_on_a_repetition(history, expected):
    logits = np.zeros(8, np.float32)
    found = Sampler(**OFF, dry_multiplier=1.0, dry_base=1.05, dry_breakers=[6]).candidates(logits, history)
    loss = {id: min(1.05 ** (length - 2), 1e30) for id, length in expected.items()}
    weights = np.exp([-loss.get(id, 0.0) for id in range(8)])
    p = np.zeros(8)
    p[found.ids] = found.probabilities()
    np.testing.assert_allclose(p, weights / weights.sum(), rtol=1e-4, atol=1e-9)


def test_windows_of_the_penalties():
    def best(**chosen):
        return Sampler(temp=0, **chosen).pick(np.array([1.0, 0.9, 0.0], np.float32), [0, *[2] * 70])

    assert best(repeat_penalty=2.0) == 0
    assert best(repeat_penalty=2.0, repeat_last_n=71) == best(repeat_penalty=2.0, repeat_last_n=-1) == 1
    assert best(repeat_penalty=2.0, repeat_last_n=0) == 0


@pytest.mark.parametrize("probability, share", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_xtc_excludes_the_top_as_often_as_asked(probability, share):
    sampler = Sampler(**OFF, top_k=2, seed=3, xtc_probability=probability)
    logits = np.array([10.0, 9.9, 0.0], np.float32)
    draws = [len(sampler.candidates(logits).ids) == 2 for _ in range(1000)]
    assert np.mean(draws) == pytest.approx(share, abs=0.05)


def test_mirostat_2_follows_its_definition():
    """Baktash et al., algorithm 2: cut by surprise, draw, move mu by eta times the error."""
    logits = np.linspace(0, -6, 50, dtype=np.float32)
    sampler = Sampler(**OFF, mirostat=2, mirostat_tau=2.0, mirostat_eta=0.5, seed=4)
    random, mu = np.random.default_rng(4), 4.0
    for _ in range(200):
        p = np.exp(logits.astype(np.float64))
        p /= p.sum()
        kept = [i for i in range(50) if -np.log2(p[i]) <= mu] or [0]
        p = p[kept] / p[kept].sum()
        at = int(np.searchsorted(np.cumsum(p), random.random()))
        mu -= 0.5 * (-np.log2(p[at]) - 2.0)
        assert sampler.pick(logits) == kept[at]


def test_mirostat_surprises_more_where_more_is_asked_for():
    logits = (np.random.default_rng(0).normal(size=5000) * 2).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    found = []
    for tau in (2.0, 4.0, 8.0):
        sampler = Sampler(**OFF, mirostat=2, mirostat_tau=tau, seed=1)
        found.append(np.mean(-np.log2(p[[sampler.pick(logits) for _ in range(1000)][500:]])))
    assert found[0] < found[1] < found[2]


def test_logit_biases_ban_and_favour():
    assert Sampler(temp=0, logit_bias={0: -math.inf, 1: -math.inf}).pick(LOGITS) == 2
    assert Sampler(temp=0, logit_bias={7: 20.0, 99: 1.0}).pick(LOGITS) == 7
    assert Sampler(temp=0, logit_bias={7: 20.0}, hidden_ids=np.array([7])).pick(LOGITS) == 0


def test_logprobs_are_the_model_s_own_whatever_is_sampled():
    sampler = Sampler(temp=0.1, top_k=1, repeat_penalty=2.0, logit_bias={5: 50.0}, logprobs=3)
    assert sampler.pick(LOGITS, [0, 1]) == 5
    p = softmax(dict(enumerate(LOGITS.tolist())))
    chosen, best = sampler.chosen
    assert chosen == pytest.approx(math.log(p[5]), rel=1e-5)
    assert [id for id, _ in best] == [0, 1, 2]
    assert [value for _, value in best] == pytest.approx([math.log(p[id]) for id in (0, 1, 2)], rel=1e-5)
    sampler = Sampler(temp=0, logprobs=0)
    sampler.pick(LOGITS)
    assert sampler.chosen == (pytest.approx(math.log(p[0]), rel=1e-5), [])


def test_a_constraint_masks_before_and_is_told_after():
    class Odd:
        def __init__(self):
            self.taken = []

        def mask(self, logits):
            logits[::2] = -np.inf

        def accept(self, id):
            self.taken.append(id)

    odd = Odd()
    sampler = Sampler(**OFF, seed=1, constraint=odd, repeat_penalty=1.5)
    picked = [sampler.pick(LOGITS, [0, 1]) for _ in range(200)]
    assert set(picked) <= {1, 3, 5, 7}
    assert odd.taken == picked


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_range(name):
    default, least, most = SETTINGS[name]
    assert Sampler(**{name: default}).settings[name] == default
    outside = [least - 1, math.nan, math.inf, "1", None, True] + ([] if most == math.inf else [most + 1, most * 2 + 1])
    for value in outside + ([1.5] if isinstance(default, int) else []):
        with pytest.raises(UsageError, match=name):
            Sampler(**{name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"mirostat": 1},
        {"logprobs": -1},
        {"samplers": ("top_k", "top_q")},
        {"samplers": ("top_k", "top_k")},
        {"logit_bias": {0: math.nan}},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {0: math.inf}},
        {"top_z": 1},
        {"seed": -1},
    ],
    ids=str,
)
def test_other_senseless_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        Sampler(**wrong)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ON)
@pytest.mark.parametrize(
    "logits", [[0.0], [1e30, -1e30, 0.0], [5.0] * 40, [3.0, -np.inf, -np.inf], [88.0, -88.0, 1e-30]], ids=str
)
def test_odd_logits_are_sampled_without_warnings(name, logits):
    logits = np.array(logits, np.float32)
    for extreme in ({}, {"temp": 1e-30}, {"temp": 1e30}, {"mirostat": 2}, {"repeat_penalty": 100.0, "presence_penalty": 100.0}):
        sampler = Sampler(**{**OFF, **ON[name], **extreme}, seed=2)
        assert logits[sampler.pick(logits, [0, 1, 0, 1, 0])] > -np.inf
