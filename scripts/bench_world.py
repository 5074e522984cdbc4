"""How many toybox scenes one core draws a second: 64 px, one to three references a subject, as training draws them.

python scripts/bench_world.py
python scripts/bench_world.py --size 256 --scenes 200

Prints one line. Seconds of processor time are counted, so that another program on the machine disturbs little; the
first scenes, which decode the cut-outs, are drawn before the clock starts.
"""

from __future__ import annotations

import argparse
import time

import cv2

from data_pipeline.machine import processor_name
from data_pipeline.toybox.world import ToyboxWorld

WARM_UP = 500  # scenes
FAR = 10**9  # index of the first warm-up scene: none of those that are timed


def scenes_per_second(size: int, scenes: int, rounds: int) -> float:
    """The best of `rounds` rounds of `scenes` new scenes each, on one core."""
    cv2.setNumThreads(1)
    world = ToyboxWorld(size=size, reference_size=size)
    for index in range(WARM_UP):
        world.scene(FAR + index)
    best = 0.0
    for number in range(rounds):
        start = time.process_time()
        for index in range(number * scenes, (number + 1) * scenes):
            world.scene(index)
        best = max(best, scenes / (time.process_time() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the scenes and references in pixels")
    parser.add_argument("--scenes", type=int, default=500, help="scenes a round")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    speed = scenes_per_second(arguments.size, arguments.scenes, arguments.rounds)
    print(f"{speed:.0f} scenes/s on one core at {arguments.size} px with 1-3 references each; {processor_name()}")


if __name__ == "__main__":
    main()
