"""The sampler of previews, as a preset states it for programs that draw with it: DPM-Solver++ 2M.

Source: Lu et al. 2022, https://arxiv.org/abs/2211.01095
"""

from __future__ import annotations

from typing import Any

SAMPLER = "DPM++ 2M"  # as A1111 calls it
CLASS = "DPMSolverMultistepScheduler"  # of diffusers
SETTINGS: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "trailing",
    "final_sigmas_type": "zero",
    "steps_offset": 1,  # without any effect here; diffusers complains of another one
}
