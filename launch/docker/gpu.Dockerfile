# For NVIDIA GPUs. CUDA comes with JAX's wheels; the host needs the driver alone (and NVIDIA's container toolkit or enroot).
#
#   docker build -f launch/docker/gpu.Dockerfile -t robovlms_jax:gpu .
ARG BASE=python:3.12-slim
# BASE has a tag; hadolint does not look into arguments.
# hadolint ignore=DL3006
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/robovlms_jax
# Packages first: they change less often than the code, and are fetched again only then.
COPY setup.cfg pyproject.toml requirements.txt README.md LICENSE ./
RUN mkdir robovlms_jax experiments \
    && touch robovlms_jax/__init__.py experiments/__init__.py \
    && pip install --no-cache-dir -c requirements.txt -e ".[gpu,remote,ray]"
COPY . .
# Fails the build if the package cannot be imported.
RUN python -c "import robovlms_jax.runs.run, experiments.calvin_abcd"
CMD ["launch/train.sh"]
