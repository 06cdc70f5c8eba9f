"""Encoding and masking: exact sums, unbiased rounding, no overflow, and masks that hide."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.secagg.encoding import (
    BLOCK,
    WORD_BITS,
    Encoder,
    Encoding,
    Segment,
    pack,
    packed_size,
    unpack,
)
from fedcmr_shared.secagg.masking import Mask, MaskedSum, masked_vector

SITES = [3, 4, 5, 10, 25, 50]
CHANCE = 1e-9
word_sizes = st.sampled_from(WORD_BITS)
bounds = st.floats(1e-6, 1e6)


def key(*name: object) -> bytes:
    """Return a key that is the same in every run, so that no statistical test is a lottery."""
    return hashlib.sha256(repr(name).encode()).digest()


def flat(size: int, bound: float = 1.0, bits: int = 32, weight: int = 1) -> Encoding:
    return Encoding((Segment("x", (size,), bound),), bits, weight)


def read(vector: bytes | bytearray, encoding: Encoding) -> list[int]:
    """Unpack by the definition: one long little-endian number."""
    number, bits = int.from_bytes(vector, "little"), encoding.word_bits
    return [number >> bits * i & (1 << bits) - 1 for i in range(encoding.size)]


def clear_words(encoding: Encoding, values: Mapping[str, Tensor], rounding: bytes) -> list[int]:
    return read(masked_vector(encoding, values, 1, rounding, []), encoding)


def keystream(name: bytes, count: int) -> list[int]:
    """AES-256-CTR by its definition: counter blocks, each encrypted for itself."""
    block_cipher = Cipher(algorithms.AES(name), modes.ECB()).encryptor()
    counters = b"".join(i.to_bytes(16, "big") for i in range(-(-count // 4)))
    words: list[int] = np.frombuffer(block_cipher.update(counters), "<u4")[:count].tolist()
    return words


# --- description -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "no name"),
        ({"shape": (2, -1)}, "shape"),
        ({"shape": (2.0,)}, "shape"),
        ({"shape": (True,)}, "shape"),
        ({"bound": 0.0}, "segment x: bound"),
        ({"bound": -1.0}, "segment x: bound"),
        ({"bound": math.inf}, "segment x: bound"),
        ({"bound": math.nan}, "segment x: bound"),
        ({"bound": 1e-31}, "segment x: bound"),
        ({"bound": 1.5, "integer": True}, "not whole"),
    ],
)
def test_a_wrong_segment_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Segment(**{"name": "x", "shape": (2,), "bound": 1.0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word_bits": 8}, "word_bits is 8"),
        ({"total_weight": 0}, "total_weight is 0"),
        ({"total_weight": 2.0}, "total_weight is 2.0"),
        ({"total_weight": True}, "total_weight is True"),
        ({"segments": ()}, "at least one segment"),
        (
            {"segments": (Segment("x", (), 1.0), Segment("x", (1,), 2.0))},
            "segment x is there twice",
        ),
        ({"word_bits": 16, "total_weight": 256}, "segment x: 16-bit words leave 255 steps"),
        ({"word_bits": 16, "total_weight": 1 << 20}, "use larger words or smaller weights"),
        (
            {"segments": (Segment("n", (1,), 32768, integer=True),), "word_bits": 16},
            "segment n: .* 65536 are needed: use larger words or a smaller bound",
        ),
    ],
)
def test_a_wrong_encoding_is_refused(change: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {
        "segments": (Segment("x", (2,), 1.0),),
        "word_bits": 32,
        "total_weight": 1,
    }
    Encoding(**right)
    with pytest.raises(ConfigurationError, match=message):
        Encoding(**{**right, **change})


def test_the_least_room_suffices() -> None:
    Encoding((Segment("x", (1,), 1.0),), 16, 255)
    Encoding((Segment("n", (1,), 32767, integer=True),), 16, 1)


def test_the_digest_covers_every_field() -> None:
    segment = Segment("x", (2, 3), 1.0)
    encoding = Encoding((segment, Segment("y", (), 2.0)), 32, 10)
    others = [
        replace(encoding, word_bits=24),
        replace(encoding, total_weight=11),
        replace(encoding, segments=encoding.segments[:1]),
        replace(encoding, segments=encoding.segments[::-1]),
        *(
            replace(encoding, segments=(replace(segment, **change), encoding.segments[1]))
            for change in (
                {"name": "z"},
                {"shape": (3, 2)},
                {"bound": math.nextafter(1.0, 2)},
                {"integer": True},
            )
        ),
    ]
    digests = {encoding.sha256, *(other.sha256 for other in others)}
    assert len(digests) == 1 + len(others)
    assert replace(encoding, segments=(Segment("x", (2, 3), 1), encoding.segments[1])).sha256 == (
        encoding.sha256
    )


# --- packing -----------------------------------------------------------------------------------


@given(word_sizes, st.lists(st.integers(0, 2**32 - 1), max_size=9))
def test_packing_is_one_little_endian_number(bits: int, values: list[int]) -> None:
    """Only the lower bits of a word are kept; unpacking returns them."""
    words = np.array(values, np.uint32)
    out = np.full(packed_size(len(words), bits), 0xAB, np.uint8)
    pack(words, bits, out)
    expected = sum((value & (1 << bits) - 1) << bits * i for i, value in enumerate(values))
    assert out.tobytes() == expected.to_bytes(len(out), "little")
    again = np.full(len(words), 0xCDCDCDCD, np.uint32)
    unpack(out, bits, again)
    assert again.tolist() == [value & (1 << bits) - 1 for value in values]


@pytest.mark.parametrize(("bits", "length"), [(32, 28), (24, 21), (20, 20), (16, 14)])
def test_packed_length(bits: int, length: int) -> None:
    """Seven words; of 20 bits each they take four pairs of 5 bytes."""
    encoding = flat(7, bits=bits)
    assert encoding.nbytes == length
    assert len(masked_vector(encoding, {"x": torch.zeros(7)}, 1, key(), [])) == length


# --- rounding ----------------------------------------------------------------------------------


def exact_level(x: float, encoding: Encoding) -> Fraction:
    """Where the clipped value lies on the ladder of levels, as a fraction."""
    bound = Fraction(encoding.segments[0].bound)
    return (min(max(Fraction(x), -bound), bound) + bound) * encoding.steps / (2 * bound)


@given(bounds, word_sizes, st.integers(1, 100), st.floats(-1.2, 1.2), st.integers(0, 2**32 - 1))
def test_rounding_up_follows_the_fraction(
    bound: float, bits: int, weight: int, ratio: float, draw: int
) -> None:
    """Of all 2^32 draws, the fraction's share rounds up: floor(level + draw / 2^32)."""
    encoding = flat(1, bound, bits, weight)
    x = bound * ratio
    encoder = Encoder(encoding, {"x": torch.tensor([x], dtype=torch.float64)})
    (word,) = encoder.words(np.array([draw], np.uint32)).tolist()
    level = exact_level(x, encoding)
    slack = Fraction(encoding.steps, 2**51) + Fraction(1, 2**32)
    assert 0 <= word <= encoding.steps
    assert math.floor(level - slack + Fraction(draw, 2**32)) <= word
    assert word <= math.floor(level + slack + Fraction(draw, 2**32))


@given(bounds, word_sizes, st.integers(1, 100))
def test_rounding_is_exact_at_both_ends(bound: float, bits: int, weight: int) -> None:
    """With the smallest and the largest draw, hence with all."""
    encoding = flat(4, bound, bits, weight)
    values = torch.tensor([bound, -bound, 3 * bound, -1e300], dtype=torch.float64)
    for draw in (0, 2**32 - 1):
        words = Encoder(encoding, {"x": values}).words(np.full(4, draw, np.uint32))
        assert words.tolist() == [encoding.steps, 0, encoding.steps, 0]


@pytest.mark.parametrize("x", [0.0, 0.1234567, -0.999, 1 / 3])
def test_rounding_is_unbiased_over_keys(x: float) -> None:
    """The mean over draws and keys is the value; always rounding down, as a control, is not."""
    encoding = flat(5_000, bits=16, weight=10)
    values = {"x": torch.full((5_000,), x, dtype=torch.float64)}
    words = np.concatenate([clear_words(encoding, values, key(x, k)) for k in range(100)])
    level = exact_level(x, encoding)
    ends = {math.floor(level), math.ceil(level)}
    assert set(np.unique(words)) == ends
    share = float(level - min(ends))
    count = int((words == max(ends)).sum())
    assert stats.binomtest(count, len(words), share).pvalue > CHANCE
    assert stats.binomtest(0, len(words), share).pvalue < CHANCE


def test_the_rounding_key_decides_the_vector() -> None:
    encoding = flat(1000)
    values = {"x": torch.linspace(-1, 1, 1000)}
    assert clear_words(encoding, values, key(1)) == clear_words(encoding, values, key(1))
    assert clear_words(encoding, values, key(1)) != clear_words(encoding, values, key(2))


def test_draws_are_the_key_stream_of_the_rounding_key() -> None:
    encoding = flat(9)
    values = {"x": torch.linspace(-1, 1, 9)}
    draws = np.array(keystream(key("rounding"), 9), np.uint32)
    expected = Encoder(encoding, values).words(draws).tolist()
    assert clear_words(encoding, values, key("rounding")) == expected


# --- sums --------------------------------------------------------------------------------------


def total(encoding: Encoding, vectors: list[bytearray]) -> MaskedSum:
    sums = MaskedSum(encoding)
    for vector in vectors:
        sums.add(vector)
    return sums


@given(st.data(), bounds, word_sizes, st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_the_error_bound_holds(
    data: st.DataObject, bound: float, bits: int, weights: list[int]
) -> None:
    encoding = flat(3, bound, bits, sum(weights) + 2)
    ratios = st.lists(st.floats(-1.1, 1.1), min_size=3, max_size=3)
    values = [bound * torch.tensor(data.draw(ratios), dtype=torch.float64) for _ in weights]
    vectors = [
        masked_vector(encoding, {"x": x}, w, key(data.draw(st.integers())), [])
        for x, w in zip(values, weights, strict=True)
    ]
    decoded = total(encoding, vectors).decode(sum(weights))["x"]
    limit = encoding.error_bound(encoding.segments[0], sum(weights))
    for i, got in enumerate(decoded.tolist()):
        clipped = [
            min(max(Fraction(x[i].item()), -Fraction(bound)), Fraction(bound)) for x in values
        ]
        exact = sum(w * x for w, x in zip(weights, clipped, strict=True))
        assert abs(Fraction(got) - exact) <= limit
    assert limit < 1.001 * sum(weights) * encoding.unit(encoding.segments[0])


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("bits", WORD_BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_overflows_at_the_extremes(sites: int, bits: int, sign: int) -> None:
    """All sites at the same end, with the weights 1, 2 and 4, real and whole numbers."""
    weights = [(1, 2, 4)[i % 3] for i in range(sites)]
    steps = ((1 << bits) - 1) // sum(weights)
    segments = (Segment("x", (3,), 0.7), Segment("n", (2,), steps // 2, integer=True))
    encoding = Encoding(segments, bits, sum(weights))
    values = {
        "x": torch.full((3,), sign * 0.7, dtype=torch.float64),
        "n": torch.full((2,), sign * (steps // 2)),
    }
    vectors = [masked_vector(encoding, values, w, key(i), []) for i, w in enumerate(weights)]
    decoded = total(encoding, vectors).decode(sum(weights))
    assert decoded["n"].tolist() == [sign * (steps // 2) * sum(weights)] * 2
    assert decoded["x"].tolist() == pytest.approx([sign * 0.7 * sum(weights)] * 3, rel=1e-15)


def test_an_understated_total_weight_overflows() -> None:
    """Control: the same extremes in an encoding for fewer sites do not come out."""
    encoding = flat(1, weight=3)
    vectors = [masked_vector(encoding, {"x": torch.ones(1)}, 1, key(), []) for _ in range(4)]
    assert total(encoding, vectors).decode(3)["x"].item() != pytest.approx(4)


@given(st.data(), word_sizes, st.sampled_from(SITES))
def test_the_masked_sum_is_the_integer_sum(data: st.DataObject, bits: int, sites: int) -> None:
    """Pairwise masks cancel, own masks are removed, and what is left are the weighted words."""
    weights = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=sites, max_size=sites))
    bound = ((1 << bits) - 1) // sum(weights) // 2
    size = data.draw(st.integers(1, 5))
    encoding = Encoding((Segment("n", (size,), bound, integer=True),), bits, sum(weights))
    numbers = st.lists(st.integers(-bound, bound), min_size=size, max_size=size)
    values = [data.draw(numbers) for _ in range(sites)]
    own = [Mask(key("own", i), 1) for i in range(sites)]
    sums = MaskedSum(encoding)
    for i in range(sites):
        pairs = [
            Mask(key(min(i, j), max(i, j)), 1 if i < j else -1) for j in range(sites) if j != i
        ]
        tensors = {"n": torch.tensor(values[i])}
        sums.add(masked_vector(encoding, tensors, weights[i], key(), [own[i], *pairs]))
    sums.remove(own)
    expected = [sum(w * x[k] for w, x in zip(weights, values, strict=True)) for k in range(size)]
    assert sums.decode(sum(weights))["n"].tolist() == expected


@given(st.integers(1, 9), word_sizes, st.integers(1, 50))
def test_a_weight_multiplies_the_words(weight: int, bits: int, size: int) -> None:
    encoding = flat(size, bits=bits, weight=9)
    values = {"x": torch.linspace(-1, 1, size)}
    weighted = masked_vector(encoding, values, weight, key(), [])
    words = clear_words(encoding, values, key())
    assert read(weighted, encoding) == [weight * word for word in words]


def test_whole_numbers_travel_exactly_and_are_clipped() -> None:
    encoding = Encoding((Segment("n", (5,), 1000, integer=True),), 16, 10)
    values = torch.tensor([-(2**63), -1000, 7, 1000, 2**63 - 1])
    vector = masked_vector(encoding, {"n": values}, 3, key(), [])
    assert read(vector, encoding) == [0, 0, 3 * 1007, 6000, 6000]
    decoded = total(encoding, [vector]).decode(3)["n"]
    assert decoded.dtype == torch.int64
    assert decoded.tolist() == [-3000, -3000, 21, 3000, 3000]
    assert encoding.unit(encoding.segments[0]) == 1
    assert encoding.error_bound(encoding.segments[0], 3) == 0


@pytest.mark.parametrize("bits", WORD_BITS)
def test_segments_that_cross_blocks_make_the_same_vector(bits: int) -> None:
    """How the numbers are divided into tensors changes nothing; shapes come back."""
    size = 2 * BLOCK + 7
    values = torch.linspace(-1, 1, size)
    shapes = [(3,), (0, 4), (), (BLOCK - 5, 1), (2, 3), (BLOCK + 2,)]
    parts = torch.split(values, [math.prod(shape) for shape in shapes])
    named = {
        str(i): part.view(shape) for i, (part, shape) in enumerate(zip(parts, shapes, strict=True))
    }
    encoding = Encoding(
        tuple(Segment(name, tuple(value.shape), 1.0) for name, value in named.items()), bits, 3
    )
    masks = [Mask(key("a"), 1), Mask(key("b"), -1)]
    vector = masked_vector(encoding, named, 2, key(), masks)
    assert vector == masked_vector(flat(size, bits=bits, weight=3), {"x": values}, 2, key(), masks)
    sums = total(encoding, [vector])
    sums.remove(masks)
    for name, decoded in sums.decode(2).items():
        limit = encoding.error_bound(encoding.segments[int(name)], 2)
        assert decoded.dtype == torch.float64
        torch.testing.assert_close(decoded, 2 * named[name].double(), rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_real_type_is_read_exactly(dtype: torch.dtype) -> None:
    """Also when the tensor is no contiguous one, or wants a gradient."""
    values = torch.linspace(-1, 1, 12).view(3, 4).to(dtype).t().requires_grad_()
    encoding = Encoding((Segment("x", (4, 3), 1.0),), 32, 3)
    wide = {"x": values.detach().double().contiguous()}
    assert clear_words(encoding, {"x": values}, key()) == clear_words(encoding, wide, key())


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_every_integer_type_is_read_exactly(dtype: torch.dtype) -> None:
    encoding = Encoding((Segment("n", (3,), 200, integer=True),), 32, 3)
    words = clear_words(encoding, {"n": torch.tensor([0, 1, 127], dtype=dtype)}, key())
    assert words == [200, 201, 327]


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numbers_that_are_none_are_refused(value: float, dtype: torch.dtype) -> None:
    values = {"x": torch.zeros(3), "y": torch.zeros(BLOCK, dtype=dtype)}
    values["y"][-1] = value
    encoding = Encoding((Segment("x", (3,), 1.0), Segment("y", (BLOCK,), 1.0)), 32, 3)
    with pytest.raises(FederationError, match="tensor y holds NaN or infinity"):
        masked_vector(encoding, values, 1, key(), [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": None}, "tensor x is not among the values"),
        ({"z": torch.zeros(1)}, "tensor z is not a segment"),
        ({"x": torch.zeros(3)}, r"tensor x has shape \(3,\), the encoding \(2,\)"),
        ({"x": torch.zeros(2, 1)}, "tensor x has shape"),
        ({"x": torch.zeros(2, dtype=torch.int32)}, "tensor x is torch.int32"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "tensor x is torch.complex64"),
        ({"n": torch.zeros(2)}, "tensor n is torch.float32"),
        ({"n": torch.zeros(2, dtype=torch.bool)}, "tensor n is torch.bool"),
    ],
)
def test_other_tensors_than_those_of_the_encoding_are_refused(
    values: dict[str, Tensor | None], message: str
) -> None:
    encoding = Encoding((Segment("x", (2,), 1.0), Segment("n", (2,), 9, integer=True)), 32, 3)
    right = {"x": torch.zeros(2), "n": torch.zeros(2, dtype=torch.int64)}
    masked_vector(encoding, right, 1, key(), [])
    wrong = {name: value for name, value in {**right, **values}.items() if value is not None}
    with pytest.raises(FederationError, match=message):
        masked_vector(encoding, wrong, 1, key(), [])


@pytest.mark.parametrize("weight", [0, 4, -1, 1.0, True])
def test_a_weight_outside_the_encoding_is_refused(weight: Any) -> None:
    encoding = flat(1, weight=3)
    with pytest.raises(FederationError, match="from 1 to 3"):
        masked_vector(encoding, {"x": torch.zeros(1)}, weight, key(), [])
    with pytest.raises(FederationError, match="from 1 to 3"):
        MaskedSum(encoding).decode(weight)


@pytest.mark.parametrize("length", [0, 27, 29])
def test_a_vector_of_wrong_length_changes_nothing(length: int) -> None:
    encoding = flat(7)
    vector = masked_vector(encoding, {"x": torch.ones(7)}, 1, key(), [])
    sums = total(encoding, [vector])
    with pytest.raises(FederationError, match=f"{length} bytes, the encoding 28"):
        sums.add(bytes(length))
    assert sums.decode(1)["x"].tolist() == [1] * 7


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_vector_comes_in_any_buffer(kind: Any) -> None:
    vector = masked_vector(flat(7), {"x": torch.ones(7)}, 1, key(), [])
    assert total(flat(7), [kind(vector)]).decode(1)["x"].tolist() == [1] * 7


@pytest.mark.parametrize("integer", [False, True])
def test_a_sum_that_the_survivors_cannot_send_is_refused(integer: bool) -> None:
    """As when a mask is left, or a vector of a site that is not counted."""
    encoding = Encoding((Segment("x", (99,), 100, integer=integer),), 32, 3)
    values = {"x": torch.full((99,), 100, dtype=torch.int64 if integer else torch.float32)}
    left = Mask(key("left"), 1)
    sums = total(encoding, [masked_vector(encoding, values, 1, key(), [left])])
    with pytest.raises(FederationError, match="the sum of x exceeds"):
        sums.decode(1)
    sums.remove([left])
    assert sums.decode(1)["x"].tolist() == [100] * 99
    sums.add(masked_vector(encoding, values, 1, key(), []))
    with pytest.raises(FederationError, match="the sum of x exceeds"):
        sums.decode(1)


# --- masks -------------------------------------------------------------------------------------


def test_a_mask_is_checked_and_its_key_not_shown() -> None:
    assert "key" not in repr(Mask(key(), 1))
    with pytest.raises(FederationError, match="32 bytes, not 31"):
        Mask(bytes(31), 1)
    with pytest.raises(FederationError, match="not 1 or -1"):
        Mask(bytes(32), 0)  # type: ignore[arg-type] # the refusal is tested
    with pytest.raises(FederationError, match="32 bytes, not 33"):
        masked_vector(flat(1), {"x": torch.zeros(1)}, 1, bytes(33), [])


@pytest.mark.parametrize("names", [("a", "a", "r"), ("a", "b", "a")])
def test_equal_keys_are_refused(names: tuple[str, str, str]) -> None:
    first, second, rounding = map(key, names)
    masks = [Mask(first, 1), Mask(second, -1)]
    with pytest.raises(FederationError, match="two keys of a masked vector are equal"):
        masked_vector(flat(1), {"x": torch.zeros(1)}, 1, rounding, masks)


@given(word_sizes, st.integers(1, 9), st.lists(st.sampled_from([1, -1]), max_size=4))
def test_masks_are_signed_key_streams(bits: int, size: int, signs: list[Any]) -> None:
    encoding = flat(size, bits=bits, weight=3)
    values = {"x": torch.linspace(-1, 1, size)}
    masks = [Mask(key(i), sign) for i, sign in enumerate(signs)]
    words = clear_words(encoding, values, key("r"))
    for mask in masks:
        stream = keystream(mask.key, size)
        words = [word + mask.sign * pad for word, pad in zip(words, stream, strict=True)]
    vector = masked_vector(encoding, values, 1, key("r"), masks)
    assert read(vector, encoding) == [word % 2**bits for word in words]


def p_uniform(vector: bytearray) -> float:
    return float(
        stats.chisquare(np.bincount(np.frombuffer(vector, np.uint8), minlength=256)).pvalue
    )


@pytest.mark.parametrize("bits", WORD_BITS)
@pytest.mark.parametrize("x", [-1.0, 0.0, 1.0])
def test_masked_vectors_are_uniform(bits: int, x: float) -> None:
    """Byte by byte and whatever the values; without masks they are far from it."""
    encoding = flat(200_000, bits=bits, weight=10)
    values = {"x": torch.full((200_000,), x)}
    masks = [Mask(key(bits, x, i), 1 if i % 2 else -1) for i in range(3)]
    assert p_uniform(masked_vector(encoding, values, 1, key("r"), masks)) > CHANCE
    assert p_uniform(masked_vector(encoding, values, 1, key("r"), [])) < CHANCE


def p_same(first: bytearray, second: bytearray) -> float:
    """Homogeneity of the 4096 values of the words' upper bits in two vectors."""
    tops = [np.frombuffer(v, "<u4") >> 20 for v in (first, second)]
    table = np.stack([np.bincount(top, minlength=4096) for top in tops])
    return float(stats.chi2_contingency(table[:, table.any(0)]).pvalue)


def test_one_unknown_mask_hides_the_value() -> None:
    """Vectors of opposite values differ by no more than chance; without the mask, entirely."""
    encoding = flat(200_000, weight=10)
    low, high = ({"x": torch.full((200_000,), x)} for x in (-1.0, 0.9))

    def pair(masks: list[list[Mask]]) -> tuple[bytearray, bytearray]:
        first = masked_vector(encoding, low, 1, key("r"), masks[0])
        return first, masked_vector(encoding, high, 1, key("r"), masks[1])

    assert p_same(*pair([[Mask(key("one"), 1)], [Mask(key("two"), 1)]])) > CHANCE
    assert p_same(*pair([[], []])) < CHANCE


def test_the_format_stays() -> None:
    """Vectors of another version of the software must add up with ours."""
    values = {"x": torch.tensor([-0.9, -0.5, 0, 0.3, 1.1]), "n": torch.tensor([-3, 5])}
    segments = (Segment("x", (5,), 1.0), Segment("n", (2,), 5, integer=True))
    masks = [Mask(key("a"), 1), Mask(key("b"), -1)]
    digests = {}
    for bits in WORD_BITS:
        encoding = Encoding(segments, bits, 7)
        vector = masked_vector(encoding, values, 2, key("r"), masks)
        digests[bits] = encoding.sha256[:16], hashlib.sha256(vector).hexdigest()[:16]
    assert digests == FORMAT


FORMAT = {
    32: ("55d7c711570a45ef", "62a0a4ad8d34c44d"),
    24: ("f2614e05ddbb2d84", "27212dcf0b9a7ae7"),
    20: ("2d0e6e428317c327", "f50a7205fb09350a"),
    16: ("81d8305d50216612", "62a38c853bf9bff0"),
}


# --- memory ------------------------------------------------------------------------------------


def peak_of(action: Any) -> int:
    """Return the most bytes that ``action`` held at once beyond what was there."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bits", WORD_BITS)
def test_memory_stays_below_three_vectors(bits: int) -> None:
    """Input and output included, with ten masks, for a vector of 10^6 float32 values."""
    encoding = flat(10**6, bits=bits, weight=10)
    values = {"x": torch.zeros(10**6)}
    vector_bytes = 4 * 10**6
    masks = [Mask(key(i), 1) for i in range(10)]
    site = peak_of(lambda: masked_vector(encoding, values, 1, key("r"), masks))
    assert vector_bytes + site <= 3 * vector_bytes
    vector = masked_vector(encoding, values, 1, key("r"), masks)

    def serve() -> None:
        sums = total(encoding, [vector])
        sums.remove(masks)

    assert len(vector) + peak_of(serve) <= 3 * vector_bytes
    decoded = MaskedSum(encoding)
    assert 4 * encoding.size + peak_of(lambda: decoded.decode(1)) <= 3.02 * vector_bytes
