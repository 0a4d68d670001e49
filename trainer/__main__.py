"""``torchrun --standalone --nproc-per-node 2 -m tightrec.trainer [group=choice] [key=value] ...``.

Words are Hydra overrides of ``conf/``. Beside them: ``--help`` lists groups and settings, ``--cfg`` prints
the composed configuration, both without starting anything.
"""

import os
import sys
import time

from tightrec.trainer.versions import require_versions

FINISHED, FAILED, MISTAKEN, INTERRUPTED = 0, 1, 2, 130


def main(words: list[str]) -> int:
    """Parse, build, run and close; returns the exit status.

    0: finished, or stopped by a signal with its state saved. 1: failed. 2: a user's mistake, told in a
    sentence. 130: interrupted at once by a second Ctrl-C.
    """
    try:
        require_versions()
        # Deferred so that a mismatched torch, torchrec and fbgemm are told in words by the line above
        # before a loader fails on them.
        from tightrec.sharding.obituary import ExchangeError
        from tightrec.trainer import checkpoint, config, control, help_text, job

        if "--help" in words or "-h" in words:
            _print_once(help_text.text())
            return FINISHED
        show = "--cfg" in words
        # Hydra's own spelling is `--cfg job`.
        overrides = [word for word in words if not show or word not in ("--cfg", "job")]
        settings, plain = config.load(overrides)
        if show:
            _print_once(config.yaml(plain))
            return FINISHED
    except ValueError as error:
        # The same words on every rank, so one rank a machine prints them. torchrun ends the other ranks as
        # soon as one has failed: they give the words time to get out.
        if _local_rank() == 0:
            _tell(error)
        else:
            time.sleep(5)
        return MISTAKEN
    except (ImportError, OSError) as error:
        print(
            f"error: the versions fit, but a library cannot be loaded: {error}\n"
            "Run `python -m tightrec.trainer.doctor` to see which, or `make distclean setup`.",
            file=sys.stderr,
            flush=True,
        )
        return MISTAKEN
    try:
        if settings.ab.variants:
            from tightrec.trainer.compare.ab import run_all

            return run_all(settings, overrides, job.run)
        return job.run(settings, plain, overrides)
    except (ValueError, control.NotANumber, checkpoint.CheckpointFailed, ExchangeError) as error:
        _tell(error)
        return MISTAKEN if isinstance(error, ValueError) else FAILED
    except KeyboardInterrupt:
        print("interrupted; resume=RUN_FOLDER goes on from the last checkpoint", file=sys.stderr, flush=True)
        return INTERRUPTED


def _tell(error: Exception) -> None:
    """Print the words, and hand them to torchrun, whose closing summary shows them again."""
    words = "\n".join([str(error), *getattr(error, "__notes__", [])])
    print(f"error (rank {os.environ.get('RANK', '0')}): {words}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error.with_traceback(None))


def _print_once(text: str) -> None:
    if _local_rank() == 0:
        print(text)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
