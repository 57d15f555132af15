# SPDX-License-Identifier: Apache-2.0
"""Does in a test guest what the test asks for, on the standard input and output.

A request is a line of JSON, [module, function, arguments]; so is its answer, which has
either a "result" or an "error". The functions are those of the modules beside this one.
"""

import importlib
import json
import os
import subprocess
import sys
import time


def sh(command: str) -> str:
    """Run a shell command that must succeed: its output."""
    done = subprocess.run(
        ["/bin/sh", "-euc", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def settle(now: float) -> None:
    """Go on in another machine: at its time, with its devices."""
    time.clock_settime(time.CLOCK_REALTIME, now)
    with open("/sys/bus/pci/rescan", "w") as rescan:
        rescan.write("1")


def answer(request: str) -> dict[str, object]:
    """Call the function that a request names."""
    try:
        module, name, arguments = json.loads(request)
        function = getattr(importlib.import_module(module), name)
        return {"result": function(*arguments)}
    except Exception:
        import traceback  # with all that it imports it takes a guest half a second

        return {"error": traceback.format_exc()}


def main() -> None:
    """Answer until the input ends. The functions' output goes to the console."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        print(json.dumps({"result": "ready"}), file=answers)
        for request in sys.stdin:
            print(json.dumps(answer(request)), file=answers)


if __name__ == "__main__":
    main()
