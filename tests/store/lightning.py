"""Checkpoints as PyTorch-Lightning leaves them: their pickles name classes that are not installed here."""

import argparse
import enum
import pathlib
import sys
import types
import typing
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASSES = {
    "pytorch_lightning.callbacks.model_checkpoint": ("ModelCheckpoint",),
    "pytorch_lightning.callbacks.early_stopping": ("EarlyStopping",),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.nodes": ("AnyNode",),
    "ldm.lr_scheduler": ("LambdaLinearScheduler",),
}
"""Classes whose objects are pickled as a name and a state."""


@contextmanager
def installed() -> Iterator[dict[str, Any]]:
    """Stand-ins for the trainer's classes by name, importable while they are pickled and never after."""
    made: dict[str, Any] = {name: type(name, (), {"__module__": at}) for at, names in CLASSES.items() for name in names}
    parsing, states = "pytorch_lightning.utilities.parsing", "pytorch_lightning.trainer.states"
    made["AttributeDict"] = type("AttributeDict", (dict,), {"__module__": parsing})
    made["TrainerFn"] = enum.Enum("TrainerFn", {"FITTING": "fit"}, module=states)
    modules: dict[str, types.ModuleType] = {}
    for name, cls in made.items():
        parts = cls.__module__.split(".")
        for count in range(1, len(parts) + 1):
            path = ".".join(parts[:count])
            modules.setdefault(path, types.ModuleType(path))
        setattr(modules[cls.__module__], name, cls)
    assert not modules.keys() & sys.modules.keys()
    sys.modules.update(modules)
    try:
        yield made
    finally:
        for path in modules:
            del sys.modules[path]


def save_lightning(path: pathlib.Path, state: Mapping[str, Tensor], older: bool = False, protocol: int = 2) -> None:
    """Saves a state dict within all that a trainer saves beside it."""
    with installed() as classes:
        content = _content(classes, state)
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not older)


def _object(cls: type, **attributes: object) -> object:
    value = cls()
    vars(value).update(attributes)
    return value


def _content(classes: Mapping[str, type], state: Mapping[str, Tensor]) -> dict[str, object]:
    first = next(iter(state.values()))
    metadata = _object(
        classes["ContainerMetadata"],
        ref_type=typing.Any,
        object_type=dict,
        element_type=dict[str, typing.Any],
        key_type=typing.Dict[str, typing.Any],  # noqa: UP006 - the older alias is pickled by a call of getitem
    )
    node = _object(classes["AnyNode"], _val=4.5e-6, _metadata=_object(classes["Metadata"], ref_type=typing.Any))
    config = _object(classes["DictConfig"], _metadata=metadata, _content={"lr": node}, _flags_cache=None)
    widths = _object(classes["ListConfig"], _metadata=metadata, _content=[1, 2, 4, 4], _parent=config)
    weights: OrderedDict[str, Tensor] = OrderedDict(state)
    vars(weights)["_metadata"] = OrderedDict({"": {"version": 1}})  # as Module.state_dict() leaves it
    return {
        "epoch": 12,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": weights,
        "callbacks": {
            classes["ModelCheckpoint"]: {"best_model_score": first.sum(), "dirpath": pathlib.PurePosixPath("/logs")},
            "EarlyStopping{}": _object(classes["EarlyStopping"], patience=3),
        },
        "optimizer_states": [
            {
                "state": {0: {"step": 7, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}},
                "param_groups": [{"lr": np.float64(4.5e-6), "betas": (0.5, 0.9), "params": [0]}],
            }
        ],
        "lr_schedulers": [
            {"base_lrs": [1.0], "lr_lambdas": [_object(classes["LambdaLinearScheduler"], f_max=[1.0])], "steps": set()}
        ],
        "loops": {"fit_loop": {"state_dict": {}, "status": classes["TrainerFn"]("fit")}},
        "hyper_parameters": classes["AttributeDict"](ddconfig=config, ch_mult=widths, device=torch.device("cpu")),
        "rng": {"numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state(), "seen": b"\xff\x00"},
        "args": argparse.Namespace(size=torch.Size((3, 4)), dtype=torch.float16, more=defaultdict(list, a=[1])),
    }
