"""An adapter as a file: B, and in place of A what A is drawn from.

`adapter.safetensors` has a header (see `header`) and the tensors `<path>.B` [M, R] of each layer, `<path>.bias` [M]
where the adapter trains it, `<path>.past` [times refreshed, M, R], and the parameters of further modules by their own
names. `<path>.A` [R, N] is there only where no seed gives it: A from batches, from the weights or from elsewhere, or
trained. It is one file, so that it is replaced whole: a kill or a full disk leaves the one before.

Reading draws A again and compares hashes: an A that another version of torch draws otherwise is refused, not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa import merging
from llmsys.lorafa.adapters import changeable, check_name, having, names, plain, set_adapter
from llmsys.lorafa.config import LoRAFAConfig
from llmsys.lorafa.header import Header, Layer, digest, key, parse
from llmsys.lorafa.injection import attach
from llmsys.lorafa.layer import Adapted, Adapter
from llmsys.lorafa.targets import shape

FILE = "adapter.safetensors"
META = "adapter"
CONTENTS = "contents"
"""Keys of the file's metadata: the header, and a hash of all tensors."""
FREE = ("recompute", "targets")
"""Fields of the configuration that may differ between a file and the adapter it is loaded into."""


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    name: str = "default",
    *,
    modules: Sequence[str] = (),
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes the adapter `name` as `folder/adapter.safetensors`, whole or not at all; returns the file's path.

    `modules`: paths of modules whose parameters were trained in full and are saved too; the model has one of each,
    whichever adapter is active, so an adapter with `modules` stands alone and these outlast it. `state`: whole tensors
    by the names of the model's parameters, for an engine that has cut them over ranks; others are read from the model.
    Of several ranks, one calls. ValueError for an A that is no longer what was drawn, and for tensors cut over ranks;
    OSError for a full disk.
    """
    from llmsys import tensors

    file = Path(folder) / FILE
    header, contents = pack(model, name, modules=modules, state=state)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors.replace(contents, file, {META: header.text(), CONTENTS: fingerprint(contents)})
    return file


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> nn.Module:
    """The adapter of a folder, as `name`, in place; it is then the active one. Returns `model`.

    Into a model without that adapter: layers are adapted as the file says. Into one that has it, in the same shape: its
    tensors get the file's values, and an optimizer's references stay good. What a refreshed adapter has merged is
    merged again. Further `modules` of the file, frozen with the base otherwise, can be trained on; they are the
    model's, so disabling or deleting the adapter leaves them as loaded, and beside another adapter they are refused.

    Nothing has changed when ValueError is raised: for a file that is missing, damaged or of another format, a model
    whose layers are others, an adapter of that name in another shape, an A that is not the file's, and a model that is
    merged, on the meta device, cut over ranks, or (unless that adapter is active already) wrapped in DDP. Nor has it
    when there is no memory for the adapter.
    """
    header, contents = read(Path(folder) / FILE)
    return unpack(model, header, contents, name)


def pack(
    model: nn.Module,
    name: str = "default",
    *,
    modules: Sequence[str] = (),
    state: Mapping[str, Tensor] | None = None,
) -> tuple[Header, dict[str, Tensor]]:
    """What `save_adapter` writes; see there. The tensors are the model's own, not copies."""
    model = plain(model)
    layers = having(model, name)
    first = _first(layers, name)
    contents: dict[str, Tensor] = {}
    described: dict[str, Layer] = {}
    for path, layer in layers.items():
        adapter: Adapter = layer.adapters[name]
        own = digest(adapter, path) if first[path] == path else ""
        described[path] = Layer(shape(layer), first[path], own, adapter.bias is not None)
        for what in ("A", "B", "bias"):
            tensor = getattr(adapter, what, None)
            if tensor is not None and not (what == "A" and adapter.seeded):
                contents[key(path, what)] = _whole(key(path, f"adapters.{name}.{what}"), tensor, state)
        if adapter.past:
            contents[key(path, "past")] = torch.stack(adapter.past)
    for path in modules:
        module = _module(model, path)
        if any(isinstance(part, Adapted) for part in module.modules()):
            raise ValueError(f"modules={path}: has adapters itself; name what was trained in full")
        for what, parameter in module.named_parameters():
            contents[f"{path}.{what}"] = _whole(f"{path}.{what}", parameter, state)
    some = next(iter(layers.values())).adapters[name]
    header = Header(where=name, config=some.config, layers=described, refreshed=len(some.past), modules=tuple(modules))
    return header, contents


def read(file: Path) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and tensors, on the host. ValueError, naming it: missing, damaged, or of another format."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{file}: no such file; save_adapter writes one, and from_peft reads those of peft")
    try:
        with safe_open(file, framework="pt") as opened:
            meta = opened.metadata() or {}
            contents = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged: {error}") from error
    header = parse(meta.get(META, "{}"), str(file))
    if meta.get(CONTENTS) != fingerprint(contents):
        raise ValueError(f"{file}: damaged: its tensors are not those that were saved")
    return header, contents


def fingerprint(contents: Mapping[str, Tensor]) -> str:
    """A hash of tensors by name, of their dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(contents.items()):
        whole = tensor.detach().cpu().contiguous()
        found.update(f"{name}/{whole.dtype}/{tuple(whole.shape)}/".encode())
        found.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def unpack(model: nn.Module, header: Header, contents: Mapping[str, Tensor], name: str) -> nn.Module:
    """What `load_adapter` does with a file's header and tensors; see there."""
    inner = plain(model)
    layers = header.fitting(inner)
    header.check(contents, inner)
    _check_writable(inner, layers, header.modules, name)
    matrices = header.matrices(contents)
    if name in names(inner):
        _check_same(having(inner, name), name, header, contents)
        changeable(inner, "load_adapter")
        if any(layer.active != name for layer in layers.values()):
            set_adapter(model, name)
    else:
        check_name(inner, name)
        changeable(model, "load_adapter")
        if header.modules and names(inner):
            raise ValueError(
                f"{header.where}: brings {', '.join(header.modules)} of its own, and a model has one of each for all "
                f"adapters: load it into another copy of the base, delete_adapter {', '.join(names(inner))} first, or "
                "save it without `modules`"
            )
        if header.refreshed:
            merging.refuse_unmergeable(inner, layers, "load_adapter")
            if names(inner):
                raise ValueError(f"{header.where}: was refreshed, which would change what other adapters stand beside")
        first = {path: layer.first for path, layer in header.layers.items()}
        biases = {path: contents[key(path, "bias")] for path, layer in header.layers.items() if layer.bias}
        attach(inner, header.config, name, first, matrices, biases)
        _replay(layers, header, contents, name)
        for path in header.modules:
            _module(inner, path).requires_grad_(True)
    for path, layer in layers.items():
        adapter = layer.adapters[name]
        for what in ("A", "B", "bias"):
            if key(path, what) in contents:
                getattr(adapter, what).copy_(contents[key(path, what)])
    for layer in layers.values():
        layer.adapters[name].follow()
    for path in header.modules:
        for what, parameter in _module(inner, path).named_parameters():
            parameter.copy_(contents[f"{path}.{what}"])
    return model


def _replay(layers: Mapping[str, Any], header: Header, contents: Mapping[str, Tensor], name: str) -> None:
    """Merges what a refreshed adapter had merged, draw by draw, in place; A is the last draw then."""
    for epoch in range(header.refreshed):
        for path, layer in layers.items():
            adapter: Adapter = layer.adapters[name]
            adapter.redraw(epoch)
            adapter.B.copy_(contents[key(path, "past")][epoch])
            merging.add(layer, adapter.delta())
            adapter.past.append(contents[key(path, "past")][epoch].clone())
    for layer in layers.values() if header.refreshed else ():
        layer.adapters[name].redraw(header.refreshed)


def _check_writable(model: nn.Module, layers: Mapping[str, Any], modules: Sequence[str], name: str) -> None:
    """ValueError where the values of a file cannot be written into the model as it is now."""
    targets = {path: layer.weight for path, layer in layers.items()}
    targets |= {f"{path}.{what}": p for path in modules for what, p in _module(model, path).named_parameters()}
    for path, tensor in targets.items():
        if tensor.is_meta:
            raise ValueError(f"load_adapter: {path} is on the meta device, which holds nothing; load the weights first")
    written = {path: targets[path] for path in targets if path not in layers}
    for path, layer in layers.items():
        there = layer.adapters[name].named_parameters() if name in getattr(layer, "adapters", ()) else ()
        written |= {key(path, f"adapters.{name}.{what}"): parameter for what, parameter in there}
    for path, tensor in written.items():
        if merging.is_cut(tensor):
            raise ValueError(
                f"load_adapter: {path} is cut over ranks, which no file is; load it before the engine does"
            )


def _check_same(layers: Mapping[str, Any], name: str, header: Header, contents: Mapping[str, Tensor]) -> None:
    """ValueError where a model's adapter is not of the file's shape, or has another past."""
    where = header.where
    if _first(layers, name) != {path: layer.first for path, layer in header.layers.items()}:
        raise ValueError(f"name={name}: is beside other layers than {where}; load that under another name")
    own: LoRAFAConfig = next(iter(layers.values())).adapters[name].config
    compared = [field.name for field in fields(own) if field.name not in FREE]
    odd = [field for field in compared if getattr(own, field) != getattr(header.config, field)]
    if odd:
        raise ValueError(f"name={name}: has another {odd[0]} than {where}; load that under another name")
    for path, layer in layers.items():
        adapter = layer.adapters[name]
        past = [] if not header.refreshed else list(contents[key(path, "past")])
        if len(past) != len(adapter.past) or not all(map(torch.equal, past, adapter.past)):
            raise ValueError(f"name={name}: was refreshed otherwise than {where}; load that beside the base model")


def _first(layers: Mapping[str, Any], name: str) -> dict[str, str]:
    """Path -> path of the layer whose A it uses."""
    homes = {id(layer.adapters[name]): path for path, layer in layers.items()}
    return {path: homes[id(layer.adapters[name].owner)] for path, layer in layers.items()}


def _whole(name: str, tensor: Tensor, state: Mapping[str, Tensor] | None) -> Tensor:
    found = tensor if state is None else state.get(name, tensor)
    if merging.is_cut(found):
        raise ValueError(f"{name}: is cut over ranks; gather it and pass it in `state`")
    return found


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"modules={path}: this model has no such module") from error
