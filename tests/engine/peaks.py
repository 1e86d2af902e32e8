"""Peaks of resident memory of runs, each in a process that is forked from this one: imports are paid for once.

    python peaks.py FILE        FILE holds JSON: a list of [recipe, memory or null, out]; prints a list of
                                [plan's need of one thread, peak, "" or what was refused] in bytes

Not a test: run by test_memory_bounds.py, because a fork of a test process would bring its memory along.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    import torch
    from helpers import plan

    import surgery.engine.run as engine
    from surgery.engine.price import peak_memory
    from surgery.errors import Refused

    torch.set_num_threads(1)
    for path, memory, out in json.loads(Path(sys.argv[1]).read_text()):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            made, said = plan(path), ""
            needs = peak_memory(made.price, len(made.programs), 1)
            bound = {"needed": needs, "less": needs - 1}.get(memory, memory)
            try:
                engine.run(made, out, memory=bound, threads=1)
            except Refused as refused:
                said = refused.message
            os.write(write, json.dumps([needs, engine.peak_resident(), said]).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as told:
            print(told.read(), flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
