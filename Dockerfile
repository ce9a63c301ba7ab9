# Everything `make run` needs, without a GPU. See docs/guide/docker.md.
FROM python:3.11.11-slim-bookworm

RUN apt-get update \
 && apt-get install --yes --no-install-recommends git make \
 && rm -rf /var/lib/apt/lists/*

# Volumes take the owner of the folder they are mounted on when they are first used.
RUN useradd --create-home --uid 1000 springhead \
 && install -d -o springhead /project /home/springhead/.prefect /home/springhead/mlflow
USER springhead
WORKDIR /project

# The locked packages first: they change less often than the code.
COPY --chown=springhead Makefile pyproject.toml README.md LICENSE ./
COPY --chown=springhead locks locks
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN make install TORCH_INDEX=${TORCH_INDEX} && rm -rf /home/springhead/.cache

COPY --chown=springhead . .
# Once more, now that the packages to be found are there.
RUN .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .

ENV PATH=/project/.venv/bin:${PATH} \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    GX_ANALYTICS_ENABLED=false \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PYTHONUNBUFFERED=1 \
    XDG_CONFIG_HOME=/project/.springhead/config
# The last one: the signing key is kept in the volume, where a new container finds it.

CMD ["make", "run"]
