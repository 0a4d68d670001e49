"""Threads that load snapshots at once: what is the process's stays as it was."""

import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tightrec.snapshot.layers import StoredLayer, make_layer, store_layer

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
pytestmark = pytest.mark.skipif(not FBGEMM, reason="fbgemm's operators need an x86-64 processor with AVX2")


def made_and_run(stored: StoredLayer, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return make_layer(stored, relu=False, device=torch.device("cpu"))(x)


def test_threads_that_make_layers_leave_the_engine_and_the_warnings_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slowly(real: Any) -> Any:
        def called(*arguments: Any) -> Any:
            time.sleep(2e-3)  # lets other threads run within
            return real(*arguments)

        return called

    monkeypatch.setattr(
        torch.ops.quantized, "linear_prepack", slowly(torch.ops.quantized.linear_prepack), raising=False
    )
    packing = "fbgemm_pack_gemm_matrix_fp16"
    monkeypatch.setattr(torch, packing, slowly(getattr(torch, packing)))
    x, weight, bias = torch.randn(3, 20), torch.randn(10, 20), torch.randn(10)
    cases = [store_layer(weight, bias, kind) for kind in ("int8", "fp16")]
    expected = [made_and_run(stored, x) for stored in cases]
    engine, filters = torch.backends.quantized.engine, list(warnings.filters)
    wrong: list[str] = []

    def work(place: int) -> None:
        for _ in range(10):
            if not torch.equal(made_and_run(cases[place % 2], x), expected[place % 2]):
                wrong.append(cases[place % 2].kind)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for place, thread in enumerate(threads):
        thread.start()
        time.sleep(1e-3 * place)
    for thread in threads:
        thread.join()
    found, left = torch.backends.quantized.engine, list(warnings.filters)
    torch.backends.quantized.engine, warnings.filters[:] = engine, filters
    assert (found, left, wrong) == (engine, filters, [])
