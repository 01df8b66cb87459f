"""A JPEG-LS encoder for one lossless 16-bit frame: neither GDCM through SimpleITK nor pydicom writes this syntax.

ISO/IEC 14495-1 (LOCO-I), one component, NEAR = 0, MAXVAL = 65535, default thresholds. Slow and small.
"""

from __future__ import annotations

import struct

import numpy as np

MAXVAL, BITS, LIMIT, RESET = 65535, 16, 64, 64
THRESHOLDS = (18, 67, 276)
"""C.2.4.1.1: the basic ones (3, 7, 21) scaled for more than 12 bits."""
RUN_ORDER = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 15)


class _Bits:
    """Bits in, bytes out; after a byte of ones only seven bits follow (A.1)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._value, self._free = 0, 8

    def put(self, value: int, count: int) -> None:
        for place in range(count - 1, -1, -1):
            self._free -= 1
            self._value |= (value >> place & 1) << self._free
            if self._free == 0:
                self.data.append(self._value)
                self._free = 7 if self._value == 0xFF else 8
                self._value = 0

    def end(self) -> bytes:
        while self._free != 8 and not (self._free == 7 and self.data[-1:] == b"\xff"):
            self.put(0, 1)
        return bytes(self.data)


def _quantised(d: int) -> int:
    size = abs(d)
    level = 0 if size == 0 else 1 + sum(size >= t for t in THRESHOLDS)
    return level if d > 0 else -level


def _golomb(bits: _Bits, value: int, k: int, limit: int) -> None:
    high = value >> k
    if high < limit - BITS - 1:
        bits.put(1, high + 1)
        bits.put(value & ((1 << k) - 1), k)
    else:
        bits.put(1, limit - BITS)
        bits.put(value - 1, BITS)


def _parameter(total: int, count: int) -> int:
    k = 0
    while count << k < total:
        k += 1
    return k


def _wrapped(error: int) -> int:
    error = (error + MAXVAL + 1) % (MAXVAL + 1)
    return error - (MAXVAL + 1) if error >= (MAXVAL + 1) // 2 else error


def encode(image: np.ndarray) -> bytes:
    """One uint16 image, shape (rows, columns), as a JPEG-LS stream."""
    rows, columns = image.shape
    bits = _Bits()
    start = max(2, (MAXVAL + 1 + 32) // 64)
    a, n, b, c = [start] * 367, [1] * 367, [0] * 365, [0] * 365
    run_negative, run_index = [0, 0], 0
    above = [0] * (columns + 2)
    for row in image.tolist():
        line = [above[1], *row, 0]  # position 0 stands for the pixel left of the first
        above[columns + 1] = above[columns]
        x = 1
        while x <= columns:
            ra, rb, rc, rd = line[x - 1], above[x], above[x - 1], above[x + 1]
            context = [_quantised(d) for d in (rd - rb, rb - rc, rc - ra)]
            if not any(context):
                length = 0
                while x + length <= columns and line[x + length] == ra:
                    length += 1
                rest = length
                while rest >= 1 << RUN_ORDER[run_index]:
                    bits.put(1, 1)
                    rest -= 1 << RUN_ORDER[run_index]
                    run_index = min(run_index + 1, 31)
                x += length
                if x > columns:
                    if rest:
                        bits.put(1, 1)
                    continue
                bits.put(rest, RUN_ORDER[run_index] + 1)
                ra, rb = line[x - 1], above[x]
                kind = int(ra == rb)
                error = line[x] - (ra if kind else rb)
                if not kind and ra > rb:
                    error = -error
                error = _wrapped(error)
                q = 365 + kind
                k = _parameter(a[q] + (n[q] >> 1 if kind else 0), n[q])
                low = 2 * run_negative[kind] < n[q]
                flip = (k == 0 and error > 0 and low) or (error < 0 and (k != 0 or not low))
                value = 2 * abs(error) - kind - int(flip)
                _golomb(bits, value, k, LIMIT - RUN_ORDER[run_index] - 1)
                run_negative[kind] += error < 0
                a[q] += (value + 1 - kind) >> 1
                if n[q] == RESET:
                    a[q], n[q], run_negative[kind] = a[q] >> 1, n[q] >> 1, run_negative[kind] >> 1
                n[q] += 1
                run_index = max(run_index - 1, 0)
                x += 1
                continue
            number = (context[0] * 9 + context[1]) * 9 + context[2]
            sign = -1 if number < 0 else 1
            q = abs(number)
            guess = min(ra, rb) if rc >= max(ra, rb) else max(ra, rb) if rc <= min(ra, rb) else ra + rb - rc
            guess = min(max(guess + sign * c[q], 0), MAXVAL)
            error = _wrapped(sign * (line[x] - guess))
            k = _parameter(a[q], n[q])
            if k == 0 and 2 * b[q] <= -n[q]:
                value = 2 * error + 1 if error >= 0 else -2 * (error + 1)
            else:
                value = 2 * error if error >= 0 else -2 * error - 1
            _golomb(bits, value, k, LIMIT)
            b[q] += error
            a[q] += abs(error)
            if n[q] == RESET:
                a[q], b[q], n[q] = a[q] >> 1, b[q] >> 1, n[q] >> 1
            n[q] += 1
            if b[q] <= -n[q]:
                b[q], c[q] = max(b[q] + n[q], 1 - n[q]), max(c[q] - 1, -128)
            elif b[q] > 0:
                b[q], c[q] = min(b[q] - n[q], 0), min(c[q] + 1, 127)
            x += 1
        above = line
    frame = struct.pack(">HHBHHB3B", 0xFFF7, 11, 16, rows, columns, 1, 1, 0x11, 0)
    scan = struct.pack(">HHB2B3B", 0xFFDA, 8, 1, 1, 0, 0, 0, 0)
    return b"\xff\xd8" + frame + scan + bits.end() + b"\xff\xd9"
