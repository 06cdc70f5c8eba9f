"""The ways to sum vectors that benchmarks/secagg.py compares."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, Final

import numpy as np
import torch
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common import (
    Code,
    FitRes,
    Status,
    bytes_to_ndarray,
    ndarray_to_bytes,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server.strategy import FedAvg
from numpy.typing import NDArray
from typing_extensions import override

from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.secagg.encoding import BLOCK, Encoding, Segment
from fedcmr_shared.secagg.masking import Mask, MaskedSum, masked_vector

BOUND: Final = 8.0  # Flower's default clipping range
Values = NDArray[np.float32]
Upload = Sequence[Any]  # buffers


class Method:
    """One way to sum: sites upload, the server receives and opens.

    Keys (i, i) are the sites' own; of a pair the lower site adds its mask, the other subtracts it.
    """

    def __init__(self, sites: int, size: int) -> None:
        self.sites, self.size = sites, size
        pairs = combinations_with_replacement(range(sites), 2)
        self.keys = {pair: os.urandom(32) for pair in pairs}
        self.tolerance = 0.0  # of the opened sum

    def masks(self, site: int) -> list[Mask]:
        """Return all masks of a site's vector."""
        pairs = ((min(site, peer), max(site, peer)) for peer in range(self.sites))
        return [Mask(self.keys[pair], 1 if pair[0] == site else -1) for pair in pairs]

    def own_masks(self) -> list[Mask]:
        """Return the masks that remain in the sum."""
        return [Mask(self.keys[site, site], 1) for site in range(self.sites)]

    def upload(self, site: int, values: Values) -> Upload:
        """Return what a site sends."""
        raise NotImplementedError

    def receive(self, upload: Upload) -> None:
        """Add what a site sent."""
        raise NotImplementedError

    def open(self) -> NDArray[np.float64]:
        """Return the result of the round."""
        raise NotImplementedError

    def exact(self, values: Values) -> NDArray[np.float64]:
        """Return what the result must be within ``tolerance``."""
        return self.sites * np.clip(values, -BOUND, BOUND).astype(np.float64)


class Plain(Method):
    """No protection."""

    def __init__(self, sites: int, size: int) -> None:
        super().__init__(sites, size)
        self.sum = np.zeros(size, np.float32)
        self.tolerance = sites * sites * BOUND * 2.0**-24

    @override
    def upload(self, site: int, values: Values) -> Upload:
        return [np.clip(values, -BOUND, BOUND).tobytes()]

    @override
    def receive(self, upload: Upload) -> None:
        self.sum += np.frombuffer(upload[0], np.float32)

    @override
    def open(self) -> NDArray[np.float64]:
        return self.sum.astype(np.float64)


class Keystream(Method):
    """Masks of nothing, which cancel."""

    def __init__(self, sites: int, size: int) -> None:
        super().__init__(sites, size)
        self.sum = np.zeros(size, np.uint32)

    @override
    def upload(self, site: int, values: Values) -> Upload:
        words = np.zeros(self.size, np.uint32)
        self._add(words, self.masks(site), 1)
        return [words.data]

    @override
    def receive(self, upload: Upload) -> None:
        self.sum += np.frombuffer(upload[0], np.uint32)

    @override
    def open(self) -> NDArray[np.float64]:
        self._add(self.sum, self.own_masks(), -1)
        return self.sum.astype(np.float64)

    @override
    def exact(self, values: Values) -> NDArray[np.float64]:
        return np.zeros(self.size)  # masks of nothing

    def _add(self, words: NDArray[np.uint32], masks: list[Mask], direction: int) -> None:
        zeros, pad = memoryview(bytes(4 * BLOCK)), np.empty(BLOCK, np.uint32)
        ciphers = [Cipher(algorithms.AES(mask.key), modes.CTR(bytes(16))) for mask in masks]
        encryptors = [cipher.encryptor() for cipher in ciphers]
        for start in range(0, self.size, BLOCK):
            block = words[start : start + BLOCK]
            for mask, encryptor in zip(masks, encryptors, strict=True):
                encryptor.update_into(zeros[: block.nbytes], pad.view(np.uint8).data)
                combine = np.add if mask.sign == direction else np.subtract
                combine(block, pad[: len(block)], out=block)


class Flower(Method):
    """Flower's, up to the opened vector."""

    levels, modulus = 1 << 22, 1 << 32  # the workflow's defaults

    def __init__(self, sites: int, size: int) -> None:
        super().__init__(sites, size)
        self.sum: list[NDArray[Any]] = []
        self.tolerance = 2 * BOUND / self.levels

    @override
    def upload(self, site: int, values: Values) -> Upload:
        weighted = parameters_multiply([values], 1.0)
        vector = factor_combine(self.levels, quantize(weighted, BOUND, self.levels))
        shapes = get_parameters_shape(vector)
        for mask in self.masks(site):
            pad = pseudo_rand_gen(mask.key, self.modulus, shapes)
            combine = parameters_addition if mask.sign > 0 else parameters_subtraction
            vector = combine(vector, pad)
        return [ndarray_to_bytes(array) for array in parameters_mod(vector, self.modulus)]

    @override
    def receive(self, upload: Upload) -> None:
        vector = [bytes_to_ndarray(part) for part in upload]
        self.sum = parameters_addition(self.sum, vector) if self.sum else vector

    @override
    def open(self) -> NDArray[np.float64]:
        vector = parameters_mod(self.sum, self.modulus)
        for mask in self.own_masks():
            pad = pseudo_rand_gen(mask.key, self.modulus, get_parameters_shape(vector))
            vector = parameters_subtraction(vector, pad)
        weight, vector = factor_extract(parameters_mod(vector, self.modulus))
        (mean,) = dequantize(vector, BOUND, self.levels)
        mean += -(self.sites - 1) * BOUND
        mean *= self.levels / weight
        return np.asarray(mean)

    @override
    def exact(self, values: Values) -> NDArray[np.float64]:
        return super().exact(values) / self.sites


class FlowerWorkflow(Flower):
    """Flower's, up to the average that its strategy makes of the sites' results."""

    @override
    def open(self) -> NDArray[np.float64]:
        opened = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([super().open()]), 1, {})
        results: list[Any] = [(None, opened)] * self.sites  # the strategy ignores who sent it
        parameters, _ = FedAvg().aggregate_fit(2, results, [])
        assert parameters is not None
        (mean,) = parameters_to_ndarrays(parameters)
        return np.asarray(mean)


class Fedcmr(Method):
    """This project's."""

    def __init__(self, sites: int, size: int, bits: int = 32) -> None:
        super().__init__(sites, size)
        self.identity = SiteKey(Ed25519PrivateKey.generate())
        segment = Segment("x", (size,), BOUND)
        self.encoding = Encoding((segment,), bits, sites)
        self.sum = MaskedSum(self.encoding)
        self.tolerance = self.encoding.error_bound(segment, sites)

    @override
    def upload(self, site: int, values: Values) -> Upload:
        tensors, rounding = {"x": torch.from_numpy(values)}, os.urandom(32)
        vector = masked_vector(self.encoding, tensors, 1, rounding, self.masks(site))
        signature = self.identity.sign(blake3(vector).digest())
        return [vector, bytes.fromhex(signature)]

    @override
    def receive(self, upload: Upload) -> None:
        vector, signature = upload
        digest = blake3(vector).digest()
        verify_signature(self.identity.public_key, signature.hex(), digest)
        self.sum.add(vector)

    @override
    def open(self) -> NDArray[np.float64]:
        self.sum.remove(self.own_masks())
        total: NDArray[np.float64] = self.sum.decode(self.sites)["x"].numpy()
        return total


METHODS: dict[str, Callable[[int, int], Method]] = {
    "plain": Plain,
    "keystream": Keystream,
    "flower": Flower,
    "flower workflow": FlowerWorkflow,
    "fedcmr": Fedcmr,
    "fedcmr, 20 bits": partial(Fedcmr, bits=20),
}
