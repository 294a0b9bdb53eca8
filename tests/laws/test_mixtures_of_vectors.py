"""VB-LoRA's pieces: mixtures of the k vectors with the largest logits, by the softmax of those k, in a layer and in a file."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, ShapeError
from peft_ref.layers import Linear
from peft_ref.methods.vblora import PLACES, WEIGHTS, Params, VBLoRA, largest
from tests.laws.compare import Host, assert_close, assert_same_bits

LAYER = Linear(in_features=2, out_features=1)
E = np.exp(-1.0)


def mixed(*logits: list[float], k: int) -> Host:
    """What each of two pieces, of one number, is of a bank 1, 2, 4, ...; B is 1."""
    n = len(logits[0])
    method = VBLoRA(r=1, num_vectors=n, vector_length=1, topk=k)
    one = np.full((1, 1, n), -1e4)
    one[..., 0] = 0.0
    return np.ravel(method.delta(LAYER, Params(np.asarray([logits]), one, 2.0 ** np.arange(n)[:, None])).W)


@pytest.mark.parametrize("far", [0.0, 1000.0, -1000.0, 1e6])
def test_a_number_added_to_all_logits_of_a_piece_changes_nothing(far: float) -> None:
    got = mixed([0.0, -1.0, -5.0], [far - 1.0, far - 9.0, far], k=2)
    assert_close(got, np.asarray([1 + 2 * E, E + 4]) / (1 + E), "pieces")


def test_of_equal_logits_the_first_are_taken() -> None:
    assert_close(mixed([7.0] * 4, [-3.0, 7.0, 7.0, 7.0], k=2), np.asarray([1.5, 3.0]), "pieces")
    for k in range(1, 7):
        assert_same_bits(largest(np.ones((1, 6)), k), np.arange(6)[None, :] < k, "the first")


def kept(k: int, n: int, logits: Host) -> tuple[Host, Host]:
    made = VBLoRA(r=1, num_vectors=n, vector_length=1, topk=k, save_only_topk_weights=True).in_file({"a": logits})
    return np.asarray(made["a" + PLACES]), np.asarray(made["a" + WEIGHTS])


def test_a_file_keeps_the_vectors_that_the_layer_takes() -> None:
    """Of many logits that are equal too, where a sort that is not stable would mix them up."""
    n, k = 400, 150
    logits = np.random.default_rng(0).integers(0, 3, (2, 3, n)).astype(np.float32)
    places, weights = kept(k, n, logits)
    for at in np.ndindex(2, 3):
        first = [i for word in (2, 1, 0) for i in range(n) if logits[(*at, i)] == word][:k]
        np.testing.assert_array_equal(places[at], first)
        assert set(first) == set(np.flatnonzero(largest(logits[at][None, :], k)[0]))
        want = np.exp(logits[(*at, first)].astype(float))
        assert_close(weights[at], (want / want.sum())[:-1], "weights", rounding=1e-6)


@pytest.mark.parametrize("far", [1000.0, -1000.0])
def test_a_file_keeps_the_weights_of_logits_of_any_size(far: float) -> None:
    places, weights = kept(2, 3, np.asarray([[[far, far - 5.0, far - 1.0]]]))
    np.testing.assert_array_equal(places, [[[0, 2]]])
    assert_close(weights, np.asarray([[[1 / (1 + E)]]]), "the larger weight")


def read(places: Any, weights: Any, n: int = 4) -> Host:
    method = VBLoRA(r=1, num_vectors=n, vector_length=1, topk=2, save_only_topk_weights=True)
    return np.asarray(method.from_file({"a" + PLACES: np.asarray(places), "a" + WEIGHTS: np.asarray(weights)})["a"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logits_that_are_read_again_have_the_weights_dtype_and_are_their_logarithms(dtype: Any) -> None:
    """The softmax of logarithms is what they are of; a weight of zero, which a last one may have, is no cause for a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read([[[2, 0], [1, 3]]], np.asarray([[[0.75], [1.0]]], dtype))
    inf = np.inf
    assert_same_bits(got, np.asarray([[[np.log(dtype(0.25)), -inf, np.log(dtype(0.75)), -inf], [-inf, 0.0, -inf, -inf]]], dtype), "logits")


@pytest.mark.parametrize("wrong", [[[[0, -1]]], [[[4, 0]]], [[[-4, 3]]], [[[0.0, 1.0]]], [[[False, True]]]])
def test_a_place_that_is_none_is_refused(wrong: Any) -> None:
    for right in ([[[0, 3]]], np.asarray([[[3, 0]]], np.uint8)):
        assert np.isfinite(read(right, [[[0.5]]])).sum() == 2
    with pytest.raises(ShapeError, match=f"^a{PLACES}: places from 0 to num_vectors=4 "):
        read(wrong, [[[0.5]]])


NAMES = {2: "uint8", 2**8 - 1: "uint8", 2**8: "int16", 2**15 - 1: "int16", 2**15: "int32", 2**31 - 1: "int32", 2**31: "int64"}


@pytest.mark.parametrize(("n", "name"), NAMES.items())
def test_places_are_kept_in_the_smallest_dtype_that_counts_the_vectors(n: int, name: str) -> None:
    assert kept(2, n, np.asarray([[[1.0, 0.0]]]))[0].dtype == name


def test_a_bank_has_a_vector() -> None:
    for n in (0, -1):
        with pytest.raises(ConfigError, match=f"^num_vectors={n}: a positive number is needed"):
            VBLoRA(num_vectors=n)
