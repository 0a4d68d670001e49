"""Damaged frames that end where memory ends: a decoder that reads past one crashes."""

import ctypes
import mmap
import multiprocessing

import numpy as np
import torch
from codec_jobs import flat_spans, make_blocks
from fuzz_rounds import cases, received_books
from mutations import mutations

from tightrec.kernels import cpu, reference
from tightrec.kernels.job import DecodeJob

FRAMES_OF_A_CASE = 150
PROT_NONE = 0


class Cliff:
    """A buffer whose last byte lies before a page that may not be touched."""

    def __init__(self, room: int) -> None:
        self._pages = -(-room // mmap.PAGESIZE)
        self._memory = mmap.mmap(-1, (self._pages + 1) * mmap.PAGESIZE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        end = ctypes.c_void_p(first + self._pages * mmap.PAGESIZE)
        assert libc.mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0

    def hold(self, data: bytes) -> torch.Tensor:
        """The data as a tensor, uint8, at the very end."""
        start = self._pages * mmap.PAGESIZE - len(data)
        view = np.frombuffer(self._memory, np.uint8, len(data), start)
        view[:] = np.frombuffer(data, np.uint8)
        return torch.from_numpy(view)


def decode_all(beyond: int) -> None:
    """Decode damaged copies of every case, after reading ``beyond`` bytes more than each has."""
    torch.set_num_threads(1)
    found = cases(reference, 5)
    cliff = Cliff(max(len(case.frame) for case in found) + 4096)
    for number, case in enumerate(found):
        spans, count = flat_spans([case.shape])
        blocks, totals = make_blocks(spans)
        out = torch.empty(count, dtype=case.dtype)
        needed = cpu.decode_scratch_bytes(totals, out.element_size())
        scratch = torch.empty(needed, dtype=torch.uint8)
        generator = np.random.default_rng(number)
        damaged = mutations(case.frame, generator, FRAMES_OF_A_CASE, found[number - 1].frame)
        for frame in [case.frame, *damaged]:
            books = received_books(1, case)
            buffer = cliff.hold(frame)
            ctypes.string_at(buffer.data_ptr(), len(frame) + beyond)
            cpu.decode(
                DecodeJob(
                    buffer=buffer,
                    offsets=torch.zeros(1, dtype=torch.int64),
                    sizes=torch.tensor([len(frame)]),
                    blocks=blocks,
                    totals=totals,
                    book_lengths=books.lengths,
                    book_ids=books.ids,
                    out=out,
                    status=torch.zeros(1, dtype=torch.int64),
                    scratch=scratch,
                )
            )


def exit_code(beyond: int) -> int | None:
    """How a process ends that decodes all."""
    process = multiprocessing.get_context("spawn").Process(target=decode_all, args=(beyond,))
    process.start()
    process.join(250)
    return process.exitcode


def test_no_damaged_frame_is_read_past_its_end() -> None:
    assert exit_code(0) == 0


def test_reading_past_the_end_is_noticed() -> None:
    assert exit_code(1) not in (0, None)
