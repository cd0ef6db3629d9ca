"""What the header of a NIfTI file proves about its voxels, so that they need not be read for it."""

import struct
import zlib
from pathlib import Path

_HEADER = 352  # bytes of a NIfTI-1 header with its extension flag
_BYTES = {2: 1, 4: 2, 8: 4, 256: 1, 512: 2, 768: 4}  # of the integer types, by their code


def holds_whole_integers(path: Path) -> bool:
    """Return whether a NIfTI-1 file is complete and holds integers: no voxel is missing, NaN or Inf.

    False where reading it has to tell: floating-point or scaled voxels, another format, or a size that does not fit.

    Parameters
    ----------
    path : Path
        `.nii` or `.nii.gz`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1024)
        if start[:2] == b"\x1f\x8b":
            file.seek(max(0, size - 4))
            size = int.from_bytes(file.read(4), "little")  # gzip ends with the unpacked size
            try:
                start = zlib.decompressobj(wbits=31).decompress(start, _HEADER)
            except zlib.error:
                return False
    if len(start) < _HEADER or start[344:347] != b"n+1":
        return False
    order = "<" if start[:4] == struct.pack("<i", 348) else ">"
    dims = struct.unpack_from(f"{order}8h", start, 40)
    (code,) = struct.unpack_from(f"{order}h", start, 70)
    offset, slope, intercept = struct.unpack_from(f"{order}3f", start, 108)
    plain = (slope in (0, 1) and intercept == 0) or slope != slope  # not a number: not scaled
    if code not in _BYTES or not plain or not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        return False
    voxels = 1
    for n in dims[1 : dims[0] + 1]:
        voxels *= n
    return size == int(offset) + voxels * _BYTES[code]
