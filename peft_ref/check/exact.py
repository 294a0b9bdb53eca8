"""A number that knows its exact value, how far an honest computation may drift from it, and how many bits hold it.

NumPy object arrays call their elements' own methods, so the very same method files, fed with these numbers, give the exact answer, the
error bound and the bit budget. Every number carries

    value   n * 2^e, exact (after a root, a tangent or a division that does not come out: 200 correct bits)
    gauge   the value with every minus sign taken away: what the terms add up to in size
    depth   how many operations lie on the way to one term
    k       how many of them may have rounded, in a format of p significant bits: none, or all
    err     what the arguments of a root or a division were off by, as far as it reaches here; in units of u = 2^-p
    quantum the power of two that every term is a whole multiple of, or None once a result may have been rounded

Adding n numbers in any order and association errs by at most (n - 1) u times the sum of their sizes, and a factor may be multiplied
into every term or into the sum, so k counts all operations on the way once one of them may round: which ones do is the order's choice.
The bound holds for every evaluation order of the same sums and products:   |computed - value| <= u (k gauge + err) (1 + O(ku)).
Where quantum and gauge leave no more than p bits between them, no partial result of any order is rounded: k stays zero, and bits must
match. Nobody multiplies out a root or a divisor, so what comes out of one is a new term; the errors behind it add up in err. A formula
says the same of a number of its own with a plus sign, +x: it is computed as it stands. Without that a recurrence would multiply up its
steps' gauges, and a bound on its gradient would allow anything.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

PRECISION = 200
DECIMAL_DIGITS = 70  # some more than 200 bits
LARGEST_POWER = 100_000  # of e; what is beyond overflows, or is nothing
FURTHEST = 700.0  # the power of e is a float64 up to there
# A float constant of at most this many significant bits (1.5, 0.25) is itself in every format; any other was rounded once.
CONSTANT_BITS = 8
# No standard says how well a library computes a tangent, a sine or a cosine;
# good ones are off by 1 to 6 units in the last place, which is twice as many u.
TANH_DEPTH = 15
# The same of a power of e, whose libraries are better.
EXP_DEPTH = 9

Scalar: TypeAlias = "Exact | int | float | np.generic"


class Undecided(ArithmeticError):
    """The right answer hangs on a comparison that an honest computation may decide either way."""


class Exact:
    """A dyadic number with its error bound in a format of `p` significant bits; see the module."""

    __slots__ = ("depth", "e", "err", "gauge", "n", "p", "quantum")

    def __init__(self, n: int, e: int, gauge: float, depth: int, err: float, quantum: int | None, p: int) -> None:
        self.n, self.e, self.gauge, self.depth, self.err, self.quantum, self.p = n, e, gauge, depth, err, quantum, p

    @classmethod
    def of(cls, value: float, p: int) -> Exact:
        """A number that is given: exact, with nothing rounded yet."""
        top, bottom = float(value).as_integer_ratio()
        if top == 0:
            return cls(0, 0, 0.0, 0, 0.0, 0, p)
        lowest = (top & -top).bit_length() - 1
        n, e = top >> lowest, lowest + 1 - bottom.bit_length()
        return cls(n, e, _size(n, e), 0, 0.0, e, p)

    def _lift(self, other: Any) -> Exact | None:
        if isinstance(other, Exact):
            return other
        if not isinstance(other, bool | int | float | np.generic):
            return None
        constant = Exact.of(float(other), self.p)
        if abs(constant.n).bit_length() > CONSTANT_BITS:
            constant.depth, constant.quantum = 1, None
        return constant

    @property
    def k(self) -> int:
        return 0 if self.quantum is not None else self.depth

    @property
    def _relative(self) -> float:
        """How far a computed number may be off its value, as a share of it, in units of u."""
        return (self.k * self.gauge + self.err) / _size(self.n, self.e)

    @property
    def fraction(self) -> Fraction:
        return Fraction(self.n) * Fraction(2) ** self.e

    def __float__(self) -> float:
        return float(self.fraction)

    def __repr__(self) -> str:
        return f"Exact({float(self)!r}, gauge={self.gauge:.3g}, depth={self.depth}, k={self.k}, err={self.err:.3g})"

    def __neg__(self) -> Exact:
        return Exact(-self.n, self.e, self.gauge, self.depth, self.err, self.quantum, self.p)

    def __pos__(self) -> Exact:
        """A new term; NumPy calls it for `+array` of an object array. What has not been rounded is exact, and no larger than it is."""
        if self.quantum is not None:
            return Exact(self.n, self.e, _size(self.n, self.e), 0, self.err, self.quantum, self.p)
        size, share = _size(self.n, self.e), self.k * 2.0**-self.p
        err = self.k * self.gauge / (1 - share) + self.err if share < 1 else math.inf
        return Exact(self.n, self.e, size, 0, err, None, self.p)

    def __abs__(self) -> Exact:
        return -self if self.n < 0 else self

    def __add__(self, other: Scalar) -> Exact:
        b = self._lift(other)
        if b is None:
            return NotImplemented
        if b.gauge == 0.0:  # adding nothing rounds nothing
            return self
        if self.gauge == 0.0:
            return b
        e = min(self.e, b.e)
        n = (self.n << (self.e - e)) + (b.n << (b.e - e))
        quantum = None if self.quantum is None or b.quantum is None else min(self.quantum, b.quantum)
        return _result(n, e, self.gauge + b.gauge, max(self.depth, b.depth), self.err + b.err, quantum, self.p)

    __radd__ = __add__

    def __sub__(self, other: Scalar) -> Exact:
        b = self._lift(other)
        return NotImplemented if b is None else self + (-b)

    def __rsub__(self, other: Scalar) -> Exact:
        return (-self) + other

    def __mul__(self, other: Scalar) -> Exact:
        b = self._lift(other)
        if b is None:
            return NotImplemented
        if self.gauge == 0.0 or b.gauge == 0.0:
            return Exact.of(0.0, self.p)
        quantum = None if self.quantum is None or b.quantum is None else self.quantum + b.quantum
        err = self.gauge * b.err + b.gauge * self.err + self.err * b.err * 2.0**-self.p if self.err + b.err < math.inf else math.inf
        return _result(self.n * b.n, self.e + b.e, self.gauge * b.gauge, self.depth + b.depth, err, quantum, self.p)

    __rmul__ = __mul__

    def __truediv__(self, other: Scalar) -> Exact:
        b = self._lift(other)
        if b is None:
            return NotImplemented
        if b.n == 0:
            raise ZeroDivisionError("division by an exact zero")
        n, e, came_out = _divide(self.n, self.e, b.n, b.e)
        size, u = _size(b.n, b.e), 2.0**-self.p
        quantum = _lowest(n, e) if came_out and self.quantum is not None and b.quantum is not None else None
        if quantum is not None and self.quantum is not None and abs(b.n) & (abs(b.n) - 1) == 0:
            quantum = min(quantum, self.quantum - b.e - b.n.bit_length() + 1)  # by a power of two: only exponents move
        off = b._relative
        grown = self.gauge * off * (1 + self.k * u) + self.err
        err = grown / size / (1 - off * u) if off * u < 1 else math.inf
        return _result(n, e, self.gauge / size, self.depth + 1, err, quantum, self.p)  # one more: a reciprocal is rounded, then the product

    def __rtruediv__(self, other: Scalar) -> Exact:
        a = self._lift(other)
        return NotImplemented if a is None else a / self

    def sqrt(self) -> Exact:
        """The square root; NumPy calls it for `np.sqrt` of an object array."""
        if self.n < 0:
            raise ValueError(f"square root of {float(self)}")
        if self.n == 0:
            return self
        shift = (2 * PRECISION - self.n.bit_length()) // 2 * 2
        shift += (self.e - shift) % 2
        scaled = self.n << shift if shift >= 0 else self.n >> -shift
        root, e = math.isqrt(scaled), (self.e - shift) // 2
        came_out = shift >= 0 and root * root == scaled
        root, e = _short(root, e) if came_out else (root, e)
        quantum = _lowest(root, e) if came_out and self.quantum is not None else None
        size, off = _size(root, e), self._relative
        share = off * 2.0**-self.p
        err = size * off / (1 + math.sqrt(1 - share)) if share < 1 else math.inf
        return _result(root, e, size, 1, err, quantum, self.p)  # one more, as for a division

    def tanh(self) -> Exact:
        """The hyperbolic tangent; NumPy calls it for `np.tanh` of an object array."""
        if self.n < 0:
            return -(-self).tanh()
        off, u = self.k * self.gauge + self.err, 2.0**-self.p
        if self.n == 0:  # and what was computed instead may still be off by that much: a new term of no size would forget it
            return Exact(0, 0, self.gauge, self.depth + TANH_DEPTH, self.err, None, self.p) if off else Exact.of(0.0, self.p)
        n, e = _tanh(self.fraction)
        size = _size(n, e)
        steepest = min(1.0, 1.0 - size * size + off * u)  # of the slope as far as the argument may be off: |tanh''| < 1
        furthest = (1.0 + size) / u  # whatever the argument, the result is between -1 and 1
        return _result(n, e, size, TANH_DEPTH, min(off * steepest, furthest), None, self.p)

    def exp(self) -> Exact:
        """The power of e; NumPy calls it for `np.exp` of an object array. What its argument is off by becomes a share of it.

        Of a difference that comes to nothing it is not exact: e^a / e^a is one for those alone who subtract first.
        """
        off, u = self.k * self.gauge + self.err, 2.0**-self.p
        if self.gauge == 0.0 and not off:
            return Exact.of(1.0, self.p)
        n, e = _exp(self.fraction)
        share = math.expm1(off * u) / u if off * u < FURTHEST else math.inf
        size = _size(n, e)
        return _result(n, e, size, EXP_DEPTH, size * share if size else 0.0, None, self.p)

    def cos(self) -> Exact:
        """The cosine; NumPy calls it for `np.cos` of an object array."""
        return self._turned(1)

    def sin(self) -> Exact:
        """The sine; NumPy calls it for `np.sin` of an object array."""
        return self._turned(0)

    def _turned(self, first: int) -> Exact:
        off, u = self.k * self.gauge + self.err, 2.0**-self.p
        if self.n == 0 and not off:
            return Exact.of(float(first), self.p)
        n, e = _series(self.fraction, first)
        size = _size(n, e)
        return _result(n, e, size, TANH_DEPTH, min(off, (1.0 + size) / u), None, self.p)  # nowhere steeper than one, and within [-1, 1]

    def __ge__(self, other: Scalar) -> bool:
        return not self < other

    def __le__(self, other: Scalar) -> bool:
        return not self > other

    def __eq__(self, other: object) -> bool:
        b = self._lift(other)
        return b is not None and self.fraction == b.fraction

    def __lt__(self, other: Scalar) -> bool:
        return float(self - other) < 0

    def __gt__(self, other: Scalar) -> bool:
        """Raises `Undecided` where a plain number is nearer than an honest computation may be off: relu would be on either side."""
        away = self - other
        if not isinstance(other, Exact) and self.k + self.err > 0:
            reach = ((self.k + 2) * self.gauge + self.err) * 2.0**-self.p
            if abs(float(away)) <= reach:
                raise Undecided(f"{self!r} may be on either side of {other!r}")
        return float(away) > 0

    def __hash__(self) -> int:
        return hash(self.fraction)


def exact_array(array: np.ndarray[Any, Any], p: int) -> np.ndarray[Any, Any]:
    """An object array of `Exact` numbers with the values of `array`; integer arrays (indices, masks) stay as they are."""
    return array if array.dtype.kind in "iub" else as_exact(array.astype(object), p)


def as_exact(array: np.ndarray[Any, Any], p: int) -> np.ndarray[Any, Any]:
    """An object array of numbers that are given."""
    out = np.empty(array.shape, dtype=object)
    out.reshape(-1)[:] = [v if isinstance(v, Exact) else Exact.of(float(v), p) for v in array.reshape(-1)]
    return out


def answered(array: np.ndarray[Any, Any], p: int) -> np.ndarray[Any, Any]:
    """An answer with its plain numbers as `Exact` too: zeros that nothing was added to, and what came of a configuration alone.

    Such a number is a constant, rounded once unless it is short.
    """
    zero, out = Exact.of(0.0, p), np.empty(array.shape, dtype=object)
    out.reshape(-1)[:] = [v if isinstance(v, Exact) else zero._lift(float(v)) for v in array.reshape(-1)]
    return out


def _result(n: int, e: int, gauge: float, depth: int, err: float, quantum: int | None, p: int) -> Exact:
    """What one operation makes: it rounds nothing if its arguments are not rounded and the budget of bits holds."""
    fits = quantum is not None and math.frexp(gauge)[1] - quantum <= p
    return Exact(n, e, gauge, depth + 1, err, quantum if fits else None, p)


def _size(n: int, e: int) -> float:
    return math.ldexp(abs(n), e) if n.bit_length() < 900 else abs(float(Fraction(n) * Fraction(2) ** e))


def _lowest(n: int, e: int) -> int:
    """The exponent of the lowest set bit of n * 2^e."""
    return e + (n & -n).bit_length() - 1 if n else 0


def _short(n: int, e: int) -> tuple[int, int]:
    """The same number with an odd mantissa: one that came out would otherwise drag 200 bits along, and a root of it be cut."""
    zeros = (n & -n).bit_length() - 1 if n else 0
    return n >> zeros, e + zeros


def _tanh(x: Fraction) -> tuple[int, int]:
    """tanh(x) to 200 bits as mantissa and exponent: 1 - 2 / (exp(2x) + 1), by the standard library's decimal numbers."""
    with localcontext() as context:
        context.prec = DECIMAL_DIGITS
        doubled = 2 * Decimal(x.numerator) / Decimal(x.denominator)
        if abs(doubled) > 2 * DECIMAL_DIGITS:  # one, to all the digits there are
            return (1, 0) if doubled > 0 else (-1, 0)
        context.prec += max(0, -doubled.adjusted()) if doubled else 0  # what the subtraction cancels
        value = Fraction(1 - 2 / (doubled.exp() + 1))
    return _two_hundred_bits(value)


def _exp(x: Fraction) -> tuple[int, int]:
    """e^x to 200 bits as mantissa and exponent; below e^-10^5 it is zero in every format."""
    if x > LARGEST_POWER:
        raise OverflowError(f"e to the power of {float(x):.3g}")
    if x < -LARGEST_POWER:
        return 0, 0
    with localcontext() as context:
        context.prec = DECIMAL_DIGITS
        return _two_hundred_bits(Fraction((Decimal(x.numerator) / Decimal(x.denominator)).exp()))


def _two_hundred_bits(value: Fraction) -> tuple[int, int]:
    shift = PRECISION - _exponent(value)
    return round(value * Fraction(2) ** shift), -shift


def _series(x: Fraction, first: int) -> tuple[int, int]:
    """cos(x) (`first` 1) or sin(x) (0) to 200 bits as mantissa and exponent, by their power series in decimal numbers."""
    with localcontext() as context:
        context.prec = DECIMAL_DIGITS + int(abs(x)) + 10  # terms grow up to exp |x| before they fall
        angle = Decimal(x.numerator) / Decimal(x.denominator)
        term = Decimal(1) if first else angle
        total, k = term, 1 if first else 2
        while term and term.adjusted() > total.adjusted() - context.prec:
            term = -term * angle * angle / (k * (k + 1))
            total, k = total + term, k + 2
        value = Fraction(total)
    if value == 0:
        return 0, 0
    scaled = round(value * Fraction(2) ** (PRECISION - _exponent(value)))
    return scaled, _exponent(value) - PRECISION


def _exponent(value: Fraction) -> int:
    """The exponent of a number's leading bit, or one more."""
    return value.numerator.bit_length() - value.denominator.bit_length()


def _divide(n: int, e: int, m: int, f: int) -> tuple[int, int, bool]:
    """(n 2^e) / (m 2^f) as mantissa, exponent, and whether it came out without a remainder."""
    shift = max(PRECISION + m.bit_length() - n.bit_length(), 0)
    quotient, rest = divmod(n << shift, m)
    return (*_short(quotient, e - f - shift), True) if rest == 0 else (quotient, e - f - shift, False)
