"""`python -m dstack_sched` is `dstackctl`."""

from dstack_sched.cli import main

main()
