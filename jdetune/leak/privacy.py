r"""What DP-SGD guarantees: epsilon of so many noisy steps.

Neighbours differ by one picture that is added or left out. A step adds noise of standard deviation
:math:`\sigma C` to a sum of gradients of norm at most C, each of which is in it with probability q.

With q = 1 all steps together are one Gaussian mechanism of :math:`\mu = \sqrt{T}/\sigma`, for which
epsilon is known exactly (Balle and Wang 2018, arXiv 1805.06530, theorem 8). With q < 1 it is
bounded through Renyi divergences (Mironov, Talwar and Zhang 2019, arXiv 1908.10530, section 3.3;
conversion of Canonne, Kamath and Steinke 2020, arXiv 2004.00010, proposition 12).
"""

import math

#: Integer orders of the divergences that are tried.
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512)


def gaussian_delta(epsilon: float, mu: float) -> float:
    r"""Least delta of a Gaussian mechanism.

    :math:`\delta = \Phi(\mu/2 - \epsilon/\mu) - e^\epsilon \Phi(-\mu/2 - \epsilon/\mu)`

    Args:
      epsilon: 0 or more.
      mu: sensitivity over standard deviation.

    Example:
      >>> round(gaussian_delta(1.0, 1.0), 4)
      0.1269
    """
    second = _log_tail(mu / 2 + epsilon / mu) + epsilon
    return math.exp(_log_tail(epsilon / mu - mu / 2)) - math.exp(min(second, 700.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Least epsilon of a Gaussian mechanism at this delta.

    Args:
      mu: sensitivity over standard deviation.
      delta: between 0 and 1.

    Example:
      >>> round(gaussian_epsilon(1.0, 1e-5), 3)
      4.377
    """
    if mu <= 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, mu) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return high


def renyi(order: int, noise: float, share: float) -> float:
    r"""Renyi divergence of one step.

    :math:`\frac{1}{a-1}\log\sum_k \binom{a}{k}(1-q)^{a-k}q^k e^{(k^2-k)/2\sigma^2}`

    Args:
      order: a, an integer from 2.
      noise: sigma.
      share: q, the probability that a picture is in the batch.
    """
    if share == 1.0:
        return order / (2 * noise**2)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-share)
        + (k * math.log(share) if k else 0.0)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    most = max(terms)
    return (most + math.log(sum(math.exp(term - most) for term in terms))) / (order - 1)


def renyi_epsilon(steps: int, noise: float, share: float, delta: float) -> float:
    """Epsilon through Renyi divergences; an upper bound for any share.

    Args:
      steps: how many.
      noise: sigma.
      share: q.
      delta: between 0 and 1.
    """
    found = (
        steps * renyi(a, noise, share)
        + math.log1p(-1 / a)
        - (math.log(delta) + math.log(a)) / (a - 1)
        for a in ORDERS
    )
    return max(0.0, min(found))


def epsilon(
    steps: int, noise: float, delta: float = 1e-5, share: float = 1.0, group: int = 1
) -> float:
    """Epsilon of DP-SGD: exact where every picture is in every step, else an upper bound.

    Args:
      steps: how many.
      noise: noise multiplier sigma, over the clipping norm.
      delta: between 0 and 1.
      share: probability that a picture is in a batch; 1 for full batches.
      group: pictures that are added or left out together, such as all of one person; with full
        batches only.

    Returns:
      Infinity without noise.

    Raises:
      ValueError: numbers out of range, or a group with batches that are not full.
    """
    if steps < 1 or noise < 0 or not 0 < delta < 1 or not 0 < share <= 1 or group < 1:
        raise ValueError(
            f"steps from 1, noise from 0, delta in (0, 1), share in (0, 1], group from 1; got "
            f"{steps}, {noise}, {delta}, {share}, {group}"
        )
    if noise == 0:
        return math.inf
    if share == 1.0:
        return gaussian_epsilon(group * math.sqrt(steps) / noise, delta)
    if group > 1:
        raise ValueError("the guarantee for groups is known for full batches only")
    return renyi_epsilon(steps, noise, share, delta)


def noise_for(target: float, steps: int, delta: float = 1e-5, group: int = 1) -> float:
    """Least noise multiplier with this epsilon, full batches.

    Args:
      target: epsilon, above 0.
      steps: how many.
      delta: between 0 and 1.
      group: pictures that count together.

    Example:
      >>> round(epsilon(60, noise_for(10.0, 60)), 3)
      10.0
    """
    low, high = 1e-6, 1.0
    while epsilon(steps, high, delta, group=group) > target:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        too_loud = epsilon(steps, middle, delta, group=group) <= target
        low, high = (low, middle) if too_loud else (middle, high)
    return high


def _log_tail(x: float) -> float:
    """Log of the normal upper tail, also where it underflows."""
    if x < 25:
        return math.log(0.5 * math.erfc(x / math.sqrt(2)))
    inverse = 1 / (x * x)
    series = 1 - inverse + 3 * inverse**2 - 15 * inverse**3
    return -x * x / 2 - math.log(x * math.sqrt(2 * math.pi)) + math.log(series)
