"""Criteo's click logs: tab-separated label, 13 integers and 26 categories, in two streaming passes.

The first pass counts the ids of the rows to train on, the second writes the parts. Each is cut into pieces
of text that threads work on side by side and that are finished, and journalled, in order.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import sched_getaffinity
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console

from tightrec.trainer.data.prepare import inputs, numbering
from tightrec.trainer.data.prepare.common import PrepareSettings, check_shares, publish, write_part
from tightrec.trainer.data.prepare.inputs import Piece, Position
from tightrec.trainer.data.prepare.lines import CATEGORIES, INTEGERS, NAMES, Rows, parse
from tightrec.trainer.data.prepare.progress import Meter
from tightrec.trainer.data.prepare.rejects import ErrorMode, Faults, Reject, Tally
from tightrec.trainer.data.prepare.vocabulary import Choice, Run, RunCounter, count_run, merged, spilled_runs
from tightrec.trainer.data.prepare.work import Stage, Work
from tightrec.trainer.data.schema import SPLITS, Schema, SparseColumn

PATTERNS = ("*.tsv", "*.txt", "day_[0-9]", "day_[0-9][0-9]")
