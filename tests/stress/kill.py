"""Kills an experiment again and again, and compares what it ends with to the bit.

    python tests/stress/kill.py --kills=200

tests/experiments/test_survival.py does it 20 times.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# A script's path is its own folder.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

from killing import FLAGS, PROGRAM, kill
from programs import Server

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Prints how many kills there were, and how many of them inside a save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    count = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        server = Server(folder, environment)
        for run in ("compiled_first", "whole"):
            start = time.monotonic()
            assert server.run(*FLAGS, f"--workdir={folder / run}", code=PROGRAM).code == 0
        seconds = time.monotonic() - start
        print(kill(server, folder / "killed", count, folder / "whole", seconds))
        server.stop()


if __name__ == "__main__":
    main()
