"""The headers of a .pth file as `torch.save` writes it: a zip archive of stored entries around one pickle.

Nothing is unpickled into live objects here. `torch.load(weights_only=True)` keeps code from running but still makes,
say, a bytearray of any size a 100-byte file asks for, and maps whole files. So the pickle is run here with the few
operations and names a dict of tensors needs, which give inert records; tensor data is read later, by offset. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from llama_dist.checkpoint.check import name_some
from llama_dist.checkpoint.files import File
from llama_dist.checkpoint.stored import BF16, F16, F32, Stored
from llama_dist.errors import CheckpointError

MAX_PICKLE = 2**19
"""Bytes of data.pkl that are worth running: a thousand tensors take some 200 KB."""
MAX_DIRECTORY = 4 * 2**20
"""Bytes of the zip's central directory, for the same reason."""
_ENCODINGS = {"FloatStorage": F32, "HalfStorage": F16, "BFloat16Storage": BF16}
_END, _END64 = 22, 56


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Other:
    """Something of torch's that is no plain tensor, by its name; inert, as it may be an entry that nobody asks for."""

    name: str

    def __call__(self, *arguments: object) -> _Other:
        return self


def read_pth_header(file: File) -> dict[str, Stored]:
    """Every entry of the pickled dict, as tensors in the file; what is no plain dense tensor has no encoding.

    Raises CheckpointError for what is no zip, is truncated, compressed, or asks for anything but tensors.
    """
    entries = _zip_entries(file)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{file.path}: no data.pkl in it, so it was not written by torch.save")
    root = pickles[0][: -len("data.pkl")]
    _check_byte_order(file, entries.get(root + "byteorder"))
    offset, size = entries[pickles[0]]
    if size > MAX_PICKLE:
        raise CheckpointError(f"{file.path}: data.pkl has {size} bytes, at most {MAX_PICKLE} are read")
    content = _unpickle(file, file.read(offset, size))
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file.path} holds a {type(content).__name__}, must be a dict of tensors by name")
    return {name: _stored(file, entries, root, name, value) for name, value in content.items()}


def _zip_entries(file: File) -> dict[str, tuple[int, int]]:
    """Offset and size of each entry's bytes. All must be stored as they are and lie in the file."""
    _bound_directory(file)
    try:
        with open(file.path, "rb") as handle, zipfile.ZipFile(handle) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file.path}: damaged zip archive ({' '.join(str(error).split())[:80]})") from None
    entries = {}
    for info in infos:
        name = name_some([info.filename])
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(f"{file.path}: entry {name} is compressed or encrypted, torch.save stores as it is")
        local = file.read(info.header_offset, 30)
        if local[:4] != b"PK\3\4":
            raise CheckpointError(f"{file.path}: entry {name} has no header where the archive says: damaged")
        begin = (
            info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )
        if begin + info.file_size > file.size:
            raise CheckpointError(f"{file.path}: entry {name} ends beyond the file: truncated, fetch it again")
        entries[info.filename] = (begin, info.file_size)
    return entries


def _bound_directory(file: File) -> None:
    """`zipfile` makes an object of every entry the directory lists: look first how long that list is."""
    if file.size < 4 or file.read(0, 4) != b"PK\3\4":
        raise CheckpointError(f"{file.path} is no zip archive: truncated, or saved by torch before 1.6 (save it again)")
    end = file.read(file.size - _END, _END) if file.size >= _END else b""
    if end[:4] != b"PK\5\6":
        raise CheckpointError(f"{file.path} has no zip directory at its end: truncated, fetch it again")
    size = int.from_bytes(end[12:16], "little")
    if size == 2**32 - 1:
        # Above 4 GiB torch writes the 64-bit record and its locator (20 bytes) in front of the end record.
        far = file.read(file.size - _END - 20 - _END64, _END64)
        size = int.from_bytes(far[40:48], "little")
    if size > MAX_DIRECTORY:
        raise CheckpointError(f"{file.path}: its zip directory has {size} bytes, at most {MAX_DIRECTORY} are read")


def _check_byte_order(file: File, entry: tuple[int, int] | None) -> None:
    if entry is not None and file.read(entry[0], min(entry[1], 16)) != b"little":
        raise CheckpointError(f"{file.path} was saved on a big-endian machine, which is not supported")


_OPERATIONS = (
    "PROTO MARK STOP GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET"
)
"""What pickle protocol 2 writes. Others copy what is on the stack, or take memory before there are bytes to fill it."""


class _Unpickler(pickle._Unpickler):
    """The interpreter written in Python: the one in C takes memory for any memo index a file names."""

    stack: list[object]

    def load_build(self) -> None:
        """Drop the state: here it can only be the `_metadata` of a state dict."""
        self.stack.pop()

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPERATIONS.split()
    }
    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" or module.startswith("torch."):
            return _Other(f"{module}.{name}")
        raise pickle.UnpicklingError(f"it asks for {name_some([f'{module}.{name}'])}, which no file of tensors needs")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        if not isinstance(kind, _Other) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage has no type or key")
        return _Storage(kind.name.rsplit(".", 1)[-1], key)


def _ordered_dict() -> dict[str, object]:
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: object) -> _Tensor | _Other:
    if not isinstance(storage, _Storage):
        return _Other("a tensor without storage")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride) or len(shape) > 8:
        raise pickle.UnpicklingError("a tensor has a shape or stride that is none")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor has a size, stride or offset out of range")
    return _Tensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


_KNOWN: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _unpickle(file: File, data: bytes) -> object:
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:160]
    except Exception:  # what a wrong operation, an empty stack or a wrong type raise
        reason = "it is damaged, or does what no file of tensors needs"
    raise CheckpointError(f"{file.path}: data.pkl is refused: {reason}")


def _stored(file: File, entries: dict[str, tuple[int, int]], root: str, name: str, value: object) -> Stored:
    where = f"{file.path}: tensor {name_some([name])}"
    if not isinstance(value, _Tensor):
        kind = value.name if isinstance(value, _Other) else type(value).__name__
        return Stored(file, 0, (), kind[:80], None)
    storage = value.storage
    encoding = _ENCODINGS.get(storage.kind)
    if encoding is None:
        return Stored(file, 0, value.shape, storage.kind[:80], None)
    if f"{root}data/{storage.key}" not in entries:
        raise CheckpointError(f"{where}: its storage {name_some([storage.key])} is not in the archive")
    begin, size = entries[f"{root}data/{storage.key}"]
    dense = [math.prod(value.shape[i + 1 :]) for i in range(len(value.shape))]
    if any(n > 1 and have != want for n, have, want in zip(value.shape, value.stride, dense, strict=True)):
        raise CheckpointError(f"{where} is not contiguous: shape {list(value.shape)}, strides {list(value.stride)}")
    item = encoding.block_bytes
    if (value.offset + math.prod(value.shape)) * item > size:
        raise CheckpointError(f"{where}: shape {list(value.shape)} is more than its storage of {size} bytes")
    return Stored(file, begin + value.offset * item, value.shape, encoding.name, encoding)
