"""``torchrun --standalone --nproc-per-node 2 -m tightrec.trainer [group=choice] [key=value] ...``.

Words are Hydra overrides of ``conf/``. Beside them: ``--help`` lists groups and settings, ``--cfg`` prints
the composed configuration, both without starting anything.
"""

import os
import sys

from tightrec.trainer.versions import require_versions


def main(words: list[str]) -> int:
    """Parse, build, run and close; returns the exit status.

    0: finished, or stopped by SIGTERM with its state saved. 1: failed. 2: a user's mistake, told in a
    sentence. 130: interrupted.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        require_versions()
        # Deferred so that a mismatched torch, torchrec and fbgemm are told in words by the line above
        # before a loader fails on them.
        from tightrec.trainer import config, help_text

        if "--help" in words or "-h" in words:
            print(help_text.text())
            return 0
        show = "--cfg" in words
        overrides = [word for word in words if word not in ("--cfg", "job")]
        job, plain = config.load(overrides)
        if show:
            print(config.yaml(plain))
            return 0
    except ValueError as error:
        # The same words on every rank: one copy is enough.
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    from tightrec.trainer.job import run

    try:
        return run(job, plain, overrides)
    except ValueError as error:
        print(f"error (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"error (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if first:
            print("interrupted; resume=RUN_FOLDER goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
