"""Pictures of a MuJoCo simulation without a screen: through EGL or OSMesa, whichever is there, in software or not.

``mujoco.Renderer`` takes its OpenGL platform from an environment variable that is read when mujoco is imported, and an
import under a platform that is not there fails. Stepping must not depend on that, so the context is made here. Two
variables, of MuJoCo and of PyOpenGL, name the platform; they are set while it is made, and no longer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from springhead.errors import BadInput

_PLATFORMS = ("egl", "osmesa")


class Camera:
    """Draws one model. Reads the simulation's state and changes nothing of it.

    Args:
        model: An ``mujoco.MjModel``.
        width: Of a picture, in pixels.
        height: Of a picture, in pixels.
        tracking: Name of the model's camera to look through; None looks down on the whole scene.
        distance: From where it looks down, in metres.

    Raises:
        BadInput: If there is neither EGL nor OSMesa.
    """

    def __init__(self, model: Any, width: int, height: int, tracking: str | None, distance: float = 6.0) -> None:
        self._model = model
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self._gl, self._context = _open(model, width, height)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 1
        self._view = mujoco.MjvCamera()
        if tracking is None:
            self._view.lookat, self._view.distance = [0.0, 0.0, 0.0], distance
            self._view.azimuth, self._view.elevation = 90.0, -60.0
        else:
            self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self._view.fixedcamid = model.camera(tracking).id
        self._area = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), dtype=np.uint8)

    def picture(self, data: Any) -> npt.NDArray[np.uint8]:
        """Returns the present state as a picture.

        Args:
            data: The model's ``mujoco.MjData``.

        Returns:
            uint8 (height, width, 3).
        """
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        mujoco.mjr_render(self._area, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._area, self._context)
        return self._pixels[::-1].copy()  # OpenGL counts rows from below

    def close(self) -> None:
        """Frees the OpenGL context."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def _open(model: Any, width: int, height: int) -> tuple[Any, Any]:
    """Makes an OpenGL context, which is current then, and MuJoCo's own in it, on the first platform that can."""
    problems = []
    for platform in _PLATFORMS:
        loaded = set(sys.modules)
        try:
            with _variables(PYOPENGL_PLATFORM=platform, MUJOCO_GL=platform):
                opened = importlib.import_module(f"mujoco.{platform}").GLContext(width, height)
                opened.make_current()
                return opened, mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # an import error, or whatever a driver says
            problems.append(f"{platform}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        # PyOpenGL settles on the platform that it is imported for; the next one needs it anew.
        for name in [name for name in sys.modules if name not in loaded]:
            if name.partition(".")[0] == "OpenGL" or name.startswith(f"mujoco.{platform}"):
                del sys.modules[name]
    raise BadInput(
        f"MuJoCo cannot draw here ({'; '.join(problems)}); install EGL or OSMesa (Debian: libegl1, libosmesa6), "
        "or make the task without render_mode"
    )


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Sets environment variables for the block and puts the former ones back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
