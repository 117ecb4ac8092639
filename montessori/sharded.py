"""The optimizer in a directory of `torch.distributed.checkpoint`, such as FSDP leaves with sharded states.

`.metadata` says which piece of which tensor lies where in the `.distcp` files. It is a pickle, so it is read with a
list of the few classes that it can hold, and the pieces with `weights_only=True`: nothing in the files can run.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from montessori.errors import StateError
from montessori.wording import first_line

_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): dict,
    # The second is where Python 3.13 keeps them.
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    },
}


def read_distributed(file: Path) -> dict:
    """`state` and `param_groups` as a torch optimizer's state dict, parameters by name, tensors whole on the CPU.

    `file` is the `.metadata` beside the pieces. The optimizer may stand under any key, alone or beside a model whose
    tensors are not read, nested or flattened as `torch.distributed.checkpoint.state_dict` writes it.

    Raises StateError for anything else.
    """
    index, directory = _metadata(file), file.parent
    placed = {key: _place(tuple(path)) for key, path in (index.planner_data or {}).items()}
    places = {key: place for key, place in placed.items() if place is not None and key in index.state_dict_metadata}
    roots = {place.root for place in places.values() if place.kind == "param_groups"}
    if len(roots) != 1:
        found = ", ".join(sorted("/".join(map(str, root)) for root in roots))
        raise StateError(
            f"{directory}: expected one optimizer, as torch.distributed.checkpoint.save writes what "
            f"get_optimizer_state_dict returns, got {found or 'none'}"
        )
    tables: dict[str, dict] = {"state": {}, "param_groups": {}}
    for key, place in places.items():
        if place.root in roots:
            tables[place.kind].setdefault(place.owner, {})[place.label] = _value(directory, index, key)
    groups = tables["param_groups"].items()
    return {"state": tables["state"], "param_groups": [{"params": [owner]} | group for owner, group in groups]}


class _Place(NamedTuple):
    root: tuple
    kind: str
    owner: int | str
    label: str


def _place(path: tuple) -> _Place | None:
    """Where a value belongs, None if not in an optimizer: the owner is a parameter of `state`, or a param group."""
    if len(path) > 2 and path[-3] in ("state", "param_groups"):
        return _Place(path[:-3], *path[-3:])
    kind, _, rest = str(path[-1]).partition(".")
    owner, _, label = rest.rpartition(".")
    return _Place(path[:-1], kind, owner, label) if kind in ("state", "param_groups") and owner else None


def _value(directory: Path, index: Metadata, key: str) -> object:
    entry = index.state_dict_metadata[key]
    if isinstance(entry, BytesStorageMetadata):
        return _piece(directory, index, MetadataIndex(key))
    if not isinstance(entry, TensorStorageMetadata):
        raise StateError(f"{directory}: expected {key} to be a tensor or a value, got {type(entry).__name__}")
    whole, written = torch.empty(entry.size, dtype=entry.properties.dtype), 0
    for chunk in entry.chunks:
        piece = _piece(directory, index, MetadataIndex(key, chunk.offsets))
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes:
            got = list(piece.shape) if isinstance(piece, Tensor) else type(piece).__name__
            raise StateError(f"{directory}: a piece of {key}: expected shape {list(chunk.sizes)}, got {got}")
        part = whole
        for dim, (first, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dim, first, size)
        part.copy_(piece)
        written += piece.numel()
    if written != whole.numel():
        raise StateError(f"{directory}: {key}: expected {whole.numel()} values, its pieces have {written}")
    return whole


def _piece(directory: Path, index: Metadata, where: MetadataIndex) -> object:
    stored = index.storage_data.get(where)
    if stored is None:
        raise StateError(f"{directory}: {where.fqn} is listed but not stored: the save was cut short")
    if getattr(stored, "transform_descriptors", None):
        raise StateError(f"{directory}: {where.fqn} is stored compressed, which is not supported: save it plain")
    file = directory / stored.relative_path
    if file.resolve().parent != directory.resolve():
        raise StateError(f"{directory}: {stored.relative_path} is outside of the checkpoint: not read")
    # A damaged file makes the reader raise almost anything.
    try:
        with file.open("rb") as stream:
            stream.seek(stored.offset)
            content = io.BytesIO(stream.read(stored.length))
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        raise StateError(
            f"{file}: {where.fqn} cannot be read as plain tensors ({first_line(error)}): save it again"
        ) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        try:
            return _CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there") from None


def _metadata(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            index = _Unpickler(stream).load()
    except Exception as error:
        raise StateError(
            f"{file}: cannot be read as the index of a distributed checkpoint ({first_line(error)})"
        ) from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise StateError(f"{file}: expected the index of a distributed checkpoint, got {type(index).__name__}")
    return index
