"""Runs examples one after the other in the processes that torchrun starts: importing takes longer than they do.

    torchrun --nproc-per-node 2 examples_in_turn.py '[["sft.py", "--coat", "lean", ...], ...]'

The first process prints a line ``>>> sft.py`` before each, to both of its outputs.
"""

import json
import os
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def main(commands):
    sys.path.insert(0, str(EXAMPLES))
    for script, *options in commands:
        if os.environ["RANK"] == "0":
            for output in (sys.stdout, sys.stderr):
                output.write(f">>> {script}\n")
                output.flush()
        sys.argv = [script, *options]
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
