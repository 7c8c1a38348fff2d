"""The floor, and until the disk has what was written, as forge waits: `flushed.py JOB SHARE OUT INPUT …`"""

from __future__ import annotations

import os
import sys

from benchmarks.merging.floor import main

if __name__ == "__main__":
    main()
    written = os.open(sys.argv[3], os.O_RDONLY)
    os.fsync(written)
    os.close(written)
