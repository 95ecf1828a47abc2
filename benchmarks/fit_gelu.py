"""Fit the polynomial of the fast GELU: gelu(x) = x / (1 + 2^(-x Q(|x|))), Q of degree DEGREE on [0, LIMIT], for Epilogue GELU.

With Phi the normal distribution function, gelu(x) = x Phi(x) and Phi(x) = 1 / (1 + exp(-x L(x))), L(x) = log(Phi(x) / Phi(-x)) / x, an even and
smooth function. Unlike 0.5 x (1 + erf(x / sqrt 2)) this form does not cancel for negative x. The largest error of the exponent, x (Q - L log2 e), is
made as small as possible by Lawson's iteratively reweighted least squares. `python -m benchmarks.fit_gelu` prints the coefficients, lowest first.
"""

from __future__ import annotations

import math

import numpy as np

DEGREE, LIMIT = 6, 5.5


def exponent(x: np.ndarray) -> np.ndarray:
    """L(x) log2(e) for x > 0, in float64."""
    ratio = [math.log(math.erfc(-v / math.sqrt(2)) / math.erfc(v / math.sqrt(2))) / v for v in x]
    return np.array(ratio) * math.log2(math.e)


def fit(degree: int = DEGREE, limit: float = LIMIT, rounds: int = 400) -> tuple[np.ndarray, float]:
    """Coefficients, lowest degree first, and the largest error of the exponent (in powers of two)."""
    nodes = np.cos(np.pi * (np.arange(3000) + 0.5) / 3000)
    x = np.maximum(limit * (0.5 - 0.5 * nodes), 1e-6)
    target = exponent(x) * x
    basis = np.polynomial.chebyshev.chebvander(2 * x / limit - 1, degree) * x[:, None]
    weight, best = np.ones_like(x), (np.zeros(degree + 1), math.inf)
    for _ in range(rounds):
        root = np.sqrt(weight)
        solution = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        error = np.abs(basis @ solution - target)
        if error.max() < best[1]:
            best = (solution, float(error.max()))
        weight *= error / error.max() + 1e-9
        weight /= weight.max()
    series = np.polynomial.chebyshev.Chebyshev(best[0], domain=[0, limit])
    return series.convert(kind=np.polynomial.Polynomial).coef, best[1]


def fast_gelu(x: np.ndarray, coefficients: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """The form that the epilogue computes, in `dtype` arithmetic."""
    x = x.astype(dtype)
    a = np.minimum(np.abs(x), dtype(LIMIT))
    q = np.full_like(x, dtype(coefficients[-1]))
    for c in coefficients[-2::-1]:
        q = q * a + dtype(c)
    with np.errstate(over="ignore"):
        return x / (1 + np.exp2(-x * q))


def main() -> None:
    """Print the fit and its error against float64 over every bfloat16 value in [-20, 20]."""
    coefficients, error = fit()
    bits = np.arange(2**16, dtype=np.uint32) << 16
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) <= 20) & (x != 0)]
    want = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(float)])
    got = fast_gelu(x, coefficients).astype(float)
    body = np.abs(want) > 1e-6
    print("coefficients", [float(c) for c in coefficients])
    relative = np.abs(got / want - 1)[body].max()
    print(f"exponent off by at most {error:.2e}; gelu by {np.abs(got - want).max():.2e}, relatively by {relative:.2e} where |gelu| > 1e-6")


if __name__ == "__main__":
    main()
