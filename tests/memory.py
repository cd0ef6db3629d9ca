"""Exact peak of what torch's CPU allocator gives out, independent of load and of what the heap keeps."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """Largest number of bytes that calling `fn` had allocated at a time, beyond what was there before.

    Temporaries inside operators count, and so do gradients that `fn` creates. Call `fn` once before, if what only
    the first call makes (optimiser state, gradients of parameters) shall not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = fn()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    changes.sort(key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    held = peak = 0
    for change in changes:
        held += int(change["args"]["Bytes"])
        peak = max(peak, held)
    return peak
