"""The least that a merge can take: read all inputs, write one output. `floor.py JOB SHARE OUT INPUT …`

Two threads read pieces of 512 KiB of all inputs, xor them (nothing is computed), and write them in the file's order.
"""

from __future__ import annotations

import os
import sys
import threading
from itertools import count

import numpy as np

PIECE = 1 << 19  # bytes


def main() -> None:
    out, *paths = sys.argv[3:]
    files = [os.open(path, os.O_RDONLY) for path in paths]
    size = os.fstat(files[0]).st_size
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    places = count()

    def work() -> None:
        buffers = [bytearray(PIECE) for _ in files]
        numbers = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        while (offset := next(places) * PIECE) < size:
            length = min(PIECE, size - offset)
            for file, buffer, own in zip(files, buffers, numbers, strict=True):
                os.preadv(file, [memoryview(buffer)[:length]], offset)
                if own is not numbers[0]:
                    np.bitwise_xor(numbers[0], own, out=numbers[0])
            os.pwrite(target, memoryview(buffers[0])[:length], offset)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
