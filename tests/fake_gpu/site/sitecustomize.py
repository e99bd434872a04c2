"""Prepares torch for the stand-in device as soon as a process imports it."""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType


class _AfterTorch(importlib.abc.Loader):
    """Loads torch with its own loader, and then prepares it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        sys.path.append(str(Path(__file__).parents[2]))
        from fake_gpu.host_math import install

        install()


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Finds torch, once; every other module is left to the finders that follow."""

    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterTorch(spec.loader)
        return spec


sys.meta_path.insert(0, _TorchFinder())
