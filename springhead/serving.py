"""The code that MLflow runs to serve a promoted policy; part of the registered model, not a pickle.

``mlflow models serve -m models:/policy-BallCircle@champion --env-manager local`` executes this file
and hands it the policy folder. It answers observations with actions:

    {"inputs": [[…], …], "params": {"cost_limit": 20}}           rows of observations
    {"dataframe_split": {"columns": […], "data": [[…], …]}}      the same as a table

Each row is answered as the first step of an episode of its own: a server has no memory of episodes.
"""

import threading
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from springhead.errors import BadInput
from springhead.rl.policy import Policy, load_policy, predict

ARTIFACT = "policy"


class ServedPolicy(PythonModel):
    """A policy behind MLflow's generic interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the policy folder; safetensors and JSON only, so no code comes with it."""
        self.policy: Policy = load_policy(context.artifacts[ARTIFACT])
        # A policy remembers running episodes between its calls, and the server answers in threads.
        self.lock = threading.Lock()

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Returns actions (n, action_dim) float32 for observations (n, observation_dim).

        Args:
            context: unused; the policy is loaded once.
            model_input: an array, or a data frame with one column per component.
            params: ``cost_limit``, the undiscounted cost allowed in an episode; the signature of the
                model has the default. None for a policy that acts alike under every limit.

        Raises:
            MlflowException: on observations or a limit that the policy cannot take, answered by
                the server with status 400 and the reason.
        """
        try:
            with self.lock:
                return predict(self.policy, np.asarray(model_input), float((params or {}).get("cost_limit", 0.0)))
        except BadInput as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


set_model(ServedPolicy())  # how MLflow learns, on executing the file, what to serve
