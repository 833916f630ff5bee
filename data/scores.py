"""Pure functions from texts and numbers to numbers: ROUGE-L, AUC, tests of significance. numpy alone."""
import itertools
import math
import re

import numpy as np


# ---- texts --------------------------------------------------------------------------------------------

def rouge_l(said, truth):
    """(precision, recall, F1) of ROUGE-L: the longest common subsequence of the two texts' lower-case
    [a-z0-9]+ words, over the number of words said, of true words, and their harmonic mean. No stemming."""
    said = re.findall("[a-z0-9]+", said.lower())
    truth = re.findall("[a-z0-9]+", truth.lower())
    longest = [0] * (len(truth) + 1)             # longest[j]: with the first j true words
    for word in said:
        diagonal = 0                             # longest[j - 1] before this word
        for j, other in enumerate(truth, 1):
            above = longest[j]
            longest[j] = diagonal + 1 if word == other else max(above, longest[j - 1])
            diagonal = above
    if not longest[-1]:
        return 0.0, 0.0, 0.0
    precision = longest[-1] / len(said)
    recall = longest[-1] / len(truth)
    return precision, recall, 2 * precision * recall / (precision + recall)


def mean_of(records, key):
    """Mean of records[i][key]."""
    return math.fsum(r[key] for r in records) / len(records)


def harmonic_mean(values):
    """n / sum(1/v); 0 if any value is 0."""
    return len(values) / math.fsum(1 / v for v in values) if all(values) else 0.0


# ---- two samples --------------------------------------------------------------------------------------

def auc(a, b):
    """Probability that a value of a is above one of b; a tie counts half. The area under the ROC curve."""
    b = np.sort(b)
    below = np.searchsorted(b, a, "left")
    not_above = np.searchsorted(b, a, "right")
    return float((below + not_above).mean() / (2 * len(b)))


def ks_test(a, b):
    """(D, p) of the two-sample Kolmogorov-Smirnov test: the largest distance of the two empirical
    distributions, and the exact probability that two samples of one, without ties, are as far apart.

    All orders of the n + m values are equally likely: walks from (0, 0) to (n, m). p is what leaves the band
    |i/n - j/m| < D on the way, summed as it leaves, so that a p of 1e-20 is right as well.
    """
    n = len(a)
    m = len(b)
    both = np.concatenate([a, b])
    a_below = np.searchsorted(np.sort(a), both, "right")
    b_below = np.searchsorted(np.sort(b), both, "right")
    d = np.abs(a_below * m - b_below * n).max()                  # in units of 1/nm: exact
    i = np.arange(n + 1)
    mass = np.where(i == 0, 1.0, 0.0)            # (n+1,) probability of being at i and still inside
    p = 0.0
    for step in range(1, n + m + 1):
        left = n + m - step + 1
        from_a = np.concatenate([[0.0], mass[:-1] * (n - i[:-1]) / left])
        from_b = mass * np.clip(m - (step - 1 - i), 0, None) / left
        mass = from_b + from_a
        out = np.abs(i * m - (step - i) * n) >= d
        p += mass[out].sum()
        mass = np.where(out, 0.0, mass)
    return float(d / (n * m)), float(min(p, 1.0))


# ---- over seeds ---------------------------------------------------------------------------------------

def mean_se(values):
    """(mean, standard error of the mean); the error is None for a single value."""
    v = np.asarray(values, dtype=float)
    mean = float(v.mean())
    return mean, float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None


def student_p(t, k):
    """Two-sided p of Student's t with k degrees of freedom.

    With t = sqrt(k) tan(a) the density goes as cos(a)^(k-1): p is a ratio of two integrals.
    """
    def area(start):
        angles = np.linspace(start, math.pi / 2, 20001)
        return np.trapezoid(np.cos(angles) ** (k - 1), dx=math.pi / 2 - start)
    return float(area(math.atan(abs(t) / math.sqrt(k))) / area(0.0))


def t_test(differences):
    """(t, two-sided p) that the mean of n >= 2 paired differences is 0 (Student); None without any spread,
    which what rounding leaves is not."""
    mean, se = mean_se(differences)
    if se <= 1e-12 * abs(mean):
        return None, None
    return mean / se, student_p(mean / se, len(differences) - 1)


def holm(ps):
    """p-values corrected for their number by Holm's step-down rule, in the order given; None stays None."""
    tested = [i for i, p in enumerate(ps) if p is not None]
    tested.sort(key=ps.__getitem__)
    out = [None] * len(ps)
    largest = 0.0
    for rank, i in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * ps[i]))
        out[i] = largest
    return out


def ranks(values):
    """Rank of each value counted from 1; ties get their mean rank."""
    values = np.asarray(values)
    return np.array([((values < v).sum() + (values <= v).sum() + 1) / 2 for v in values])


def spearman(x, y):
    """(rank correlation, two-sided p) of n >= 3 pairs. None where one is constant.

    p counts all n! orders up to n = 8 and takes t = rho sqrt((n-2) / (1-rho^2)) as Student's t beyond.
    """
    a = ranks(x)
    b = ranks(y)
    a = a - a.mean()
    b = b - b.mean()
    size = math.sqrt((a @ a) * (b @ b))
    if not size:
        return None, None
    n = len(a)
    rho = float(a @ b) / size
    if n <= 8:
        orders = np.array(list(itertools.permutations(b))) @ a / size                # (n!,)
        return rho, float((abs(orders) >= abs(rho) - 1e-9).mean())
    return rho, student_p(rho * math.sqrt((n - 2) / max(1 - rho * rho, 1e-300)), n - 2)
