"""What `run_train.sh` starts where there is more than one process: a check of the job, then torchrun.

    WORLD_SIZE=4 python -m titan_fp8.launch OPTIONS_OF_TORCHRUN -- OPTIONS_OF_THE_TRAINER

A mistake is answered once, before there is a process group, and no launcher's trace buries it. The check takes seconds,
most of them for the import of what builds a model; torchrun, whose own import takes seconds too, is imported meanwhile.
"""

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

from titan_fp8.train import INTERRUPTED

TORCHRUN, TRAINER = "torch.distributed.run", "titan_fp8.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Check and launch. WORLD_SIZE is that of the job, all nodes together. The exit code of a check that finds
    something is that of the command, and torchrun's otherwise."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--")
    of_torchrun, options = arguments[:end], arguments[end + 1 :]
    check = subprocess.Popen([sys.executable, "-m", "titan_fp8.cli.main", "check", *options])
    threading.Thread(target=importlib.import_module, args=[TORCHRUN], daemon=True).start()
    try:
        code = check.wait()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code:
        check.kill()  # which an interrupt may have reached here alone
        os._exit(code if code > 0 else 128 - code)  # the import goes on, and nothing is to be said about its end
    del os.environ["WORLD_SIZE"]  # torchrun tells its processes theirs
    importlib.import_module(TORCHRUN).main([*of_torchrun, "-m", TRAINER, *options])
    return 0


if __name__ == "__main__":
    sys.exit(main())
