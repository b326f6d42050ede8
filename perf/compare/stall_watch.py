"""A process of its own: sleeps again and again until its input ends, then prints when it was woken late.

python stall_watch.py        prints "ready", and at the end of its input a JSON list of [since_s, until_s]
"""

import json
import select
import sys
import time

PERIOD_S = 0.001
STALL_S = 0.004  # beyond the period: 0.1 ms usually


def main() -> None:
    seen: list[tuple[float, float]] = []
    print("ready", flush=True)
    while True:
        began_s, began = time.time(), time.monotonic()
        if select.select([sys.stdin], [], [], PERIOD_S)[0]:
            break
        took_s = time.monotonic() - began
        if took_s > PERIOD_S + STALL_S:
            seen.append((began_s, began_s + took_s))
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
