"""What installing does beside copying: where there is a C compiler, the kernel is compiled."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):
    """Compiles the C of `sdforge/kernel/` into the package; without a compiler the package is pure Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 -- hatchling's interface
        place = Path(self.root, "sdforge", "kernel", "build.py")
        spec = importlib.util.spec_from_file_location("build_kernel", place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if reason := module.build():
            self.app.display_warning(f"the kernel is not compiled ({reason}): torch computes the same bytes, slower")
            return
        build_data["artifacts"].append(str(module.LIBRARY.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
