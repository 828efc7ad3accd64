"""A reward worker whose data sets do what the answer tells them to: everything that a verifier must not do."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from services.rollout import reward_worker
from shared.data.dataset import Row


class Mischief:
    """Judges by obeying: the answer names the misdeed; a number is the score itself."""

    def row(self, index: int) -> Row:
        return Row([], "42", None, index)

    def score(self, index: int, answer: str) -> float:
        match answer:
            case "hang":
                while True:
                    pass
            case "hang with a child":
                if os.fork() == 0:
                    Path(os.environ["MISCHIEF_CHILD"]).write_text(str(os.getpid()))
                while True:
                    pass
            case "leave a child and die":
                if os.fork() == 0:
                    while True:
                        pass
                os._exit(7)
            case "eat":
                return float(len(bytearray(1 << 40)))
            case "raise":
                raise ValueError("no such luck")
            case "exit":
                sys.exit(0)
            case "die":
                os._exit(7)
            case "garbage":
                for name in os.listdir("/proc/self/fd"):
                    if int(name) > 2 and os.path.exists(f"/proc/self/fd/{name}"):
                        with suppress(OSError):  # the pipe that is read from
                            os.write(int(name), b"\xff" * 64)
                return 1.0
            case "chatter":
                print("a verifier may print", flush=True)
                os.write(1, b"\xff\xff\xff\xff even past Python")
                return 1.0
            case "pid":
                return float(os.getpid())
            case _:
                return float(answer)


if __name__ == "__main__":
    if os.environ.get("MISCHIEF_START") == "slow":
        while True:
            pass
    if os.environ.get("MISCHIEF_START") == "die":
        os._exit(9)
    if os.environ.get("MISCHIEF_START") == "die when handed a task":
        once = os.environ.get("MISCHIEF_ONCE")
        if once is None or not os.path.exists(once):
            reward_worker.Worker.judge = lambda self, task: (once and Path(once).touch(), os._exit(8))
    reward_worker.open_dataset = lambda name, table: Mischief()
    sys.exit(reward_worker.main())
