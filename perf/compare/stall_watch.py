"""A process of its own: touches fresh memory until its input ends, and then says when that took long.

python stall_watch.py        prints "ready", and at the end of its input a JSON list of [since_s, until_s]
"""

import json
import mmap
import select
import sys
import time

TOUCH_BYTES = 600_000
PERIOD_S = 0.002
STALL_S = 0.003  # of touching that many bytes: 0.4 ms usually


def main() -> None:
    content = b"x" * TOUCH_BYTES
    seen: list[tuple[float, float]] = []
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        began_s, began = time.time(), time.monotonic()
        memory = mmap.mmap(-1, TOUCH_BYTES)
        memory.write(content)
        memory.close()
        took_s = time.monotonic() - began
        if took_s > STALL_S:
            seen.append((began_s, began_s + took_s))
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
